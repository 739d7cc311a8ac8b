"""From token ids to block hashes, in one call for a whole prompt.

The chains, and why no two of their messages can be mistaken for one another, are described in
csrc/core/block_hash.h. The native code does all per-block work with the GIL released; here, only
the extra keys of vLLM's chains are serialised, as they are Python objects.
"""

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes

# A list or tuple of int, an array of any integer type, or what speaks DLPack or the buffer protocol
# (a CPU tensor of torch, array.array).
TokenIds: TypeAlias = Any
# In vLLM's form: nested tuples of str, int, bytes and None, say (("lora", name, path),).
VllmExtraKey: TypeAlias = tuple[Any, ...]
ExtraKeys: TypeAlias = bytes | Sequence[bytes | None] | Sequence[VllmExtraKey | None]

_NATIVE_DTYPES: Final = frozenset(map(np.dtype, (np.int32, np.uint32, np.int64, np.uint64)))
_VLLM_ALGORITHMS: Final = ("vllm_sha256", "vllm_sha256_cbor")


def hash_blocks(
    token_ids: TokenIds,
    block_tokens: int,
    *,
    parent: BlockHashes | bytes | None = None,
    extra_keys: ExtraKeys | None = None,
    algorithm: str = "blake3",
) -> BlockHashes:
    """Hashes of the whole blocks of `token_ids`; tokens behind the last whole block are ignored.

    Args:
        token_ids: ids from 0 to 2**32 - 1. Contiguous arrays of 32 or 64 bit integers are read
            where they lie, others are converted.
        block_tokens: tokens per block.
        parent: what these tokens come after: the blocks so far (`token_ids` are then only those
            that follow them), or the hash of the last one, or None at the root.
        extra_keys: what besides the tokens the blocks depend on. `bytes` is a salt of the whole
            chain: it enters block 0, through which all others have it, so a call that continues a
            chain may pass it again to no effect. A sequence has one entry per whole block of this
            call, None where there is nothing; the entries are `bytes`, and for vLLM's chains tuples
            as vLLM makes them, and there is no salt other than such a tuple.
        algorithm: "blake3"; "sha256" as SGLang; "vllm_sha256" or "vllm_sha256_cbor" as vLLM 0.32
            with its default seed. For another seed pass as parent
            `BlockHashes.chain([], parent=none_hash)` with vLLM's NONE_HASH.

    Returns:
        The hashes, linked when the position of `parent` is known.

    Raises:
        ValueError: an id, `block_tokens` or an entry of `extra_keys` is out of range, or there are
            not as many extra keys as blocks.
        TypeError: an argument is of no type that is listed here.
    """
    before, start = _parent_and_start(parent)
    tokens = _as_tokens(token_ids)
    keys = None
    if extra_keys is not None:
        keys = _native_extra_keys(extra_keys, len(tokens) // max(block_tokens, 1), start, algorithm)
    array = _native.hash_blocks(tokens, block_tokens, before, keys, algorithm)
    return BlockHashes(array, start, before)


class PrefixHasher:
    """Hashes a sequence that grows: `extend` returns the blocks that became whole.

    The blocks of all calls together are those of one `hash_blocks` over all tokens. A call that
    raises leaves the hasher as it was. Not safe for concurrent use.
    """

    def __init__(
        self,
        block_tokens: int,
        *,
        parent: BlockHashes | bytes | None = None,
        salt: bytes | None = None,
        algorithm: str = "blake3",
    ) -> None:
        """`parent`, `salt` (as `extra_keys`) and `algorithm` are those of `hash_blocks`."""
        self._block_tokens = block_tokens
        self._salt = salt
        self._algorithm = algorithm
        self._tail: list[int] = []
        # Also checks the arguments.
        self._done = hash_blocks(
            [], block_tokens, parent=parent, extra_keys=salt, algorithm=algorithm
        )

    @property
    def tail(self) -> tuple[int, ...]:
        """The tokens behind the last whole block."""
        return tuple(self._tail)

    def extend(self, token_ids: TokenIds, *, extra_keys: ExtraKeys | None = None) -> BlockHashes:
        """Append tokens; returns the newly whole blocks, linked to those before.

        `extra_keys` has one entry for each block that becomes whole in this call, and is an error
        together with a salt.
        """
        if extra_keys is not None and self._salt is not None:
            raise ValueError("extra_keys: this hasher has a salt")
        tokens = _as_tokens(token_ids)
        if self._tail:
            tokens = [*self._tail, *(tokens if isinstance(tokens, list) else tokens.tolist())]
        hashes = hash_blocks(
            tokens,
            self._block_tokens,
            parent=self._done,
            extra_keys=self._salt if extra_keys is None else extra_keys,
            algorithm=self._algorithm,
        )
        rest = tokens[len(hashes) * self._block_tokens :]
        self._tail = rest if isinstance(rest, list) else rest.tolist()
        self._done = hashes.after()
        return hashes


def _parent_and_start(parent: BlockHashes | bytes | None) -> tuple[bytes | None, int]:
    if parent is None:
        return None, 0
    if isinstance(parent, bytes):
        return parent, -1
    if isinstance(parent, BlockHashes):
        if len(parent) == 0 and not parent.linked and parent.parent is None:
            raise ValueError("parent: empty hashes of unknown lineage say nothing to continue from")
        return parent.last, parent.start + len(parent) if parent.linked else -1
    raise TypeError(f"parent: need BlockHashes, bytes or None, got {type(parent).__name__}")


def _as_tokens(token_ids: TokenIds) -> "list[int] | npt.NDArray[Any]":
    if isinstance(token_ids, list):
        return token_ids
    if isinstance(token_ids, tuple):
        return list(token_ids)
    if isinstance(token_ids, np.ndarray):
        array = token_ids
    elif hasattr(token_ids, "__dlpack__"):
        try:
            array = np.from_dlpack(token_ids)
        except (BufferError, RuntimeError) as error:
            raise TypeError(f"token_ids: not readable by the CPU: {error}") from None
    else:
        try:
            array = np.asarray(memoryview(token_ids))
        except TypeError:
            raise TypeError(f"token_ids: cannot read {type(token_ids).__name__}") from None
    if array.ndim != 1:
        raise ValueError(f"token_ids: need one dimension, got {array.ndim}")
    if array.dtype in _NATIVE_DTYPES and array.flags.c_contiguous and array.flags.aligned:
        return array
    if array.dtype.kind not in "iu":
        raise TypeError(f"token_ids: need integers, got {array.dtype}")
    # uint64 keeps its width, so that ids that are too large are still seen to be.
    wide = np.dtype(np.uint64) if array.dtype.kind == "u" else np.dtype(np.int64)
    return np.require(array, wide, ["C_CONTIGUOUS", "ALIGNED"])


def _native_extra_keys(
    extra_keys: ExtraKeys, num_blocks: int, start: int, algorithm: str
) -> Sequence[bytes | None] | None:
    """One serialised key per block, or None if no block has one."""
    if algorithm in _VLLM_ALGORITHMS:
        if isinstance(extra_keys, bytes):
            raise TypeError('extra_keys: for vLLM pass tuples, a salt as (("cache_salt", salt),)')
        return _vllm_extra_keys(extra_keys, algorithm)
    if not isinstance(extra_keys, bytes):
        return extra_keys  # type: ignore[return-value] # the native code checks each entry
    if start != 0 or num_blocks == 0:
        return None
    return [extra_keys] + [None] * (num_blocks - 1)


def _vllm_extra_keys(extra_keys: Sequence[Any], algorithm: str) -> list[bytes | None]:
    serialise = _pickle_suffix if algorithm == "vllm_sha256" else _native.cbor
    # Adapters pass one and the same tuple for every block of a LoRA request. By identity, since
    # equal tuples of different objects can pickle differently.
    seen: dict[int, tuple[VllmExtraKey, bytes]] = {}
    serialised: list[bytes | None] = []
    for key in extra_keys:
        if key is None:
            serialised.append(None)
            continue
        if id(key) not in seen:
            if not isinstance(key, tuple):
                raise TypeError(f"extra_keys: need tuples or None, got {type(key).__name__}")
            seen[id(key)] = (key, serialise(key))
        serialised.append(seen[id(key)][1])
    return serialised


def _pickle_suffix(key: VllmExtraKey) -> bytes:
    """`key` as it is pickled when it is the last element of vLLM's (hash, tokens, key).

    The pickler refers to a repeated object (not: value) by a number that counts the objects before
    it, so the real pickler has to see the same objects in the same place.
    """
    _native.cbor(key)  # allows the same types in both chains
    import pickle

    data = pickle.dumps((bytes(32), (0,), key), protocol=5)
    # PROTO, FRAME, SHORT_BINBYTES + MEMOIZE, BININT1 0, TUPLE1, MEMOIZE; ... TUPLE3, MEMOIZE, STOP.
    begin = 2 + 9 + (2 + 32 + 1) + 2 + 1 + 1
    if data[begin - 4 : begin] != b"K\0\x85\x94" or data[-3:] != b"\x87\x94.":
        raise ValueError("extra_keys: a key is too long to be pickled in one frame")
    return data[begin:-3]
