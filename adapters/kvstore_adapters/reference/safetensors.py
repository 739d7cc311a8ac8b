"""Read and write safetensors files.

The format (github.com/huggingface/safetensors, README, "Format"): u64 little-endian header length,
a JSON object `{name: {dtype, shape, data_offsets}}`, then the tensors' bytes. Everything in the
header is checked before it is used; a file that is cut short or is something else raises
IncompatibleError and names what is wrong.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any, TypeGuard

import torch

from kvstore.errors import ConfigError, IncompatibleError

HEADER_BYTES_MAX = 100 << 20  # the limit that the format itself sets
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the file, copied out, so that the file may change or go away afterwards."""
    try:
        with path.open("rb") as file:
            header = _read_header(path, file.read(8), file)
            if not header:
                return {}
            # A private mapping is writable for torch, which warns of read-only buffers; the file
            # never is.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
                return {name: _copy(mapped, *where) for name, where in header.items()}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned in a mapping
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(bytes_of(tensor))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


_Where = tuple[torch.dtype, list[int], int, int]  # dtype, shape, first byte in the file, bytes


def _read_header(path: Path, prefix: bytes, file: Any) -> dict[str, _Where]:
    size = path.stat().st_size
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(HEADER_BYTES_MAX, size - 8):
        raise IncompatibleError(f"{path} is not a safetensors file, or is cut short in its header")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise IncompatibleError(f"{path}: the header is not JSON") from error
    if not isinstance(header, dict):
        raise IncompatibleError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    data = 8 + length
    return {name: _check(path, name, entry, data, size - data) for name, entry in header.items()}


def _check(path: Path, name: str, entry: Any, data: int, data_bytes: int) -> _Where:
    def refuse(why: str) -> IncompatibleError:
        return IncompatibleError(f"{path}: tensor {name!r}: {why}")

    if not isinstance(entry, dict):
        raise refuse("not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise refuse("shape or data_offsets is not a list of non-negative integers")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise refuse(f"bytes {begin}..{end} lie outside the file's {data_bytes} (cut short?)")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise refuse(f"shape {shape} of {dtype} does not fill bytes {begin}..{end}")
    return DTYPES[dtype], shape, data + begin, end - begin


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _copy(
    mapped: mmap.mmap, dtype: torch.dtype, shape: list[int], offset: int, size: int
) -> torch.Tensor:
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=offset)
    return raw.clone().view(dtype).view(shape)
