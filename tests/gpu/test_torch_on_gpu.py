"""On a GPU, with torch: the tier against torch's own indexing, bit for bit, in the order of torch's
streams; and that torch's expandable segments are refused by name. All of it needs a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore import BlockSpec, Namespace
from kvstore.gpu import CudaDevice, DeviceBlocks
from kvstore.gpu.copies import ArenaCopies, Way
from kvstore.gpu.registration import HostRegistration
from kvstore.gpu_tier import GpuTier
from kvstore.transport import SharedMemory
from tests.gpu.support import WAIT_S, finish, u64
from tests.store_support import chain

pytestmark = pytest.mark.gpu
SPEC = BlockSpec(8, 8, 128, 16, "bfloat16")
PAGES = 64


@pytest.fixture
def torch(gpu: CudaDevice) -> Any:
    found: Any = pytest.importorskip("torch")
    if not found.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return found


def pools(torch: Any, layout: str) -> list[Any]:
    heads, dim, tokens = SPEC.num_kv_heads, SPEC.head_dim, SPEC.block_tokens
    shapes = {
        "vllm_nhd": (2, PAGES, tokens, heads, dim),
        "vllm_hnd": (2, PAGES, heads, tokens, dim),
        "vllm_blocks_first": (PAGES, 2, tokens, heads, dim),
    }
    return [
        torch.randn(shapes[layout], device="cuda").to(torch.bfloat16)
        for _ in range(SPEC.num_layers)
    ]


def canonical(torch: Any, layout: str, layers: list[Any], ids: Any) -> Any:
    """By torch: [block, layer, part, token, head, dim] as bytes."""
    order = {
        "vllm_nhd": (1, 0, 2, 3, 4),
        "vllm_hnd": (1, 0, 3, 2, 4),
        "vllm_blocks_first": (0, 1, 2, 3, 4),
    }[layout]
    chosen = torch.as_tensor(np.asarray(ids), device="cuda")
    stacked = torch.stack([layer.permute(*order)[chosen] for layer in layers], 1)
    return stacked.contiguous().view(torch.uint8).reshape(len(ids), -1).cpu().numpy()


@pytest.fixture
def copies(gpu: CudaDevice) -> Iterator[ArenaCopies]:
    made = ArenaCopies(gpu, 8 << 20)
    yield made
    made.close()


@pytest.mark.parametrize("way", [None, *Way])
@pytest.mark.parametrize("layout", ["vllm_nhd", "vllm_hnd", "vllm_blocks_first"])
def test_blocks_are_those_that_torch_indexes(
    gpu: CudaDevice, torch: Any, copies: ArenaCopies, layout: str, way: Way | None
) -> None:
    layers = pools(torch, layout)
    blocks = DeviceBlocks.paged(gpu, layout, layers, SPEC)
    ids = np.random.default_rng(0).permutation(PAGES)[:24]
    arena = SharedMemory(len(ids) * SPEC.block_bytes)
    host = HostRegistration(gpu, arena.array)
    addresses = u64(arena.address + SPEC.block_bytes * np.arange(len(ids)))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in layers:
            layer.add_(1)  # on the stream, and not waited for: the copy must come after
    copies.to_host(blocks, ids, host, addresses, stream.cuda_stream, way=way)
    finish(gpu.record(stream.cuda_stream))
    got = arena.array.reshape(len(ids), -1)
    assert np.array_equal(got, canonical(torch, layout, layers, ids))

    back = [torch.zeros_like(layer) for layer in layers]
    others = DeviceBlocks.paged(gpu, layout, back, SPEC)
    torch.cuda.synchronize()
    copies.from_host(others, ids, host, addresses, stream.cuda_stream, way=way)
    finish(gpu.record(stream.cuda_stream))
    assert np.array_equal(canonical(torch, layout, back, ids), got)
    rest = sorted(set(range(PAGES)) - set(ids.tolist()))
    assert not canonical(torch, layout, back, rest).any()
    host.close()
    blocks.close()
    others.close()


def test_a_tier_with_torchs_memory_and_streams(gpu: CudaDevice, torch: Any) -> None:
    layers = pools(torch, "vllm_nhd")
    hashes = chain(1, 40)
    stream = torch.cuda.Stream()
    with kvstore.open(Namespace("model", SPEC), cpu="64MiB") as store:
        tier = GpuTier(store.control, gpu, 32 * SPEC.block_bytes)
        blocks = DeviceBlocks.paged(gpu, "vllm_nhd", layers, SPEC)
        want = canonical(torch, "vllm_nhd", layers, range(40))
        saved = tier.put(hashes, blocks, range(40), stream=stream.cuda_stream)
        with torch.cuda.stream(stream):
            for layer in layers:
                layer.zero_()  # after the put, on its stream
        assert saved.wait(WAIT_S).num_stored == 40
        ids = range(63, 23, -1)
        came = tier.load(hashes, blocks, ids, stream=stream.cuda_stream)
        assert came.wait(WAIT_S).num_blocks == 40
        assert np.array_equal(canonical(torch, "vllm_nhd", layers, ids), want)
        assert tier.close(WAIT_S)
        blocks.close()


def test_expandable_segments_of_torch_are_refused_by_name(gpu: CudaDevice, torch: Any) -> None:
    script = (
        "import torch\n"
        "from kvstore import GpuError\n"
        "from kvstore.transport import Endpoint, TransportSettings\n"
        "tensor = torch.zeros(1 << 22, dtype=torch.uint8, device='cuda')\n"
        "with Endpoint(TransportSettings(movers=('cuda',))) as ours:\n"
        "    try:\n"
        "        ours.register((tensor.data_ptr(), tensor.nbytes))\n"
        "    except GpuError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert "expandable_segments" in done.stdout
