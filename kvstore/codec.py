"""Codecs: what a block's bytes become on the way to SSD and wire.

`none` is the default. `zstd` is lossless. `int8` and `fp8` are lossy: they are used only where a
setting names them, and they report the error they make.

* A codec works on batches of blocks given by address, with the GIL released. It keeps nothing
  between batches but its statistics.
* Encoded blocks carry a header (csrc/copy/quant.h has the format), so a decoder never believes a
  length or shape that it did not check. `none` has no header: its encoded form is the raw block, to
  be written straight from its slot; `encode` copies only for callers that treat all codecs alike.
* What cannot be encoded faithfully is refused, never damaged: a block with a NaN or an Inf has
  `ok == False` in the result of a lossy codec, and the caller stores it with `none`.
* Checksums are the business of who stores or sends the encoded bytes. A codec notices truncation,
  damaged headers and impossible bodies, not a flipped bit among its codes.

Thread safety: every method may be called from any thread; `_lock` guards the statistics.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.errors import ConfigError, CorruptError, IncompatibleError

if TYPE_CHECKING:
    import zstandard

# O_DIRECT's strictest alignment on the file systems we know: one page.
ALIGNMENT_BYTES = 4096

U64 = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


class CodecId(IntEnum):
    """The number that a stored block's record and header say."""

    NONE = 0
    INT8 = 1
    FP8 = 2
    ZSTD = 3


class CodecStatus(IntEnum):
    """What became of one block; the same numbers as in csrc/copy/quant.h."""

    OK = 0
    NOT_FINITE = 1
    TRUNCATED = 2
    BAD_HEADER = 3
    BAD_BODY = 4
    WRONG_VERSION = 5
    WRONG_CODEC = 6
    WRONG_SPEC = 7


_REASONS = {
    CodecStatus.TRUNCATED: "it is shorter than its header says, or than a header",
    CodecStatus.BAD_HEADER: "its header is damaged or not one of ours",
    CodecStatus.BAD_BODY: "its body is damaged",
    CodecStatus.WRONG_VERSION: "it was written by another version of the format",
    CodecStatus.WRONG_CODEC: "it was written by another codec",
    CodecStatus.WRONG_SPEC: "it was written for another block spec",
}


@dataclass(frozen=True)
class Encoded:
    """A batch of encoded blocks in one buffer.

    Block i is `lengths[i]` bytes at `offsets[i]`. Offsets and the buffer's address are multiples of
    ALIGNMENT_BYTES, and the bytes up to the next multiple are zeros, so each block can be written
    with O_DIRECT as it lies. Where `ok[i]` is False the codec refused the block: its length is 0.
    """

    buffer: npt.NDArray[np.uint8]
    offsets: U64
    lengths: U64
    ok: Mask

    @property
    def addrs(self) -> U64:
        """Addresses of the blocks; good for as long as `buffer` is referenced."""
        return self.offsets + np.uint64(self.buffer.ctypes.data)


@dataclass(frozen=True)
class CodecStats:
    """Totals since the codec was made.

    The errors of a lossy codec are measured on a sample: of each plane (one layer's K or V) of each
    encoded block one token, a different one from plane to plane.
    """

    blocks_encoded: int = 0
    blocks_refused: int = 0
    blocks_decoded: int = 0
    blocks_corrupt: int = 0
    raw_bytes: int = 0
    encoded_bytes: int = 0
    sampled_elements: int = 0
    error_abs_max: float = 0.0
    error_square_sum: float = 0.0
    value_square_sum: float = 0.0

    @property
    def ratio(self) -> float:
        """Raw bytes per encoded byte, headers included, padding not."""
        return self.raw_bytes / self.encoded_bytes if self.encoded_bytes else 1.0

    @property
    def error_rms_relative(self) -> float:
        """Root mean square error / root mean square value."""
        if self.value_square_sum == 0.0:
            return 0.0
        return float(np.sqrt(self.error_square_sum / self.value_square_sum))


