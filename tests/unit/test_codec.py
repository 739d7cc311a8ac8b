"""Codecs: what comes back is what went in, exactly (none, zstd) or within the stated error (int8,
fp8); what cannot be coded is refused; what cannot be decoded is an error or a miss, never a crash.

How: Hypothesis draws blocks bit by bit, so subnormals, zeros and huge values are common. Every
native kernel is compared with a second implementation of the format in numpy, on top of torch's
own float8_e4m3fn and bfloat16 conversions, at every instruction level of this machine. Decoders get
truncated, mutated and random bytes, and intact blocks of another spec, codec or version.
"""

import importlib
import itertools
import struct
import sys
import threading

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.codec import (
    ALIGNMENT_BYTES,
    Codec,
    CodecId,
    CodecStatus,
    Encoded,
    aligned_buffer,
    codec_names,
    get_codec,
)
from kvstore.errors import ConfigError, CorruptError, IncompatibleError

Bytes = npt.NDArray[np.uint8]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOSSY = ("int8", "fp8")
HEADER = _native.CODEC_HEADER_BYTES
MIN_SCALE = 2.0**-126


def make_spec(dtype: str = "bfloat16", **changes: int) -> BlockSpec:
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "block_tokens": 4} | changes
    return BlockSpec(
        num_layers=sizes["num_layers"],
        num_kv_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        block_tokens=sizes["block_tokens"],
        dtype=dtype,
    )


def addresses(blocks: Bytes) -> npt.NDArray[np.uint64]:
    """Addresses of the rows. The caller keeps `blocks` alive for as long as they are used."""
    rows = np.arange(len(blocks), dtype=np.uint64) * np.uint64(blocks.strides[0])
    return rows + np.uint64(blocks.ctypes.data)


def as_tensor(blocks: Bytes, spec: BlockSpec) -> torch.Tensor:
    planes = spec.num_layers * spec.num_parts
    shape = (len(blocks), planes, spec.block_tokens, spec.num_kv_heads, spec.head_dim)
    return torch.from_numpy(blocks.copy()).view(DTYPES[spec.dtype]).view(shape)


def as_blocks(values: torch.Tensor, spec: BlockSpec) -> Bytes:
    flat = values.to(DTYPES[spec.dtype]).contiguous().view(torch.uint8)
    return np.ascontiguousarray(flat.numpy().reshape(-1, spec.block_bytes))


