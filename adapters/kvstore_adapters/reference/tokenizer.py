"""Text to token ids: the checkpoint's own tokenizer, or plain bytes where it has none.

`write` puts the byte tokenizer's own files beside a random checkpoint, for engines that insist on
a tokenizer in the form of Hugging Face's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from kvstore import ConfigError, IncompatibleError

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


def write(directory: Path) -> None:
    """Write tokenizer.json and its configuration: ids as those of ByteTokenizer.

    It is a byte-level BPE that merges nothing. Chat messages are strung together without roles:
    a random model tells no difference.
    """
    specials = {"<s>": BEGIN_ID, "</s>": END_ID}
    letters = {letter: byte for byte, letter in enumerate(_byte_letters())}
    added = [
        {"id": number, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for text, number in specials.items()
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    _dump(
        directory / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {**level, "use_regex": False},
            "decoder": {**level, "use_regex": False},
            "model": {"type": "BPE", "vocab": letters | specials, "merges": []},
        },
    )
    _dump(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
        },
    )


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: printable bytes are themselves,
    the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n")
