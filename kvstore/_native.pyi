from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# --- hash
def hash_blocks(
    token_ids: list[int] | tuple[int, ...] | npt.NDArray[Any],
    block_tokens: int,
    parent: bytes | None,
    extra_keys: Sequence[bytes | None] | None,
    algorithm: str,
) -> npt.NDArray[np.uint8]: ...
def hash_chain_root(algorithm: str) -> bytes: ...
def cbor(value: tuple[Any, ...]) -> bytes: ...
def blake3(data: bytes, key: bytes | None = None) -> bytes: ...
def sha256(data: bytes) -> bytes: ...
def set_hash_simd_limit(level: int) -> None: ...

# --- copy
# --- quant
# --- io
# --- policy
# --- core