def normal_blocks(n: int, spec: BlockSpec, seed: int = 0, scale: float = 1.0) -> Bytes:
    values = np.random.default_rng(seed).normal(0, scale, n * spec.block_bytes // spec.dtype_bytes)
    return as_blocks(torch.from_numpy(values), spec)


def encode(codec: Codec, blocks: Bytes, spec: BlockSpec) -> Encoded:
    return codec.encode(addresses(blocks), blocks.shape[1], spec)


def decode(
    codec: Codec, encoded: Encoded, raw_bytes: int, spec: BlockSpec, strict: bool = True
) -> Bytes:
    out = aligned_buffer(len(encoded.ok) * raw_bytes).reshape(-1, raw_bytes)
    ok = codec.decode(
        encoded.addrs, encoded.lengths, addresses(out), raw_bytes, spec, strict=strict
    )
    assert ok.all()
    return out


def body(encoded: Encoded, block: int) -> bytes:
    start = int(encoded.offsets[block])
    return encoded.buffer[start + HEADER : start + int(encoded.lengths[block])].tobytes()


def finite_blocks(spec: BlockSpec) -> st.SearchStrategy[Bytes]:
    """One block of any finite bit patterns, with few distinct ones so that channels repeat."""
    width = 8 * spec.dtype_bytes
    infinity = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[spec.dtype]
    magnitudes = st.one_of(
        st.sampled_from([0, 1, infinity - 1, infinity >> 1]), st.integers(0, infinity - 1)
    )
    element = st.builds(lambda m, s: m | s << (width - 1), magnitudes, st.booleans())
    unsigned = np.uint32 if width == 32 else np.uint16
    count = spec.block_bytes // spec.dtype_bytes

    def spread(pool: list[int], seed: int) -> Bytes:
        picks = np.random.default_rng(seed).integers(0, len(pool), count)
        return np.array(pool, unsigned)[picks].view(np.uint8).reshape(1, -1)

    return st.builds(spread, st.lists(element, min_size=1, max_size=40), st.integers(0, 2**32 - 1))


def specs() -> st.SearchStrategy[BlockSpec]:
    """Small specs whose channel counts are odd as often as not, so that vector tails are used."""
    return st.builds(
        BlockSpec,
        num_layers=st.integers(1, 2),
        num_kv_heads=st.integers(1, 3),
        head_dim=st.integers(1, 19),
        block_tokens=st.integers(1, 5),
        dtype=st.sampled_from(sorted(DTYPES)),
    )


specs_and_blocks = specs().flatmap(lambda spec: st.tuples(st.just(spec), finite_blocks(spec)))


def reference_encode(name: str, block: torch.Tensor) -> bytes:
    """Body of an encoded block, from csrc/copy/quant.h, in numpy and torch."""
    values = block.float()
    codes: torch.Tensor
    if name == "int8":
        quotient = (values.abs().amax(dim=1) / 127).numpy().view(np.uint32)
        bits = np.maximum((quotient.astype(np.uint64) + 0xFFFF) & 0xFFFF0000, 0x00800000)
        scales = torch.from_numpy(bits.astype(np.uint32).view(np.float32))
        codes = (values * (1 / scales).unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    else:
        exact = values.abs().amax(dim=(1, 3)).numpy() / np.float32(448)
        mantissa, exponent = np.frexp(exact)
        power = np.where(mantissa == 0.5, exponent - 1, exponent)
        power = np.where(exact == 0, -126, np.maximum(power, -126))
        scales = torch.from_numpy(np.ldexp(np.ones_like(exact), power))
        scaled = values * (1 / scales)[:, None, :, None]
        codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    stored = (scales.contiguous().numpy().view(np.uint32) >> 16).astype(np.uint16)
    return stored.tobytes() + codes.contiguous().numpy().tobytes()


def reference_decode(name: str, encoded_body: bytes, spec: BlockSpec) -> torch.Tensor:
    planes, heads, dim = spec.num_layers * spec.num_parts, spec.num_kv_heads, spec.head_dim
    scale_dim = dim if name == "int8" else 1
    count = planes * heads * scale_dim
    upper = np.frombuffer(encoded_body, np.uint16, count).astype(np.uint32) << 16
    scales = torch.from_numpy(upper.view(np.float32)).view(planes, 1, heads, scale_dim)
    codes = torch.frombuffer(bytearray(encoded_body[2 * count :]), dtype=torch.uint8)
    stored = torch.int8 if name == "int8" else torch.float8_e4m3fn
    values = codes.view(stored).float().view(planes, spec.block_tokens, heads, dim) * scales
    limit = torch.finfo(DTYPES[spec.dtype]).max
    return values.clamp(-limit, limit).to(DTYPES[spec.dtype])


@pytest.mark.parametrize("name", ["none", "zstd"])
@given(
    raw=st.binary(min_size=1, max_size=3000),
    copies=st.integers(1, 3),
    dtype=st.sampled_from(sorted(DTYPES)),
)
@settings(deadline=None, max_examples=60)
def test_lossless_codecs_give_back_any_bytes(
    name: str, raw: bytes, copies: int, dtype: str
) -> None:
    spec = make_spec(dtype)
    codec = get_codec(name, spec)
    blocks = np.frombuffer(raw * copies, np.uint8).reshape(copies, -1)
    encoded = encode(codec, blocks, spec)
    assert encoded.ok.all()
    assert np.array_equal(decode(codec, encoded, len(raw), spec), blocks)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_zstd_keeps_nan_and_infinity(dtype: str) -> None:
    spec = make_spec(dtype)
    codec = get_codec("zstd", spec)
    blocks = np.full((1, spec.block_bytes), 0xFF, np.uint8)
    assert np.array_equal(
        decode(codec, encode(codec, blocks, spec), spec.block_bytes, spec), blocks
    )


@pytest.mark.parametrize("layers", [1, 4, 8])  # planes of bytes: below, half of and one zstd block
def test_zstd_shrinks_bfloat16_and_incompressible_bytes_stay_within_the_bound(layers: int) -> None:
    spec = make_spec("bfloat16", num_layers=layers, num_kv_heads=8, head_dim=64, block_tokens=16)
    codec = get_codec("zstd", spec)
    blocks = normal_blocks(2, spec)
    encoded = encode(codec, blocks, spec)
    assert np.array_equal(decode(codec, encoded, spec.block_bytes, spec), blocks)
    assert codec.error_report().ratio > 1.4
    noise = np.random.default_rng(0).integers(0, 256, (1, spec.block_bytes), np.uint8)
    encoded = encode(codec, noise, spec)
    assert int(encoded.lengths[0]) <= codec.max_encoded_bytes(spec.block_bytes)


@pytest.mark.parametrize("name", LOSSY)
@given(case=specs_and_blocks)
@settings(deadline=None, max_examples=150)
def test_native_kernels_equal_the_reference_at_every_level(
    name: str, case: tuple[BlockSpec, Bytes]
) -> None:
    spec, blocks = case
    expected = reference_encode(name, as_tensor(blocks, spec)[0])
    codec = get_codec(name, spec)
    encoded = encode(codec, blocks, spec)
    assert body(encoded, 0) == expected
    back = as_blocks(reference_decode(name, expected, spec), spec)
    for level in range(_native.codec_simd_level() + 1):
        assert body(encode_at(level, name, blocks, spec), 0) == expected
        decoded, status = decode_at(level, name, encoded, spec)
        assert status == CodecStatus.OK
        assert np.array_equal(decoded, back)


def native_format(name: str, spec: BlockSpec) -> _native.CodecFormat:
    return _native.CodecFormat(
        codec=CodecId[name.upper()],
        element=["", "float32", "float16", "bfloat16"].index(spec.dtype),
        planes=spec.num_layers * spec.num_parts,
        tokens=spec.block_tokens,
        heads=spec.num_kv_heads,
        dim=spec.head_dim,
        raw_bytes=spec.block_bytes,
    )


def encode_at(level: int, name: str, blocks: Bytes, spec: BlockSpec) -> Encoded:
    block_format = native_format(name, spec)
    buffer = aligned_buffer(block_format.encoded_bytes)
    offsets, statuses = np.zeros(1, np.uint64), np.zeros(1, np.uint8)
    _native.codec_encode(
        block_format, addresses(blocks), buffer, offsets, statuses, np.zeros((1, 4)), level
    )
    lengths = np.full(1, block_format.encoded_bytes, np.uint64)
    return Encoded(buffer, offsets, lengths, statuses == 0)


def decode_at(level: int, name: str, encoded: Encoded, spec: BlockSpec) -> tuple[Bytes, int]:
    out = aligned_buffer(spec.block_bytes).reshape(1, -1)
    statuses = np.zeros(1, np.uint8)
    _native.codec_decode(
        native_format(name, spec), encoded.addrs, encoded.lengths, addresses(out), statuses, level
    )
    return out, int(statuses[0])


@given(case=specs_and_blocks)
@settings(deadline=None, max_examples=150)
def test_int8_error_is_at_most_half_a_scale_and_the_rounding_of_the_dtype(
    case: tuple[BlockSpec, Bytes],
) -> None:
    spec, blocks = case
    codec = get_codec("int8", spec)
    value = as_tensor(blocks, spec).double()
    back = as_tensor(
        decode(codec, encode(codec, blocks, spec), spec.block_bytes, spec), spec
    ).double()
    largest = value.abs().amax(dim=2, keepdim=True)
    scale = (largest / 127 * (1 + 2**-7)).clamp(min=MIN_SCALE)
    rounding = torch.finfo(DTYPES[spec.dtype])
    bound = scale * (0.5 + 2**-15) + largest * rounding.eps + rounding.smallest_normal * 2**-7
    assert torch.isfinite(back).all()
    assert bool(((value - back).abs() <= bound).all())


@given(case=specs_and_blocks)
@settings(deadline=None, max_examples=150)
def test_fp8_error_is_a_sixteenth_of_the_value_or_tiny_beside_its_head(
    case: tuple[BlockSpec, Bytes],
) -> None:
    spec, blocks = case
    codec = get_codec("fp8", spec)
    value = as_tensor(blocks, spec).double()
    back = as_tensor(
        decode(codec, encode(codec, blocks, spec), spec.block_bytes, spec), spec
    ).double()
    largest = value.abs().amax(dim=(2, 4), keepdim=True)
    smallest = torch.finfo(DTYPES[spec.dtype]).smallest_normal
    floor = torch.maximum(largest * 2**-17, torch.tensor(MIN_SCALE * 2**-10)) + smallest * 2**-7
    assert torch.isfinite(back).all()
    assert bool(((value - back).abs() <= torch.maximum(value.abs() / 16, floor)).all())


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_zeros_come_back_as_zeros(name: str, dtype: str) -> None:
    spec = make_spec(dtype)
    codec = get_codec(name, spec)
    blocks = np.zeros((2, spec.block_bytes), np.uint8)
    assert not decode(codec, encode(codec, blocks, spec), spec.block_bytes, spec).any()
    assert codec.error_report().error_rms_relative == 0.0


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_largest_finite_values_do_not_become_infinite(name: str, dtype: str) -> None:
    spec = make_spec(dtype)
    codec = get_codec(name, spec)
    top = torch.finfo(DTYPES[dtype]).max
    values = torch.full((1, spec.block_bytes // spec.dtype_bytes), top, dtype=DTYPES[dtype])
    values[0, ::3] *= -1
    blocks = as_blocks(values, spec)
    decoded = as_tensor(decode(codec, encode(codec, blocks, spec), spec.block_bytes, spec), spec)
    assert torch.isfinite(decoded).all()
    assert torch.equal(torch.sign(decoded.flatten()), torch.sign(values.flatten()))


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_block_with_nan_or_infinity_is_refused_and_its_neighbours_are_not(
    name: str, dtype: str, value: float
) -> None:
    spec = make_spec(dtype)
    codec = get_codec(name, spec)
    values = as_tensor(normal_blocks(3, spec), spec)
    for position in ((1, 0, 0, 0, 0), (1, -1, -1, -1, -1)):
        poisoned = values.clone()
        poisoned[position] = value
        encoded = encode(codec, as_blocks(poisoned, spec), spec)
        assert encoded.ok.tolist() == [True, False, True]
        assert encoded.lengths[1] == 0
        out = aligned_buffer(3 * spec.block_bytes).reshape(3, -1)
        ok = codec.decode(
            encoded.addrs, np.full(3, encoded.lengths[0]), addresses(out), spec.block_bytes, spec
        )
        assert ok.tolist() == [True, False, True]
    report = codec.error_report()
    assert (report.blocks_encoded, report.blocks_refused) == (4, 2)
    assert np.isfinite(report.error_rms_relative)


@pytest.mark.parametrize("name", LOSSY)
def test_reported_errors_are_those_of_the_sampled_tokens(name: str) -> None:
    spec = make_spec("float32", num_layers=3, block_tokens=5)
    codec = get_codec(name, spec)
    blocks = normal_blocks(4, spec)
    value = as_tensor(blocks, spec).double()
    back = as_tensor(
        decode(codec, encode(codec, blocks, spec), spec.block_bytes, spec), spec
    ).double()
    planes = range(spec.num_layers * spec.num_parts)
    picks = [(i, p, (i + p) % spec.block_tokens) for i, p in itertools.product(range(4), planes)]
    sampled = torch.stack([value[pick] for pick in picks])
    off = sampled - torch.stack([back[pick] for pick in picks])
    report = codec.error_report()
    assert report.sampled_elements == sampled.numel()
    assert report.error_abs_max == pytest.approx(off.abs().max().item())
    relative = (off.square().sum() / sampled.square().sum()).sqrt().item()
    assert report.error_rms_relative == pytest.approx(relative)
    assert 0 < relative < {"int8": 0.01, "fp8": 0.04}[name]
    assert report.ratio == pytest.approx(4 * spec.block_bytes / encode_total(codec, blocks, spec))


def encode_total(codec: Codec, blocks: Bytes, spec: BlockSpec) -> int:
    return int(encode(codec, blocks, spec).lengths.sum())


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_encoded_blocks_can_be_written_with_o_direct_as_they_lie(name: str, dtype: str) -> None:
    spec = make_spec(dtype, head_dim=24)
    codec = get_codec(name, spec)
    bound = codec.max_encoded_bytes(spec.block_bytes, spec)
    buffer = aligned_buffer(3 * bound)
    buffer[:] = 0xAA
    blocks = normal_blocks(3, spec)
    encoded = codec.encode(addresses(blocks), spec.block_bytes, spec, buffer=buffer)
    assert encoded.buffer is buffer
    assert bound <= codec.max_encoded_bytes(spec.block_bytes)
    assert not (encoded.addrs % ALIGNMENT_BYTES).any()
    for offset, length in zip(encoded.offsets.tolist(), encoded.lengths.tolist(), strict=True):
        assert 0 < length <= bound
        padded = -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        assert not buffer[offset + length : offset + padded].any()


@pytest.mark.parametrize("name", codec_names())
def test_padding_may_be_part_of_the_length_that_is_decoded(name: str) -> None:
    spec = make_spec()
    codec = get_codec(name, spec)
    blocks = normal_blocks(2, spec)
    encoded = encode(codec, blocks, spec)
    padded = np.full(2, ALIGNMENT_BYTES, np.uint64)
    out = aligned_buffer(2 * spec.block_bytes).reshape(2, -1)
    assert codec.decode(encoded.addrs, padded, addresses(out), spec.block_bytes, spec).all()
    if not codec.lossy:
        assert np.array_equal(out, blocks)


@pytest.mark.parametrize("name", codec_names())
def test_an_empty_batch_is_fine(name: str) -> None:
    spec = make_spec()
    codec = get_codec(name, spec)
    none = np.empty(0, np.uint64)
    encoded = codec.encode(none, spec.block_bytes, spec)
    assert len(encoded.ok) == 0
    assert len(codec.decode(none, none, none, spec.block_bytes, spec)) == 0


@pytest.mark.parametrize("name", codec_names())
def test_bad_arguments_are_refused_by_name(name: str) -> None:
    spec = make_spec()
    codec = get_codec(name, spec)
    blocks = normal_blocks(2, spec)
    addrs = addresses(blocks)
    size = spec.block_bytes
    with pytest.raises(ValueError, match="buffer has"):
        codec.encode(addrs, size, spec, buffer=aligned_buffer(ALIGNMENT_BYTES))
    with pytest.raises(ValueError, match="buffer must be aligned"):
        codec.encode(addrs, size, spec, buffer=aligned_buffer(1 << 16)[1:])
    with pytest.raises(TypeError, match="uint64"):
        codec.encode(addrs.astype(np.int64), size, spec)
    with pytest.raises(ValueError, match="one entry per block"):
        codec.decode(addrs, addrs[:1], addrs, size, spec)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_codecs_need_whole_blocks_of_floats(name: str) -> None:
    spec = make_spec()
    codec = get_codec(name, spec)
    blocks = normal_blocks(1, spec)
    addrs = addresses(blocks)
    with pytest.raises(ValueError, match="raw_bytes"):
        codec.encode(addrs, spec.block_bytes - 2, spec)
    with pytest.raises(ValueError, match=r"raw_addrs\[0\]"):
        codec.encode(addrs + np.uint64(1), spec.block_bytes, spec)
    with pytest.raises(ValueError, match=r"raw_addrs\[0\]"):
        codec.encode(np.zeros(1, np.uint64), spec.block_bytes, spec)


def test_native_functions_check_what_they_are_given() -> None:
    spec = make_spec()
    block_format = native_format("int8", spec)
    blocks = normal_blocks(1, spec)
    addrs = addresses(blocks)
    out, offsets = aligned_buffer(ALIGNMENT_BYTES), np.zeros(1, np.uint64)
    statuses, errors = np.zeros(1, np.uint8), np.zeros((1, 4))
    with pytest.raises(ValueError, match=r"offsets\[0\]"):
        _native.codec_encode(
            block_format, addrs, out, np.full(1, 2**64 - 1, np.uint64), statuses, errors
        )
    with pytest.raises(ValueError, match="statuses"):
        _native.codec_encode(block_format, addrs, out, offsets, np.zeros(2, np.uint8), errors)
    with pytest.raises(ValueError, match="simd"):
        _native.codec_encode(block_format, addrs, out, offsets, statuses, errors, 9)
    with pytest.raises(ValueError, match="width"):
        _native.codec_shuffle(int(addrs[0]), out[:5], 2)
    sizes = {"planes": 4, "tokens": 4, "heads": 2, "dim": 8, "raw_bytes": 512}
    _native.CodecFormat(codec=1, element=2, **sizes)
    overflowing = {"tokens": 2**31, "heads": 2**31, "planes": 2**31, "raw_bytes": 2**40}
    for bad in ({"raw_bytes": 511}, {"planes": 0}, {"dim": 2**31}, overflowing):
        with pytest.raises(ValueError, match="raw_bytes"):
            _native.CodecFormat(codec=1, element=2, **(sizes | bad))


def one_encoded(name: str, spec: BlockSpec) -> bytes:
    encoded = encode(get_codec(name, spec), normal_blocks(1, spec), spec)
    return encoded.buffer[: int(encoded.lengths[0])].tobytes()


def try_decode(name: str, data: bytes, spec: BlockSpec, strict: bool = False) -> bool:
    """Decodes from memory that ends with the data, so that sanitizers see any read beyond it."""
    codec = get_codec(name, spec)
    held = np.frombuffer(data or b"\0", np.uint8).copy()
    out = aligned_buffer(spec.block_bytes).reshape(1, -1)
    addrs, lengths = np.array([held.ctypes.data], np.uint64), np.array([len(data)], np.uint64)
    ok = codec.decode(addrs, lengths, addresses(out), spec.block_bytes, spec, strict=strict)
    return bool(ok[0])


def rehashed(data: bytes) -> bytes:
    """With the header's hash made right again, as an attacker would."""
    value = 0xCBF29CE484222325
    for byte in data[:56]:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return data[:56] + struct.pack("<Q", value) + data[64:]


CODED = ("int8", "fp8", "zstd")


@pytest.mark.parametrize("name", CODED)
@given(data=st.binary(max_size=700))
@example(data=b"kvcd" + bytes(200))
@settings(deadline=None, max_examples=100)
def test_random_bytes_are_corrupt(name: str, data: bytes) -> None:
    assert not try_decode(name, data, make_spec())


@pytest.mark.parametrize("name", CODED)
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_mutated_blocks_never_crash_and_a_damaged_header_is_corrupt(
    name: str, data: st.DataObject
) -> None:
    spec = make_spec()
    good = one_encoded(name, spec)
    mutated = bytearray(good)
    for at in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=4)):
        mutated[at] ^= data.draw(st.integers(1, 255))
    ok = try_decode(name, bytes(mutated), spec)
    if mutated[:HEADER] != good[:HEADER]:
        assert not ok
    cut = data.draw(st.integers(0, len(good) - 1))
    assert not try_decode(name, good[:cut], spec)
    with pytest.raises(CorruptError, match="block 0"):
        try_decode(name, good[:cut], spec, strict=True)


@pytest.mark.parametrize("name", CODED)
@given(at=st.integers(4, 55), flip=st.integers(1, 255), tail=st.binary(max_size=64))
@settings(deadline=None, max_examples=150)
def test_forged_headers_are_refused(name: str, at: int, flip: int, tail: bytes) -> None:
    spec = make_spec()
    forged = bytearray(one_encoded(name, spec) + tail)
    forged[at] ^= flip
    length_field = 16 <= at < 24
    if length_field:
        assert not try_decode(name, rehashed(bytes(forged)), spec)
    else:
        with pytest.raises(IncompatibleError):
            try_decode(name, rehashed(bytes(forged)), spec)


def test_a_frame_that_promises_too_much_is_not_unpacked() -> None:
    zstandard = pytest.importorskip("zstandard")
    spec = make_spec()
    header = one_encoded("zstd", spec)[:HEADER]
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    length = struct.pack("<Q", HEADER + len(bomb))
    forged = rehashed(header[:16] + length + header[24:] + bomb)
    assert not try_decode("zstd", forged, spec)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(spec.block_bytes))
    length = struct.pack("<Q", HEADER + len(unsized))
    assert not try_decode("zstd", rehashed(header[:16] + length + header[24:] + unsized), spec)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("scale", [0x0000, 0x007F, 0x7F80, 0x7FC0, 0xBF80])
def test_impossible_scales_are_corrupt(name: str, scale: int) -> None:
    spec = make_spec()
    data = one_encoded(name, spec)
    assert not try_decode(name, data[:HEADER] + struct.pack("<H", scale) + data[HEADER + 2 :], spec)


@pytest.mark.parametrize(("name", "code"), [("int8", 0x80), ("fp8", 0x7F), ("fp8", 0xFF)])
def test_codes_that_no_encoder_writes_are_corrupt(name: str, code: int) -> None:
    spec = make_spec()
    assert not try_decode(name, one_encoded(name, spec)[:-1] + bytes([code]), spec)


@pytest.mark.parametrize("name", CODED)
def test_blocks_of_another_spec_are_incompatible(name: str) -> None:
    data = one_encoded(name, make_spec())
    for other in (
        make_spec("float16"),
        make_spec(num_layers=4, head_dim=4),
        make_spec(num_kv_heads=4, head_dim=4),
        make_spec(block_tokens=8, head_dim=4),
        make_spec("float32", head_dim=4),
        make_spec(num_layers=1),
    ):
        with pytest.raises(IncompatibleError, match="another block spec"):
            try_decode(name, data, other)


def test_blocks_of_another_codec_or_version_are_incompatible() -> None:
    spec = make_spec()
    for name, other in itertools.permutations(CODED, 2):
        with pytest.raises(IncompatibleError, match="another codec"):
            try_decode(other, one_encoded(name, spec), spec)
        newer = bytearray(one_encoded(name, spec))
        newer[4] += 1
        with pytest.raises(IncompatibleError, match="another version"):
            try_decode(name, rehashed(bytes(newer)), spec)


@pytest.mark.parametrize("name", CODED)
def test_an_incompatible_block_leaves_every_output_untouched(name: str) -> None:
    spec = make_spec()
    codec = get_codec(name, spec)
    encoded = encode(codec, normal_blocks(2, spec), spec)
    start = int(encoded.offsets[1])
    encoded.buffer[start + 4] += 1
    header = bytes(encoded.buffer[start : start + HEADER])
    encoded.buffer[start : start + HEADER] = np.frombuffer(rehashed(header), np.uint8)
    out = np.full((2, spec.block_bytes), 7, np.uint8)
    with pytest.raises(IncompatibleError, match="block 1"):
        codec.decode(encoded.addrs, encoded.lengths, addresses(out), spec.block_bytes, spec)
    assert (out == 7).all()


@pytest.mark.parametrize("name", codec_names())
def test_one_truncated_block_is_a_miss_for_itself_only(name: str) -> None:
    spec = make_spec()
    codec = get_codec(name, spec)
    encoded = encode(codec, normal_blocks(3, spec), spec)
    lengths = encoded.lengths.copy()
    lengths[1] -= np.uint64(1)
    out = aligned_buffer(3 * spec.block_bytes).reshape(3, -1)
    ok = codec.decode(encoded.addrs, lengths, addresses(out), spec.block_bytes, spec)
    assert ok.tolist() == [True, False, True]
    report = codec.error_report()
    assert (report.blocks_decoded, report.blocks_corrupt) == (2, 1)


def test_codecs_are_found_by_name_and_by_id() -> None:
    spec = make_spec()
    assert codec_names() == ["none", "int8", "fp8", "zstd"]
    for codec_id in CodecId:
        by_name, by_id = get_codec(codec_id.name.lower(), spec), get_codec(int(codec_id), spec)
        assert by_name.id == by_id.id == codec_id
        assert by_name.name == codec_id.name.lower()
        assert by_name.lossy == (by_name.name in LOSSY)


@pytest.mark.parametrize("unknown", ["gzip", "", 4, -1])
def test_an_unknown_codec_is_an_error_that_lists_the_names(unknown: str | int) -> None:
    with pytest.raises(ConfigError, match="none, int8, fp8, zstd"):
        get_codec(unknown, make_spec())


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_codecs_refuse_elements_that_are_not_floats(name: str) -> None:
    with pytest.raises(ConfigError, match="uint8"):
        get_codec(name, make_spec("uint8"))


def test_zstd_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvstore-llm\[zstd\]'"):
        get_codec("zstd", make_spec())


def test_importing_the_module_does_not_import_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.delitem(sys.modules, "kvstore.codec")
    importlib.import_module("kvstore.codec")


def test_one_codec_serves_many_threads() -> None:
    spec = make_spec(block_tokens=16, head_dim=32)
    codecs = {name: get_codec(name, spec) for name in codec_names()}
    wrong: list[str] = []

    def work(seed: int) -> None:
        blocks = normal_blocks(4, spec, seed=seed)
        for name, codec in codecs.items():
            first = decode(codec, encode(codec, blocks, spec), spec.block_bytes, spec)
            again = decode(codec, encode(codec, blocks, spec), spec.block_bytes, spec)
            if not np.array_equal(first, again) or (
                not codec.lossy and not np.array_equal(first, blocks)
            ):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert {codec.error_report().blocks_encoded for codec in codecs.values()} == {32}
