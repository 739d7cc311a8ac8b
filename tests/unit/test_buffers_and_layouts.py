"""Proves that foreign memory is described without a copy, and that what cannot be a block is an
error naming the tensor and the axis: every accepted kind of object, then every refusal."""

from __future__ import annotations

import array
import gc
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.buffers import HostBuffer
from kvstore.errors import ConfigError
from kvstore.layout import AxisTensor, ContiguousBlocks, PagedBuffers

SPEC = BlockSpec(2, 3, 4, 5, "float16")
LATENT = BlockSpec(
    num_layers=2, num_kv_heads=1, head_dim=8, block_tokens=5, dtype="float16", kind="latent"
)


def zeros(*shape: int, dtype: Any = np.float16) -> Any:
    return np.zeros(shape, dtype)


class TestHostBuffer:
    def test_numpy_arrays_keep_their_strides(self) -> None:
        source = zeros(6, 4)[::2, 1:]
        buffer = HostBuffer.of(source)
        assert buffer.address == source.ctypes.data
        assert (buffer.shape, buffer.strides) == ((3, 3), (16, 2))
        assert (buffer.itemsize, buffer.dtype, buffer.readonly) == (2, "float16", False)
        assert not buffer.is_contiguous()
        assert buffer.is_contiguous(1)
        assert buffer.size_bytes == 18
        assert HostBuffer.of(buffer) is buffer

    @pytest.mark.parametrize("make", [bytearray, lambda n: memoryview(bytearray(n))])
    def test_writable_bytes(self, make: Callable[[int], Any]) -> None:
        source = make(8)
        buffer = HostBuffer.of(source, writable=True)
        assert (buffer.shape, buffer.dtype) == ((8,), "uint8")
        np.frombuffer(source, np.uint8)[3] = 7
        assert _native.checksum(buffer.address, 8) == _native.xxh3(source)

    def test_objects_with_the_buffer_protocol(self) -> None:
        assert HostBuffer.of(array.array("f", [1, 2])).dtype == "float32"
        with mmap.mmap(-1, 4096) as memory:
            buffer = HostBuffer.of(memory)
            assert (buffer.size_bytes, buffer.readonly) == (4096, False)
            del buffer
            gc.collect()

    def test_objects_with_the_array_interface(self) -> None:
        source = zeros(2, 3)

        class Holder:
            __array_interface__ = source.__array_interface__

        assert HostBuffer.of(Holder()).address == source.ctypes.data

    @pytest.mark.parametrize("source", [b"abcd", memoryview(b"abcd")])
    def test_read_only_memory_is_no_destination(self, source: Any) -> None:
        assert HostBuffer.of(source).readonly
        with pytest.raises(ConfigError, match="pool: read-only"):
            HostBuffer.of(source, "pool", writable=True)

    def test_read_only_numpy_array_is_no_destination(self) -> None:
        source = zeros(4)
        source.flags.writeable = False
        with pytest.raises(ConfigError, match="read-only"):
            HostBuffer.of(source, writable=True)

    @pytest.mark.parametrize("source", [None, 5, [1, 2], "text", np.array([object()])])
    def test_objects_without_memory_are_refused(self, source: Any) -> None:
        with pytest.raises(ConfigError, match="pool: "):
            HostBuffer.of(source, "pool")

    def test_memory_outlives_its_first_owner(self) -> None:
        buffer = HostBuffer.of(np.arange(1 << 16, dtype=np.uint8))
        gc.collect()
        assert _native.checksum(buffer.address, buffer.size_bytes) == _native.xxh3(
            np.arange(1 << 16, dtype=np.uint8)
        )


class FakeTensor:
    """A producer that only says where it is."""

    def __init__(self, device: tuple[int, int], **answers: Any) -> None:
        self._device = device
        self._answers = answers

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **_: Any) -> Any:
        return self._answers["capsule"]


