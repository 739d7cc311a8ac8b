"""What a model is, for the Namespace: two engines share blocks only where their weights are equal.

A name of a hub stands for itself and its commit. A local directory stands for its content: the same
path with other weights is another model, and the same weights in two places are one. Weights are
not read whole, that would take minutes; see `_sample_file`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kvstore import ConfigError

_CONFIGS = ("config.json", "params.json")  # of Hugging Face, and of Mistral's own format
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_EDGE_BYTES = 1 << 20
_SAMPLE_BYTES = 4096
_SAMPLES_MAX = 4096  # of all files: a cold NVMe reads so many in a third of a second
# Of all files: the beginning of every tensor of the largest mixtures of experts, as who trains a
# few experts changes few tensors. A cold NVMe reads so many in ten seconds, and few have them.
_TENSORS_MAX = 1 << 17
_HEADER_BYTES_MAX = 100 << 20  # what the format allows


def model_identity(path_or_id: str, revision: str | None = None) -> tuple[str, str]:
    """Return a model's name and revision, equal where the weights are.

    Args:
        path_or_id: a directory, a file of weights, or a hub's "organisation/name".
        revision: of the hub: a branch, tag or commit; None: its default branch.

    Raises:
        ConfigError: a path that holds no weights, or cannot be read.
    """
    path = Path(path_or_id)
    if path.exists():
        try:
            return _architecture(path), fingerprint(path)
        except OSError as error:
            raise ConfigError(
                f"model: cannot read {error.filename or path_or_id}: {error.strerror}"
            ) from error
    return path_or_id, _commit_of(path_or_id, revision) or revision or ""


def _architecture(path: Path) -> str:
    """Return a name for people: the path's own would tell apart what the weights do not."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        config = json.loads((path / _CONFIGS[0]).read_bytes())
        return str(config["architectures"][0])
    return "local"


def fingerprint(path: Path) -> str:
    """Return 32 hexadecimal digits for the weights and configuration at `path`.

    Two checkpoints with one fingerprint that differ are possible only where they have the same
    tensors, and differ nowhere where samples are taken: not at the beginning of a tensor, nor in
    the first and last MiB of a file.

    Raises:
        ConfigError: there are no weights. OSError: a file cannot be read.
    """
    digest = hashlib.sha256(b"kvstore model fingerprint 1\0")
    files = [path] if path.is_file() else _weight_files(path)
    if not files:
        raise ConfigError(f"model: {path} has no file of weights ({', '.join(_WEIGHTS)})")
    if path.is_dir():
        for name in _CONFIGS:
            with contextlib.suppress(FileNotFoundError):
                _add(digest, name.encode(), (path / name).read_bytes())
    for file in files:
        # The name is left out of a single file's: it is where it lies that differs.
        _add(digest, file.name.encode() if len(files) > 1 else b"")
        _sample_file(digest, file, len(files))
    return digest.hexdigest()[:32]


def _weight_files(directory: Path) -> list[Path]:
    found = sorted(file for file in directory.iterdir() if file.suffix in _WEIGHTS)
    # Where there are both, engines read safetensors.
    safe = [file for file in found if file.suffix == ".safetensors"]
    return safe or found


def _sample_file(digest: Any, path: Path, num_files: int) -> None:
    """Add a file's size, its first and last MiB, and for safetensors its header and the beginning
    of its tensors; of other files, samples at even distances."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        samples_max = max(16, _SAMPLES_MAX // num_files)
        _add(digest, size.to_bytes(8, "little"), _read(file, 0, _EDGE_BYTES))
        _add(digest, _read(file, max(0, size - _EDGE_BYTES), _EDGE_BYTES))
        offsets = list(range(0, size, max(1, size // samples_max)))
        if path.suffix == ".safetensors":
            header = _header(file, size)
            _add(digest, header)
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                offsets = sorted(_tensor_offsets(header))
                samples_max = max(16, _TENSORS_MAX // num_files)
        step = -(-len(offsets) // samples_max) or 1
        for offset in offsets[::step]:
            _add(digest, _read(file, offset, _SAMPLE_BYTES))


def _header(file: BinaryIO, size: int) -> bytes:
    """Return the JSON that a safetensors file begins with; empty where it is no such file."""
    length = int.from_bytes(_read(file, 0, 8), "little")
    return _read(file, 8, length) if length <= min(size - 8, _HEADER_BYTES_MAX) else b""


def _tensor_offsets(header: bytes) -> Iterator[int]:
    for name, tensor in json.loads(header).items():
        if name != "__metadata__":
            yield 8 + len(header) + int(tensor["data_offsets"][0])


def _read(file: BinaryIO, offset: int, count: int) -> bytes:
    return os.pread(file.fileno(), count, offset)


def _add(digest: Any, *parts: bytes) -> None:
    """Add parts such that no other parts make the same bytes."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _commit_of(model_id: str, revision: str | None) -> str:
    """Return the commit of a hub's model that lies in the local cache; "" when none does."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return ""
    try:
        found = try_to_load_from_cache(model_id, "config.json", revision=revision)
    except (ValueError, OSError):  # no name of the hub
        return ""
    # .../models--org--name/snapshots/COMMIT/config.json
    return Path(found).parent.name if isinstance(found, str) else ""