class Codec(Protocol):
    """Turns raw blocks into encoded ones and back."""

    @property
    def id(self) -> CodecId: ...

    @property
    def name(self) -> str: ...

    @property
    def lossy(self) -> bool: ...

    def max_encoded_bytes(self, raw_bytes: int, spec: BlockSpec | None = None) -> int:
        """The most that one block can take in a buffer, a multiple of ALIGNMENT_BYTES.

        Without a spec the bound holds for every spec.
        """
        ...

    def encode(
        self,
        addrs: U64,
        raw_bytes: int,
        spec: BlockSpec,
        buffer: npt.NDArray[np.uint8] | None = None,
    ) -> Encoded:
        """Encodes the raw blocks of `raw_bytes` bytes at `addrs`.

        `buffer`, where given, is used in place of a new one: uint8, contiguous, aligned to
        ALIGNMENT_BYTES, at least len(addrs) * max_encoded_bytes(raw_bytes, spec) bytes.
        """
        ...

    def decode(
        self,
        addrs: U64,
        lengths: U64,
        out_addrs: U64,
        raw_bytes: int,
        spec: BlockSpec,
        strict: bool = False,
    ) -> Mask:
        """Decodes `lengths[i]` bytes at `addrs[i]` into `raw_bytes` bytes at `out_addrs[i]`.

        Lengths may include padding. Returns True for each decoded block; a corrupt one is False
        (with `strict`: CorruptError), and its output bytes mean nothing. Intact blocks of another
        codec, format version or spec are a mistake of the caller: IncompatibleError, and nothing is
        written.
        """
        ...

    def error_report(self) -> CodecStats:
        """Totals and errors of everything encoded and decoded so far."""
        ...


