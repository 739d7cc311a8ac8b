"""The reference engine's tokens do not change when its KV comes from a GPU's pool, from the arena,
or from another worker's prefill.

On the CPU with host memory for a GPU; with `-m gpu` the engine itself runs on the GPU. The control
zeroes what was loaded, and the tokens change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import kvstore  # noqa: E402
from kvstore.gpu import CudaDevice, Device, HostDevice  # noqa: E402
from kvstore_adapters.reference import checkpoint  # noqa: E402
from kvstore_adapters.reference.gpu_transfer import GpuStoreTransfer  # noqa: E402
from kvstore_adapters.reference.scheduler import Request, WorkerSettings  # noqa: E402
from kvstore_adapters.reference.store_transfer import namespace_of  # noqa: E402
from kvstore_adapters.reference.transfer import KVTransfer  # noqa: E402
from kvstore_adapters.reference.worker import ReferenceWorker  # noqa: E402
from tests.gpu.support import View  # noqa: E402

PAGE_TOKENS = 16
NEW_TOKENS = 12
PREFIX = tuple((7 * i * i + i) % 251 for i in range(200))
PROMPTS = (PREFIX, PREFIX[:130] + tuple(range(60)), tuple(range(5, 100)))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> checkpoint.Checkpoint:
    return checkpoint.make_random(size="nano", seed=3)


class Place:
    """Where engines run, and how their pools are seen."""

    def __init__(self, device: Device, name: str) -> None:
        self.device = device
        self.settings = WorkerSettings(
            page_tokens=PAGE_TOKENS, num_pages=64, batch_tokens_max=96, device=name
        )

    def transfer(self, store: kvstore.Store) -> GpuStoreTransfer:
        if self.settings.device != "cpu":
            return GpuStoreTransfer(store, "4MiB", self.device)
        return GpuStoreTransfer(store, "4MiB", self.device, self.adopted)

    def adopted(self, pool: Any) -> object:
        """A pool in host memory, as if it were on a GPU."""
        assert isinstance(self.device, HostDevice)
        array = pool.view(torch.uint8).numpy().reshape(-1)
        self.device.adopt(array)

        return View(pool.data_ptr(), tuple(pool.shape), "<f4")


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no GPU")
        device: CudaDevice = request.getfixturevalue("gpu")
        yield Place(device, "cuda")
    else:
        yield Place(HostDevice(), "cpu")


@pytest.fixture
def store(model: checkpoint.Checkpoint) -> Iterator[kvstore.Store]:
    with kvstore.open(namespace_of(model, PAGE_TOKENS), cpu="8MiB") as store:
        yield store


def generate(
    model: checkpoint.Checkpoint,
    place: Place,
    transfer: KVTransfer | None,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int = NEW_TOKENS,
) -> list[list[int]]:
    worker = ReferenceWorker(model, place.settings, transfer)
    tokens: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        worker.add_request(Request(str(index), prompt, new_tokens))
        tokens.append([])
        while worker.has_work:
            tokens[-1] += [output.token_id for output in worker.step()]
    return tokens


def test_tokens_are_those_of_a_run_without_store(
    model: checkpoint.Checkpoint, place: Place, store: kvstore.Store
) -> None:
    expected = generate(model, place, None, PROMPTS)
    cold = place.transfer(store)
    # The second time from the pool, the third from the arena.
    assert generate(model, place, cold, PROMPTS * 2) == expected * 2
    num_warm = sum(len(prompt) // PAGE_TOKENS for prompt in PROMPTS)
    assert cold.counters.hit_cpu_blocks == num_warm + 130 // PAGE_TOKENS
    cold.close()
    warm = place.transfer(store)
    assert generate(model, place, warm, PROMPTS) == expected
    assert warm.counters.hit_cpu_blocks == num_warm
    warm.close()
    assert cold.counters.errors == warm.counters.errors == 0


@pytest.mark.parametrize("zeroed", [False, True])
def test_one_worker_prefills_and_another_decodes(
    model: checkpoint.Checkpoint, place: Place, store: kvstore.Store, zeroed: bool
) -> None:
    expected = generate(model, place, None, PROMPTS[:1])[0]
    prefill = place.transfer(store)
    first = generate(model, place, prefill, PROMPTS[:1], 1)[0]
    prefill.close()
    decode = place.transfer(store)
    worker = ReferenceWorker(model, place.settings, decode)
    if zeroed:
        real = decode.load

        def load(request_id: str, token_ids: Sequence[int], pages: Sequence[int]) -> Any:
            pending = real(request_id, token_ids, pages)
            pending.wait()
            decode._pool[list(pages)] = 0
            return pending

        decode.load = load  # type: ignore[method-assign]
    worker.add_request(Request("0", PROMPTS[0], NEW_TOKENS, tuple(first)))
    tokens = list(first)
    while worker.has_work:
        tokens += [output.token_id for output in worker.step()]
    assert decode.counters.hit_cpu_blocks == len(PREFIX) // PAGE_TOKENS
    assert (tokens == expected) is not zeroed
    decode.close()