class OldTensor:
    """A producer from before DLPack 1.0: no max_version, an unversioned capsule."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __dlpack_device__(self) -> Any:
        return self._source.__dlpack_device__()

    def __dlpack__(self) -> Any:
        return self._source.__dlpack__()


class TestDlpack:
    @pytest.mark.parametrize(
        ("device", "name"), [((2, 1), "cuda:1"), ((99, 0), "device type 99:0")]
    )
    def test_other_devices_are_named(self, device: tuple[int, int], name: str) -> None:
        with pytest.raises(ConfigError, match=f"pool: is on {name}"):
            HostBuffer.of(FakeTensor(device), "pool")

    def test_objects_that_are_no_capsules_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="pool: FakeTensor exports no memory"):
            HostBuffer.of(FakeTensor((1, 0), capsule="no"), "pool")
        with pytest.raises(TypeError, match="capsule"):
            _native.dlpack_describe(None)

    def test_unversioned_capsules(self) -> None:
        source = zeros(2, 3)
        buffer = HostBuffer.of(OldTensor(source))
        assert (buffer.address, buffer.strides) == (source.ctypes.data, (6, 2))

    def test_capsule_of_another_consumer_stays_usable(self) -> None:
        source = np.arange(6.0)
        capsule = source.__dlpack__()
        assert _native.dlpack_describe(capsule)[0] == source.ctypes.data
        assert _native.dlpack_describe(capsule)[0] == source.ctypes.data

    def test_torch_tensors_of_types_that_numpy_cannot_name(self) -> None:
        torch = pytest.importorskip("torch")
        for dtype in ("bfloat16", "float8_e4m3fn", "float16", "uint8"):
            tensor = torch.zeros((4, 3, 2), dtype=getattr(torch, dtype))[1:, :, :1]
            buffer = HostBuffer.of(tensor, writable=True)
            assert buffer.address == tensor.data_ptr()
            assert buffer.dtype == dtype
            assert buffer.itemsize == tensor.element_size()
            assert buffer.strides == tuple(s * buffer.itemsize for s in tensor.stride())

    def test_torch_tensors_that_cannot_be_exported(self) -> None:
        torch = pytest.importorskip("torch")
        for tensor in (torch.zeros(3, device="meta"), torch.zeros(3, requires_grad=True)):
            with pytest.raises(ConfigError, match="pool: Tensor exports no memory"):
                HostBuffer.of(tensor, "pool")

    def test_bfloat16_blocks_round_trip(self) -> None:
        torch = pytest.importorskip("torch")
        spec = BlockSpec(2, 3, 4, 5, "bfloat16")
        layers = [torch.randn(2, 6, 5, 3, 4).bfloat16() for _ in range(2)]
        buffers = PagedBuffers.vllm_nhd(layers, spec)
        out = torch.zeros((2, spec.block_bytes), dtype=torch.uint8)
        addrs = np.array([out[0].data_ptr(), out[1].data_ptr()], np.uint64)
        _native.gather(buffers.plan, np.array([5, 0]), addrs)
        expected = torch.stack([layer[:, [5, 0]] for layer in layers]).permute(2, 0, 1, 3, 4, 5)
        assert torch.equal(out.view(torch.bfloat16), expected.reshape(2, -1))
        old = [layer.clone() for layer in layers]
        for layer in layers:
            layer[:, [5, 0]] = 0
        _native.scatter(buffers.plan, np.array([5, 0]), addrs)
        assert all(torch.equal(a, b) for a, b in zip(layers, old, strict=True))


def nhd(*shape: int, dtype: Any = np.float16) -> list[Any]:
    return [zeros(*shape, dtype=dtype) for _ in range(2)]


class TestRefusedLayouts:
    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: PagedBuffers.vllm_nhd([], SPEC), "layer axis has 0 layers, expected 2"),
            (lambda: PagedBuffers.vllm_nhd(nhd(3, 4, 5, 3, 4), SPEC), "part axis has size 3"),
            (lambda: PagedBuffers.vllm_nhd(nhd(2, 4, 6, 3, 4), SPEC), "token axis has size 6"),
            (lambda: PagedBuffers.vllm_nhd(nhd(2, 4, 5, 2, 4), SPEC), "head axis has size 2"),
            (lambda: PagedBuffers.vllm_nhd(nhd(2, 4, 5, 3, 5), SPEC), "dim axis has size 5"),
            (lambda: PagedBuffers.vllm_nhd(nhd(2, 0, 5, 3, 4), SPEC), "block axis is missing"),
            (lambda: PagedBuffers.vllm_nhd(nhd(2, 4, 5, 3), SPEC), "has 4 dimensions"),
            (
                lambda: PagedBuffers.vllm_nhd(nhd(2, 4, 5, 3, 4, dtype=np.float32), SPEC),
                r"layers\[0\]: elements have 4 bytes \(float32\), expected 2 \(float16\)",
            ),
            (
                lambda: PagedBuffers.vllm_nhd(
                    nhd(2, 4, 5, 3, 4, dtype=np.float16), BlockSpec(2, 3, 4, 5, "bfloat16")
                ),
                "dtype is float16, expected bfloat16",
            ),
            (
                lambda: PagedBuffers.vllm_nhd([zeros(2, 4, 5, 3, 4), zeros(2, 3, 5, 3, 4)], SPEC),
                r"layers\[1\]: block axis has 3 blocks, expected 4",
            ),
            (
                lambda: PagedBuffers.reference(
                    np.broadcast_to(zeros(1, 2, 2, 5, 3, 4), (9, 2, 2, 5, 3, 4)), SPEC
                ),
                "block axis has a stride of 0",
            ),
            (
                lambda: PagedBuffers.vllm_nhd([zeros(2, 4, 5, 3, 4)] * 2, SPEC),
                "overlap in engine memory",
            ),
            (lambda: PagedBuffers.sglang_layer_first(zeros(2, 2, 11, 3, 4), SPEC), "slot axis"),
            (lambda: PagedBuffers.sglang_mla(zeros(2, 10, 2, 8), LATENT), "expected 1"),
            (lambda: PagedBuffers.vllm_views(nhd(4, 3, 5, 4), SPEC), "kv axis has size 4"),
            (lambda: PagedBuffers.sglang_pools([], [], SPEC), "keys: layer axis has 0 layers"),
            (lambda: PagedBuffers.vllm_mla(nhd(4, 5, 4), SPEC), "has no head axis"),
            (lambda: PagedBuffers.strided([], SPEC), "at least one"),
            (
                lambda: PagedBuffers.strided([AxisTensor(zeros(2, 3), ("block", "depth"))], SPEC),
                "axis 'depth' is unknown",
            ),
            (
                lambda: PagedBuffers.strided([AxisTensor(zeros(2, 3), ("block", "block"))], SPEC),
                "given twice",
            ),
            (
                lambda: PagedBuffers.strided(
                    [AxisTensor(zeros(4, 5, 3, 4), ("block", "token", "head", "dim"), 2, 0)], SPEC
                ),
                "layer 2 is outside",
            ),
            (
                lambda: PagedBuffers.strided(
                    [AxisTensor(zeros(4, 5, 3, 4), ("block", "token", "head", "dim"), 0, 0)], SPEC
                ),
                "are in no run",
            ),
            (lambda: PagedBuffers.opaque([], "x"), "at least one"),
            (lambda: PagedBuffers.opaque([zeros(2, 3)], "canonical"), "cannot name a private"),
            (lambda: PagedBuffers.opaque([zeros(2, 0)], "x"), "holds no blocks"),
            (lambda: PagedBuffers.opaque([zeros(2, 3), zeros(3, 3)], "x"), "expected 2"),
            (lambda: PagedBuffers.opaque([zeros(2, 6)[:, ::2]], "x"), "not contiguous"),
            (lambda: ContiguousBlocks(zeros(2, 6)[:, ::2]), "not contiguous"),
            (lambda: ContiguousBlocks(zeros(0, 6)), "at least one block"),
            (lambda: ContiguousBlocks(np.zeros(())), "at least one block"),
            (
                lambda: ContiguousBlocks(np.broadcast_to(zeros(6), (3, 6))),
                "neighbouring blocks overlap",
            ),
        ],
    )
    def test_the_axis_is_named(self, build: Callable[[], object], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            build()

    def test_integer_views_of_the_elements_are_accepted(self) -> None:
        layers = nhd(2, 4, 5, 3, 4, dtype=np.uint16)
        assert PagedBuffers.vllm_nhd(layers, SPEC).num_blocks == 4

    def test_vllm_layout_name_is_checked_against_the_strides(self) -> None:
        memory = zeros(4, 2, 5, 3, 8)  # BLNHC
        views = list(memory.transpose(1, 0, 3, 2, 4))
        assert PagedBuffers.vllm_views(views, SPEC, "BLNHC").plan.num_blocks == 4
        for name, axes in (("LBNHC", None), ("BLHNC", "H outside of N"), ("BHLNC", "H outside")):
            if axes is None:
                PagedBuffers.vllm_views(views, SPEC, name)
            else:
                with pytest.raises(ConfigError, match=axes):
                    PagedBuffers.vllm_views(views, SPEC, name)
        with pytest.raises(ConfigError, match="not one of"):
            PagedBuffers.vllm_views(views, SPEC, "NHD")


class TestOpaque:
    def test_a_block_is_each_tensors_bytes_in_turn(self) -> None:
        rng = np.random.default_rng(0)
        first = rng.integers(0, 256, (4, 3, 7), dtype=np.uint8)
        memory = rng.integers(0, 256, (4, 2, 33), dtype=np.uint8)
        second = memory[:, 1]  # rows with a gap between blocks
        third = rng.integers(0, 256, (4, 5, 6), dtype=np.uint8).transpose(0, 2, 1)
        buffers = PagedBuffers.opaque([first, second, third], "vllm-cpu")
        assert (buffers.layout, buffers.block_bytes) == ("vllm-cpu", 21 + 33 + 30)
        out = np.zeros(84, np.uint8)
        _native.gather(buffers.plan, np.array([2]), np.array([out.ctypes.data], np.uint64))
        expected = (first[2].tobytes(), second[2].tobytes(), third.transpose(0, 2, 1)[2].tobytes())
        assert out.tobytes() == b"".join(expected)


class TestIds:
    def setup_method(self) -> None:
        self.buffers = ContiguousBlocks(zeros(4, 6))

    def test_sequences_and_integer_arrays_are_taken(self) -> None:
        for ids in ([3, 0], (3, 0), np.array([3, 0], np.int32), np.array([3, 9, 0], np.uint8)[::2]):
            taken = self.buffers.validate_ids(ids)
            assert taken.dtype == np.int64
            assert taken.tolist() == [3, 0]
        assert self.buffers.validate_ids([]).tolist() == []

    def test_wrong_ids_are_named(self) -> None:
        with pytest.raises(IndexError, match="block id 4 is out of range"):
            self.buffers.validate_ids([0, 4, 5])
        with pytest.raises(IndexError, match="block id -1"):
            self.buffers.validate_ids([-1])
        with pytest.raises(IndexError, match=str((1 << 64) - 1)):
            self.buffers.validate_ids(np.array([(1 << 64) - 1], np.uint64))
        with pytest.raises(TypeError, match="float64"):
            self.buffers.validate_ids([0.5])
        with pytest.raises(TypeError, match="bool"):
            self.buffers.validate_ids([True])
        with pytest.raises(ValueError, match="one dimension"):
            self.buffers.validate_ids([[0]])
