"""Text to token ids: the checkpoint's own tokenizer, or plain bytes where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from kvstore.errors import ConfigError, IncompatibleError

BEGIN_ID = 256
END_ID = 257


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """Ids 0-255 are the UTF-8 bytes; a text begins with BEGIN_ID."""

    def encode(self, text: str) -> list[int]:
        return [BEGIN_ID, *text.encode()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json, read by the `tokenizers` package."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as HubTokenizer
        except ImportError as error:
            raise ConfigError(
                f"{path} needs the tokenizers package: pip install tokenizers"
            ) from error
        try:
            self._inner: Any = HubTokenizer.from_str(path.read_text())
        except Exception as error:  # the package raises no narrower type
            raise IncompatibleError(f"{path}: not a tokenizer that can be read: {error}") from error

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._inner.decode(list(token_ids)))


def load(directory: Path | None) -> Tokenizer:
    if directory is not None and (directory / "tokenizer.json").exists():
        return FileTokenizer(directory / "tokenizer.json")
    return ByteTokenizer()
