"""Every error that kvstore raises on purpose.

* KVStoreError
  x ConfigError            a setting is wrong; the message names it (also a ValueError)
  x IncompatibleError      data or a peer of another version, model, layout or format
  x InUseError             another process holds the directory
  x StoreClosedError       use after close
  x OutOfSpaceError        nothing can be evicted, or the disk is full
  x CorruptError           bytes or records fail their checksum and cannot be treated as a miss
  x StorageError           the operating system refused an I/O (EIO, EROFS, ...) (also an OSError)
  x PeerUnavailableError   the daemon or a peer is gone or does not speak our protocol
  x DeadlineExceededError  a call reached its deadline (also a TimeoutError)
  x GpuError               a GPU, its driver or its compiler is missing, or refused a call

A miss is not an error: lookups and loads return what they found.
"""


class KVStoreError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(KVStoreError, ValueError):
    """A setting or argument is wrong; the message names it."""


class IncompatibleError(KVStoreError):
    """Data or a peer of another version, model, layout or format. Nothing was changed."""


class InUseError(KVStoreError):
    """Another process holds the directory."""


class StoreClosedError(KVStoreError):
    """The store, lease or buffer was used after it was closed."""


class OutOfSpaceError(KVStoreError):
    """Nothing can be evicted, or the disk is full."""


class CorruptError(KVStoreError):
    """Bytes or records fail their checksum and cannot be treated as a miss."""


class StorageError(KVStoreError, OSError):
    """The operating system refused an I/O."""


class PeerUnavailableError(KVStoreError):
    """The daemon or a peer is gone or does not speak our protocol."""


class DeadlineExceededError(KVStoreError, TimeoutError):
    """A call reached its deadline."""


class GpuError(KVStoreError):
    """A GPU, its driver or its compiler is missing, or refused a call."""
