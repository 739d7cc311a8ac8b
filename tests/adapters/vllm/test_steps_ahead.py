"""Random runs with a scheduler that plans a step before the one before has ended, as on GPUs.

Two instances share a store: prompts with common beginnings, pools too small for all, preemption,
aborts, chunked prompts, blocks that go between lookup and load, one to two ranks, full and window
groups. Every step compares what it rests on (`instance.py`); in the end no block, request or
transfer is left.
"""

from __future__ import annotations

import collections
import hashlib
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what vLLM imports
    pytest.importorskip("vllm.v1.worker.utils")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request, RequestStatus

from kvstore.bench.serving import PrivateDaemon
from tests.adapters.vllm import instance
from tests.adapters.vllm.configs import full, window
from tests.adapters.vllm.instance import BLOCK, END_OF_PROMPT, Instance, prompt

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(120),
]

GROUPS: list[list[Any]] = [[full()], [full(), window(2 * BLOCK + 16)], [window(3 * BLOCK)]]


class AheadInstance(Instance):
    """Its steps run at once, and the scheduler hears of them a step late."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(instance, "Scheduler", AsyncScheduler)
            super().__init__(*arguments, **options)
        self._unheard: collections.deque[tuple[Any, Any]] = collections.deque()

    def step(self) -> Any:
        output = self.scheduler.schedule()
        results = [self._on_rank(rank, output) for rank in range(len(self.workers))]
        self._unheard.append((output, self.aggregator.aggregate(results)))
        keep = 1 if output.total_num_scheduled_tokens else 0
        while len(self._unheard) > keep:
            self.scheduler.update_from_output(*self._unheard.popleft())
        return output

    def value(self, rank: int, group_id: int, request: Request, end: int) -> float:
        # The last tokens may not be known yet, and are what the model always says.
        tokens = [*request.all_token_ids, *[END_OF_PROMPT] * end][:end]
        said = (rank, group_id, tokens)
        return float(int(hashlib.sha256(repr(said).encode()).hexdigest()[:5], 16))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateDaemon]:
    with PrivateDaemon(tmp_path_factory.mktemp("daemon"), cpu="64MiB", chunk="1MiB") as served:
        served.start()
        yield served


@pytest.mark.parametrize("seed", range(9))
def test_nothing_wrong_is_loaded_or_saved_and_nothing_is_left(
    model: Path, daemon: PrivateDaemon, seed: int
) -> None:
    pick = random.Random(seed)
    specs = GROUPS[seed % len(GROUPS)]
    budget = pick.choice([48, 128, 1024])
    num_ranks = pick.choice([1, 2])

    def ahead(config: Any) -> None:
        config.scheduler_config.async_scheduling = True
        config.scheduler_config.max_num_batched_tokens = budget

    pair = [
        AheadInstance(
            model,
            daemon.address,
            name=f"ahead {seed}",
            specs=specs,
            num_ranks=num_ranks,
            num_blocks=pick.choice([14, 20]) * len(specs),
            max_pinned_fraction=pick.choice([0.2, 1.0]),
            alter=ahead,
        )
        for _ in range(2)
    ]
    try:
        for number in range(100):
            _disturb(pick, pick.choice(pair), f"r{number}")
        for one in pair:
            one.settle()
            assert one.free_blocks == one.all_blocks
            assert not one.connector._scheduler._requests
            assert not one.connector._scheduler._planner._requests
    finally:
        for one in pair:
            one.close()


def _disturb(pick: random.Random, one: AheadInstance, name: str) -> None:
    """A step, and maybe something that happens before it."""
    requests = one.scheduler.requests
    if pick.random() < 0.35 and len(requests) < 6:
        tokens = prompt(pick.choice([20, 64, 96, 100, 150, 250]), seed=pick.randrange(3))
        if pick.random() < 0.3:
            tokens[pick.randrange(len(tokens))] = 252
        one.add(name, tokens, max_tokens=pick.choice([1, 2, 40, 70]))
    if pick.random() < 0.05 and requests:
        one.scheduler.finish_requests(pick.choice(list(requests)), RequestStatus.FINISHED_ABORTED)
    if pick.random() < 0.08 and requests:
        hashes = requests[pick.choice(list(requests))].block_hashes
        for store in one.stores(pick.randrange(len(one.workers))).values():
            store.remove(hashes[pick.randrange(len(hashes) + 1) :])
    one.step()
