"""Chain: the hashes of one request, which grow while it generates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore import BlockHashes, ConfigError

from .groups import Group

_HASH_BYTES: Final = 32
_ROOM_MIN: Final = 64  # hashes; small prompts then grow through one allocation


class Chain:
    """Hashes of consecutive pieces of `hash_tokens` tokens, each of everything before it.

    A block of a group of k * hash_tokens tokens is named by the hash of its last piece, number
    (i + 1) * k - 1. Blocks of full attention know their chain, as each is stored after the one
    before it. Blocks of a window do not: those before the window need not be stored.

    Thread safety: one thread extends; others may read meanwhile and see a prefix. Slices handed
    out before stay valid.
    """

    __slots__ = ("_array", "_length", "hash_tokens")

    def __init__(self, hash_tokens: int) -> None:
        if hash_tokens < 1:
            raise ConfigError(f"hash_tokens: {hash_tokens} is not positive")
        self.hash_tokens = hash_tokens
        self._array: npt.NDArray[np.uint8] = np.empty((0, _HASH_BYTES), dtype=np.uint8)
        self._length = 0  # written last: readers take it first

    def __len__(self) -> int:
        return self._length

    def extend(self, hashes: Sequence[bytes]) -> None:
        """Append what `hashes`, the whole list so far, has beyond the hashes that are known.

        Where an engine took back its last tokens and went on otherwise, this chain does so too.

        Raises:
            ConfigError: a hash is not 32 bytes; none is appended.
        """
        self._follow(hashes)
        known, count = self._length, len(hashes)
        if count <= known:
            return
        fresh = hashes[known:] if known else hashes
        if set(map(len, fresh)) != {_HASH_BYTES}:
            wrong = next(len(value) for value in fresh if len(value) != _HASH_BYTES)
            raise ConfigError(f"block hash: has {wrong} bytes, not {_HASH_BYTES}")
        rows = np.frombuffer(b"".join(fresh), dtype=np.uint8).reshape(-1, _HASH_BYTES)
        if known == 0:
            self._array = rows  # no room to grow: most prompts only ever grow by what they generate
        else:
            if count > len(self._array) or not self._array.flags.writeable:
                grown = np.empty((max(2 * count, _ROOM_MIN), _HASH_BYTES), dtype=np.uint8)
                grown[:known] = self._array[:known]
                self._array = grown
            self._array[known:count] = rows
        self._length = count

    def _follow(self, hashes: Sequence[bytes]) -> None:
        """Forget the hashes behind the last that `hashes` has too. As each stands for all before
        it, one look is enough where nothing was taken back."""
        same = min(self._length, len(hashes))
        array = self._array
        while same and hashes[same - 1] != array[same - 1].tobytes():
            same -= 1
        if same < self._length:
            self._length = same
            self._array = array[:same]  # what was handed out before is not written to again

    def num_blocks(self, group: Group) -> int:
        """How many blocks of `group` have a known hash."""
        return self._length // self._pieces(group)

    def blocks(self, group: Group, begin: int, end: int) -> BlockHashes:
        """The names of the group's blocks begin, begin + 1, ..., end - 1.

        REQUIRES: 0 <= begin <= end <= num_blocks(group).
        """
        pieces = self._pieces(group)
        if not 0 <= begin <= end <= self._length // pieces:
            raise IndexError(f"blocks {begin}..{end} of {self._length // pieces}")
        array = self._array
        rows = array[begin * pieces + pieces - 1 : end * pieces : pieces]
        if pieces > 1:
            rows = rows.copy()
        rows.flags.writeable = False
        if group.kind != "full":
            return BlockHashes(rows)
        parent = array[begin * pieces - 1].tobytes() if begin else None
        return BlockHashes(rows, begin, parent)

    def names(self, group: Group, begin: int, end: int) -> tuple[bytes, bytes | None]:
        """The same as `blocks` as plain bytes: the joined hashes, and the one before where linked.

        REQUIRES: 0 <= begin <= end <= num_blocks(group).
        """
        pieces = self._pieces(group)
        if not 0 <= begin <= end <= self._length // pieces:
            raise IndexError(f"blocks {begin}..{end} of {self._length // pieces}")
        array = self._array
        joined = array[begin * pieces + pieces - 1 : end * pieces : pieces].tobytes()
        has_parent = begin and group.kind == "full"
        return joined, array[begin * pieces - 1].tobytes() if has_parent else None

    def last_of(self, tokens: int) -> bytes:
        """The hash of the first `tokens` tokens, which are whole pieces, at least one."""
        return bytes(self._array[tokens // self.hash_tokens - 1])

    def _pieces(self, group: Group) -> int:
        pieces, rest = divmod(group.block_tokens, self.hash_tokens)
        if rest:
            raise ConfigError(
                f"block_tokens: {group.block_tokens} of group {group.group_id} are no multiple of "
                f"the {self.hash_tokens} tokens of a hash"
            )
        return pieces
