"""Quarantine: slots that a broken link may still write to.

A network card may go on with a read that we gave up, until its link is closed and flushed. Until
then the slots stay reserved: nobody else gets them, and what was whole of the piece is published
only afterwards.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from kvstore.peers.slots import Piece, Slots
from kvstore.peers.sources import Unsettled

_TRY_SECONDS = 0.25  # for one link; others wait meanwhile
_PAUSE_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class _SetAside:
    piece: Piece
    slots: Slots
    unsettled: Unsettled


class Quarantine:
    """Thread-safe: `_changed` guards all fields. A thread is there while anything is in it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pieces: list[_SetAside] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def num_bytes(self) -> int:
        with self._changed:
            return sum(len(one.piece.ok) * one.slots.block_bytes for one in self._pieces)

    def add(self, piece: Piece, slots: Slots, unsettled: Unsettled) -> None:
        """Take over a piece: it is ended once nothing can write to it any more."""
        with self._changed:
            self._pieces.append(_SetAside(piece, slots, unsettled))
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(
                    target=self._run, name="kvstore-peer-quarantine", daemon=True
                )
                self._thread.start()

    def close(self, timeout: float) -> bool:
        """Wait for what can be settled; return whether that is all. What is not stays reserved for
        as long as this process uses the arena."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        while self._sweep(max(0.0, min(_TRY_SECONDS, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
        return True

    def _sweep(self, seconds: float) -> bool:
        """Try each; return whether any is left."""
        with self._changed:
            pieces = list(self._pieces)
        for one in pieces:
            if one.unsettled.settle(seconds):
                with self._changed:
                    if one not in self._pieces:
                        continue  # another thread was first
                    self._pieces.remove(one)
                one.slots.end(one.piece)
        with self._changed:
            return bool(self._pieces)

    def _run(self) -> None:
        while True:
            self._sweep(_TRY_SECONDS)
            with self._changed:
                if not self._pieces or self._closed:
                    self._thread = None
                    return
                self._changed.wait(_PAUSE_SECONDS)
