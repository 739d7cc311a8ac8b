"""What a check of an SSD directory found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Damage:
    """One thing wrong. `segment` and `page` are 0 where it has no place in the log.

    `kind`: index, index_record, namespaces, namespace, header, truncated, missing, foreign,
    summary, disagreement, overlap, payload, unreadable.
    """

    kind: str
    segment: int
    page: int
    detail: str


@dataclass
class SsdReport:
    path: str
    uuid: str
    findings_max: int  # the most that `findings` holds; `damage` counts all
    segments: int = 0
    file_bytes: int = 0
    records: int = 0
    checked_blocks: int = 0
    checked_bytes: int = 0  # as stored
    decoded_blocks: int = 0
    undecoded_blocks: int = 0  # stored checksum only: the codec or namespace is not to be had
    summaries: int = 0
    live_bytes: int = 0  # whole pages
    unreferenced_bytes: int = 0  # in segments, but no record points there
    damage: Counter[str] = field(default_factory=Counter)  # how many, by kind
    findings: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_damaged(self) -> int:
        return sum(self.damage.values())

    def found(self, kind: str, segment: int, page: int, detail: str, times: int = 1) -> None:
        """Count damage, and keep it while there is room."""
        self.damage[kind] += times
        if len(self.findings) < self.findings_max:
            self.findings.append(Damage(kind, segment, page, detail))
