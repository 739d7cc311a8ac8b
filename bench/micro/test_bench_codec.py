"""What do the codecs cost beside a memcpy of the same raw blocks, and what do they save and lose?

    python -m pytest bench/micro/test_bench_codec.py --benchmark-enable

A group is one direction, dtype and kind of data; its `memcpy` row is the yardstick, and the figure
in brackets behind each time is the ratio to the fastest row. `extra_info` in the JSON output has
compression ratio, error and raw bytes per round. Data: `normal` is plain noise; `kv` has channels
of very different sizes, a few of them large outliers in K, as models' key caches do.
"""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.codec import aligned_buffer, get_codec

BLOCKS = 16
CODECS = ["memcpy", "int8", "fp8", "zstd"]


def make_blocks(spec: BlockSpec, kind: str) -> torch.Tensor:
    """Blocks of 1 MiB (2 MiB for float32)."""
    random = np.random.default_rng(0)
    parts = (spec.num_layers, spec.num_parts)
    channels = (*parts, 1, spec.num_kv_heads, spec.head_dim)
    values = random.normal(
        0, 1, (BLOCKS, *parts, spec.block_tokens, spec.num_kv_heads, spec.head_dim)
    )
    if kind == "kv":
        size = np.exp(random.normal(0, 1, channels))
        mean = random.normal(0, 1, channels) * size
        outliers = random.random(channels) < 0.02
        mean[:, 0] *= np.where(outliers[:, 0], 10, 1)  # K: steady outlier channels
        mean[:, 1] *= 0.1  # V: nearly centred
        values = mean + 0.5 * size * values
    return torch.from_numpy(values).to(getattr(torch, spec.dtype)).contiguous()


def addresses(blocks: torch.Tensor, spec: BlockSpec) -> npt.NDArray[np.uint64]:
    return (np.arange(BLOCKS) * spec.block_bytes + blocks.data_ptr()).astype(np.uint64)


@pytest.mark.parametrize("kind", ["kv", "normal"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", CODECS)
def test_codec_beside_memcpy(
    benchmark: BenchmarkFixture, name: str, direction: str, dtype: str, kind: str
) -> None:
    spec = BlockSpec(num_layers=16, num_kv_heads=8, head_dim=128, block_tokens=16, dtype=dtype)
    benchmark.group = f"{direction} {BLOCKS} blocks, {dtype}, {kind}"
    blocks = make_blocks(spec, kind)
    back = torch.zeros_like(blocks)
    raw, out = addresses(blocks, spec), addresses(back, spec)
    if name == "memcpy":
        benchmark(_native.codec_copy, raw, out, spec.block_bytes)
        return
    codec = get_codec(name, spec)
    buffer = aligned_buffer(BLOCKS * codec.max_encoded_bytes(spec.block_bytes, spec))
    buffer[:] = 0  # pages are there before the clock starts
    encoded = codec.encode(raw, spec.block_bytes, spec, buffer)
    if direction == "encode":
        benchmark(codec.encode, raw, spec.block_bytes, spec, buffer)
    else:
        benchmark(
            codec.decode, encoded.addrs, encoded.lengths, out, spec.block_bytes, spec, strict=True
        )
    report = codec.error_report()
    benchmark.extra_info["raw_bytes"] = BLOCKS * spec.block_bytes
    benchmark.extra_info["compression_ratio"] = report.ratio
    benchmark.extra_info["error_rms_relative"] = report.error_rms_relative
    benchmark.extra_info["error_abs_max"] = report.error_abs_max
