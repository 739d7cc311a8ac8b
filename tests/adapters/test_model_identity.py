"""model_identity: equal where the weights are, whatever the path; different where they are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvstore import ConfigError
from kvstore_adapters.identity import model_identity

TENSOR_BYTES = 3 << 20  # three and more MiB, so that a file's middle is in neither edge
NAMES = ("embed", "layers.0", "layers.1", "norm")


def write_safetensors(path: Path, seed: int, names: tuple[str, ...] = NAMES) -> None:
    """A checkpoint as the format has it: a length, a JSON header, and tensors one after another."""
    header = {"__metadata__": {"format": "pt"}} | {
        name: {
            "dtype": "U8",
            "shape": [TENSOR_BYTES],
            "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES],
        }
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    data = np.random.default_rng(seed).integers(0, 256, len(names) * TENSOR_BYTES, np.uint8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data.tobytes())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "layers": 2}')
    for i in range(2):
        write_safetensors(path / f"model-{i}.safetensors", i)
    return path


def poke(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def begin_of(path: Path, tensor: int) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little") + tensor * TENSOR_BYTES


def test_the_same_weights_in_two_places_are_one_model(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(model, other)
    (other / "README.md").write_text("no weights")
    link = tmp_path / "link"
    link.symlink_to(model)
    assert model_identity(str(model)) == model_identity(str(other)) == model_identity(str(link))
    name, fingerprint = model_identity(str(model))
    assert name == "LlamaForCausalLM"
    assert len(fingerprint) == 32


def test_the_same_path_with_other_weights_is_another_model(model: Path) -> None:
    seen = {model_identity(str(model))}
    first, second = model / "model-0.safetensors", model / "model-1.safetensors"
    changes: list[Callable[[], object]] = [
        lambda: poke(first, begin_of(first, 0)),
        lambda: poke(first, begin_of(first, 1)),  # in the middle of the file: seen by its tensor
        lambda: poke(second, begin_of(second, 2) + 5),
        lambda: poke(second, -1),
        lambda: (model / "config.json").write_text('{"layers": 3}'),
        lambda: write_safetensors(first, 0, (*NAMES[:3], "other")),
        lambda: second.rename(model / "model-2.safetensors"),
        first.unlink,
    ]
    for number, change in enumerate(changes, start=2):
        change()
        seen.add(model_identity(str(model)))
        assert len(seen) == number, f"change {number - 1} was not seen"


@pytest.mark.parametrize("tensor", [3000, 3001, 3007])
def test_of_many_small_tensors_each_counts(tmp_path: Path, tensor: int) -> None:
    count, size = 6000, 8192
    header = {
        f"experts.{i}": {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + count * size)  # zeros that take no room
    before = model_identity(str(tmp_path))
    poke(path, 8 + len(text) + tensor * size)
    assert model_identity(str(tmp_path)) != before


def test_files_of_other_formats_are_sampled_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(np.random.default_rng(1).integers(0, 256, 5 << 20, np.uint8).tobytes())
    before = model_identity(str(path))
    (copied := tmp_path / "other.gguf").write_bytes(path.read_bytes())
    assert model_identity(str(copied)) == before
    poke(path, 5 << 19)
    assert model_identity(str(path)) != before


@pytest.mark.parametrize(
    "damage", [b"", b"\xff" * 40, b"\x10\0\0\0\0\0\0\0{}", (2**63).to_bytes(8, "little") + b"{}"]
)
def test_a_file_that_only_pretends_is_sampled_like_any(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(damage)
    assert model_identity(str(tmp_path))[0] == "local"


def test_a_directory_without_weights_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file of weights"):
        model_identity(str(tmp_path))
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        model_identity(str(tmp_path))


def test_a_hubs_name_stands_for_itself() -> None:
    assert model_identity("no-such-organisation/no-such-model") == (
        "no-such-organisation/no-such-model",
        "",
    )
    assert model_identity("no-such-organisation/no-such-model", "v1.0")[1] == "v1.0"


def test_a_hubs_model_in_the_local_cache_is_known_by_its_commit(
    tmp_path: Path,
) -> None:
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "hub" / "models--org--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    script = (
        "from kvstore_adapters.identity import model_identity\nprint(model_identity('org/name'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    assert found.stdout.decode().strip() == str(("org/name", commit))


def test_a_hundred_gigabytes_are_not_read_whole(tmp_path: Path) -> None:
    """Sparse files: to read them whole would take longer than a test may."""
    write_safetensors(tmp_path / "model-0.safetensors", 0)
    begin = (tmp_path / "model-0.safetensors").read_bytes()[:100_000]
    for i in range(20):
        path = tmp_path / f"model-{i}.safetensors"
        path.write_bytes(begin)
        os.truncate(path, 5 * 10**9)
    before = model_identity(str(tmp_path))
    poke(path, -1)
    assert model_identity(str(tmp_path)) != before