def aligned_buffer(size_bytes: int) -> npt.NDArray[np.uint8]:
    """A new uint8 array whose address is a multiple of ALIGNMENT_BYTES; contents are undefined."""
    raw = np.empty(size_bytes + ALIGNMENT_BYTES, dtype=np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[skip : skip + size_bytes]


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _checked_buffer(buffer: npt.NDArray[np.uint8] | None, size_bytes: int) -> npt.NDArray[np.uint8]:
    if buffer is None:
        return aligned_buffer(size_bytes)
    if buffer.dtype != np.uint8 or buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise ValueError("buffer must be a contiguous one-dimensional uint8 array")
    if buffer.ctypes.data % ALIGNMENT_BYTES:
        raise ValueError(f"buffer must be aligned to {ALIGNMENT_BYTES} bytes")
    if buffer.size < size_bytes:
        raise ValueError(f"buffer has {buffer.size} bytes; this batch may need {size_bytes}")
    return buffer


def _check_batch(name: str, addrs: U64, *same_length: U64) -> None:
    for array in (addrs, *same_length):
        if array.dtype != np.uint64 or array.ndim != 1:
            raise TypeError(f"{name}: addresses and lengths must be one-dimensional uint64 arrays")
        if len(array) != len(addrs):
            raise ValueError(f"{name}: addresses and lengths must have one entry per block each")


# What the header says about the elements.
_ELEMENTS = {"float32": 1, "float16": 2, "bfloat16": 3}


def _shuffle_width(raw_bytes: int, spec: BlockSpec) -> int:
    shuffled = spec.dtype_bytes in (2, 4) and raw_bytes % spec.dtype_bytes == 0
    return spec.dtype_bytes if shuffled else 1


def _format(codec: CodecId, raw_bytes: int, spec: BlockSpec) -> _native.CodecFormat:
    return _native.CodecFormat(
        codec=int(codec),
        element=_ELEMENTS.get(spec.dtype, 0),
        planes=spec.num_layers * spec.num_parts,
        tokens=spec.block_tokens,
        heads=spec.num_kv_heads,
        dim=spec.head_dim,
        raw_bytes=raw_bytes,
        shuffle_width=_shuffle_width(raw_bytes, spec) if codec == CodecId.ZSTD else 0,
    )


class _Statistics:
    """The running totals of one codec, and the verdict on a decoded batch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = CodecStats()

    def error_report(self) -> CodecStats:
        with self._lock:
            return self._stats

    def _count_encoded(
        self, raw_bytes: int, encoded: Encoded, errors: npt.NDArray[np.float64] | None = None
    ) -> None:
        blocks = int(np.count_nonzero(encoded.ok))
        top, sums = 0.0, [0.0, 0.0, 0.0]
        if errors is not None and len(errors):
            top, sums = float(errors[:, 0].max()), errors[:, 1:].sum(axis=0).tolist()
        with self._lock:
            was = self._stats
            self._stats = replace(
                was,
                blocks_encoded=was.blocks_encoded + blocks,
                blocks_refused=was.blocks_refused + len(encoded.ok) - blocks,
                raw_bytes=was.raw_bytes + blocks * raw_bytes,
                encoded_bytes=was.encoded_bytes + int(encoded.lengths.sum()),
                error_abs_max=max(was.error_abs_max, top),
                error_square_sum=was.error_square_sum + sums[0],
                value_square_sum=was.value_square_sum + sums[1],
                sampled_elements=was.sampled_elements + int(sums[2]),
            )

    def _judge(self, name: str, statuses: npt.NDArray[np.uint8], strict: bool) -> Mask:
        """Counts a decoded batch; raises what Codec.decode says."""
        _refuse_incompatible(name, statuses)
        ok: Mask = statuses == CodecStatus.OK
        corrupt = np.flatnonzero(~ok)
        with self._lock:
            was = self._stats
            self._stats = replace(
                was,
                blocks_decoded=was.blocks_decoded + len(ok) - len(corrupt),
                blocks_corrupt=was.blocks_corrupt + len(corrupt),
            )
        if strict and len(corrupt):
            reason = _REASONS[CodecStatus(int(statuses[corrupt[0]]))]
            raise CorruptError(f"{name}: block {corrupt[0]} of the batch cannot be read: {reason}")
        return ok


def _refuse_incompatible(name: str, statuses: npt.NDArray[np.uint8]) -> None:
    foreign = np.flatnonzero(statuses >= CodecStatus.WRONG_VERSION)
    if len(foreign):
        reason = _REASONS[CodecStatus(int(statuses[foreign[0]]))]
        raise IncompatibleError(f"{name}: block {foreign[0]} of the batch is refused: {reason}")


class NoneCodec(_Statistics):
    """The raw block itself, without a header."""

    id: ClassVar[CodecId] = CodecId.NONE
    name: ClassVar[str] = "none"
    lossy: ClassVar[bool] = False

    def max_encoded_bytes(self, raw_bytes: int, spec: BlockSpec | None = None) -> int:
        return _aligned(raw_bytes)

    def encode(
        self,
        addrs: U64,
        raw_bytes: int,
        spec: BlockSpec,
        buffer: npt.NDArray[np.uint8] | None = None,
    ) -> Encoded:
        _check_batch(self.name, addrs)
        stride = self.max_encoded_bytes(raw_bytes)
        buffer = _checked_buffer(buffer, stride * len(addrs))
        encoded = Encoded(
            buffer,
            np.arange(len(addrs), dtype=np.uint64) * np.uint64(stride),
            np.full(len(addrs), raw_bytes, np.uint64),
            np.ones(len(addrs), np.bool_),
        )
        _native.codec_copy(addrs, encoded.addrs, raw_bytes)
        buffer[: stride * len(addrs)].reshape(len(addrs), stride)[:, raw_bytes:] = 0
        self._count_encoded(raw_bytes, encoded)
        return encoded

    def decode(
        self,
        addrs: U64,
        lengths: U64,
        out_addrs: U64,
        raw_bytes: int,
        spec: BlockSpec,
        strict: bool = False,
    ) -> Mask:
        _check_batch(self.name, addrs, lengths, out_addrs)
        whole = lengths >= raw_bytes
        statuses = np.where(whole, CodecStatus.OK, CodecStatus.TRUNCATED).astype(np.uint8)
        _native.codec_copy(addrs[whole], out_addrs[whole], raw_bytes)
        return self._judge(self.name, statuses, strict)


class _QuantCodec(_Statistics):
    """One byte per element and a 16-bit scale per group of elements, by the native kernels."""

    id: ClassVar[CodecId]
    name: ClassVar[str]
    lossy: ClassVar[bool] = True

    def max_encoded_bytes(self, raw_bytes: int, spec: BlockSpec | None = None) -> int:
        if spec is not None:
            return _aligned(self._format(raw_bytes, spec).encoded_bytes)
        # Worst case: 16-bit elements, and one token to a block, so as many scales as elements.
        return _aligned(_native.CODEC_HEADER_BYTES + raw_bytes // 2 + raw_bytes)

    def encode(
        self,
        addrs: U64,
        raw_bytes: int,
        spec: BlockSpec,
        buffer: npt.NDArray[np.uint8] | None = None,
    ) -> Encoded:
        _check_batch(self.name, addrs)
        block_format = self._format(raw_bytes, spec)
        n, length = len(addrs), block_format.encoded_bytes
        stride = _aligned(length)
        buffer = _checked_buffer(buffer, stride * n)
        offsets = np.arange(n, dtype=np.uint64) * np.uint64(stride)
        statuses = np.empty(n, np.uint8)
        errors = np.empty((n, 4), np.float64)
        _native.codec_encode(block_format, addrs, buffer, offsets, statuses, errors)
        buffer[: stride * n].reshape(n, stride)[:, length:] = 0
        ok = statuses == CodecStatus.OK
        encoded = Encoded(buffer, offsets, np.where(ok, length, 0).astype(np.uint64), ok)
        self._count_encoded(raw_bytes, encoded, errors)
        return encoded

    def decode(
        self,
        addrs: U64,
        lengths: U64,
        out_addrs: U64,
        raw_bytes: int,
        spec: BlockSpec,
        strict: bool = False,
    ) -> Mask:
        _check_batch(self.name, addrs, lengths, out_addrs)
        block_format = self._format(raw_bytes, spec)
        statuses = np.empty(len(addrs), np.uint8)
        encoded_bytes = np.empty(len(addrs), np.uint64)
        _native.codec_check_headers(block_format, addrs, lengths, encoded_bytes, statuses)
        _refuse_incompatible(self.name, statuses)
        _native.codec_decode(block_format, addrs, lengths, out_addrs, statuses)
        return self._judge(self.name, statuses, strict)

    def check_spec(self, spec: BlockSpec) -> None:
        """Raises ConfigError where this codec cannot code the spec's elements."""
        if spec.dtype not in _ELEMENTS:
            raise ConfigError(
                f"codec {self.name!r} needs blocks of {', '.join(sorted(_ELEMENTS))}; "
                f"these are of {spec.dtype}"
            )

    def _format(self, raw_bytes: int, spec: BlockSpec) -> _native.CodecFormat:
        self.check_spec(spec)
        if raw_bytes != spec.block_bytes:
            raise ValueError(
                f"raw_bytes is {raw_bytes}; blocks of the spec have {spec.block_bytes}"
            )
        return _format(self.id, raw_bytes, spec)


class Int8Codec(_QuantCodec):
    """Symmetric int8 with a scale per layer, part, head and channel over the block's tokens.

    The finer scales of the two, for caches whose channels differ much in size. Error of an element:
    at most half a scale, that is 1/252 of the channel's largest magnitude, plus the rounding to
    the block's own dtype.
    """

    id: ClassVar[CodecId] = CodecId.INT8
    name: ClassVar[str] = "int8"


class Fp8Codec(_QuantCodec):
    """OCP e4m3 ("OCP 8-bit Floating Point Specification", 2023) with a scale per part and head.

    Scales are powers of two, so the conversion to e4m3 is the only rounding. Error of an element:
    at most 1/16 of its value or 2^-18 of the head's largest magnitude, whichever is more.
    """

    id: ClassVar[CodecId] = CodecId.FP8
    name: ClassVar[str] = "fp8"


class ZstdCodec(_Statistics):
    """Lossless: the bytes of the elements regrouped by significance, then one zstd frame.

    Level 1, because higher levels were slower and no smaller: the gain is entropy coding of the
    exponents' bytes, and there are next to no repeats to find. Compression runs block by block with
    the GIL released.
    """

    id: ClassVar[CodecId] = CodecId.ZSTD
    name: ClassVar[str] = "zstd"
    lossy: ClassVar[bool] = False

    def __init__(self, level: int = 1) -> None:
        super().__init__()
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(
                "codec 'zstd' needs the zstandard package: pip install 'kvstore-llm[zstd]'"
            ) from error
        self._zstandard = zstandard
        self._level = level

    def max_encoded_bytes(self, raw_bytes: int, spec: BlockSpec | None = None) -> int:
        # Incompressible data is stored in blocks of 128 KiB (3 bytes of header each; zstd's own
        # ZSTD_compressBound allows 1/256), with at most 18 bytes of frame header.
        return _aligned(_native.CODEC_HEADER_BYTES + raw_bytes + (raw_bytes >> 8) + 128)

    def encode(
        self,
        addrs: U64,
        raw_bytes: int,
        spec: BlockSpec,
        buffer: npt.NDArray[np.uint8] | None = None,
    ) -> Encoded:
        _check_batch(self.name, addrs)
        block_format = _format(self.id, raw_bytes, spec)
        width = _shuffle_width(raw_bytes, spec)
        buffer = _checked_buffer(buffer, self.max_encoded_bytes(raw_bytes) * len(addrs))
        compressor = self._zstandard.ZstdCompressor(level=self._level, write_content_size=True)
        shuffled = np.empty(raw_bytes, np.uint8)
        offsets = np.empty(len(addrs), np.uint64)
        lengths = np.empty(len(addrs), np.uint64)
        at = 0
        for i, address in enumerate(addrs.tolist()):
            _native.codec_shuffle(address, shuffled, width)
            frame = compressor.compress(memoryview(shuffled))
            length = _native.CODEC_HEADER_BYTES + len(frame)
            end = at + _aligned(length)
            _native.codec_write_header(block_format, buffer[at:end], length)
            buffer[at + _native.CODEC_HEADER_BYTES : at + length] = np.frombuffer(frame, np.uint8)
            buffer[at + length : end] = 0
            offsets[i], lengths[i] = at, length
            at = end
        encoded = Encoded(buffer, offsets, lengths, np.ones(len(addrs), np.bool_))
        self._count_encoded(raw_bytes, encoded)
        return encoded

    def decode(
        self,
        addrs: U64,
        lengths: U64,
        out_addrs: U64,
        raw_bytes: int,
        spec: BlockSpec,
        strict: bool = False,
    ) -> Mask:
        _check_batch(self.name, addrs, lengths, out_addrs)
        statuses = np.empty(len(addrs), np.uint8)
        encoded_bytes = np.empty(len(addrs), np.uint64)
        _native.codec_check_headers(
            _format(self.id, raw_bytes, spec), addrs, lengths, encoded_bytes, statuses
        )
        _refuse_incompatible(self.name, statuses)
        width = _shuffle_width(raw_bytes, spec)
        decompressor = self._zstandard.ZstdDecompressor()
        for i in np.flatnonzero(statuses == CodecStatus.OK).tolist():
            frame = np.empty(int(encoded_bytes[i]) - _native.CODEC_HEADER_BYTES, np.uint8)
            body = int(addrs[i]) + _native.CODEC_HEADER_BYTES
            _native.codec_shuffle(body, frame, 1)  # a plain copy: zstandard takes no addresses
            shuffled = self._decompress(decompressor, memoryview(frame), raw_bytes)
            if shuffled is None:
                statuses[i] = CodecStatus.BAD_BODY
            else:
                _native.codec_unshuffle(shuffled, int(out_addrs[i]), width)
        return self._judge(self.name, statuses, strict)

    def _decompress(
        self,
        decompressor: "zstandard.ZstdDecompressor",
        frame: "memoryview[int]",
        raw_bytes: int,
    ) -> npt.NDArray[np.uint8] | None:
        """None unless the frame is sound and holds exactly `raw_bytes` bytes."""
        try:
            # The decompressor allocates what the frame says: so look before.
            if self._zstandard.get_frame_parameters(frame).content_size != raw_bytes:
                return None
            raw = decompressor.decompress(frame, allow_extra_data=False)
        except self._zstandard.ZstdError:
            return None
        return np.frombuffer(raw, np.uint8) if len(raw) == raw_bytes else None


_CODECS: dict[CodecId, Callable[[], Codec]] = {
    CodecId.NONE: NoneCodec,
    CodecId.INT8: Int8Codec,
    CodecId.FP8: Fp8Codec,
    CodecId.ZSTD: ZstdCodec,
}


def codec_names() -> list[str]:
    """The names that get_codec knows."""
    return [codec_id.name.lower() for codec_id in CodecId]


def get_codec(name_or_id: str | int, spec: BlockSpec) -> Codec:
    """A new codec, with statistics of its own, that suits blocks of `spec`."""
    for codec_id, make in _CODECS.items():
        if name_or_id in (codec_id.name.lower(), int(codec_id)):
            codec = make()
            if isinstance(codec, _QuantCodec):
                codec.check_spec(spec)
            return codec
    raise ConfigError(f"codec {name_or_id!r} is unknown; there are {', '.join(codec_names())}")
