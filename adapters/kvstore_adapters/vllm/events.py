"""KV events of what the connector saved, for routers that index by them.

A block counts as stored once every rank has it in the store. That the store evicted one is not told
here: the daemon serves all engines of its host, and tells of evictions by its own events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_events import MEDIUM_CPU, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvstore_adapters.planning.groups import Group
from kvstore_adapters.planning.pins import EndedSave
from kvstore_adapters.planning.plan import BlockMove, SaveJob

_HASH_BYTES = 32


@dataclass(slots=True)
class _Source:
    """What an event says of a request besides its blocks."""

    token_ids: Sequence[int]
    lora_name: str | None


class SaveEvents:
    """Events of saves that ended, until they are taken. Used by the scheduler's thread only."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = {group.group_id: group for group in groups}
        self._sources: dict[int, _Source] = {}  # by job
        self._events: list[BlockStored] = []

    def planned(self, job: SaveJob, request: Any) -> None:
        """Keep what events of this job will say; the request may be gone by then."""
        ends = [
            (move.first + len(move)) * self._groups[move.group_id].block_tokens
            for move in job.moves
        ]
        lora = request.lora_request
        self._sources[job.job_id] = _Source(
            request.all_token_ids[: max(ends)], lora.lora_name if lora else None
        )

    def ended(self, save: EndedSave) -> None:
        source = self._sources.pop(save.job.job_id, None)
        left = save.num_stored
        for move in save.job.moves:
            count = min(left, len(move))
            left -= count
            # Blocks of a window with others between them have no tokens in a row to tell.
            if source is not None and count and move.is_linked:
                self._events.append(self._event(move, count, source))

    def _event(self, move: BlockMove, count: int, source: _Source) -> BlockStored:
        tokens = self._groups[move.group_id].block_tokens
        joined = move.hashes
        hashes: Any = [
            maybe_convert_block_hash(joined[at : at + _HASH_BYTES])
            for at in range(0, count * _HASH_BYTES, _HASH_BYTES)
        ]
        parent: Any = maybe_convert_block_hash(move.parent) if move.parent is not None else None
        return BlockStored(
            block_hashes=hashes,
            parent_block_hash=parent,
            token_ids=list(source.token_ids[move.first * tokens : (move.first + count) * tokens]),
            block_size=tokens,
            lora_id=None,
            medium=MEDIUM_CPU,
            lora_name=source.lora_name,
            group_idx=move.group_id,
        )

    def take(self) -> list[BlockStored]:
        events, self._events = self._events, []
        return events
