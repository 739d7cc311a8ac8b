"""A tiered KV-cache store for LLM inference.

import numpy as np
import kvstore

spec = kvstore.BlockSpec(num_layers=28, num_kv_heads=8, head_dim=128, block_tokens=16)
with kvstore.open("qwen3-0.6b", spec=spec, cpu="1GiB") as store:
    hashes = kvstore.hash_blocks(token_ids, block_tokens=16)
    blocks = kvstore.ContiguousBlocks(kv)        # or PagedBuffers for an engine's own layout
    store.put(hashes, blocks)
    num_loaded = store.load(hashes, blocks).wait().num_blocks
"""

from kvstore.block import BlockHash, BlockHashes, BlockSpec, Namespace
from kvstore.certificates import TlsFiles
from kvstore.config import StoreConfig, default_address, load_config
from kvstore.errors import (
    ConfigError,
    CorruptError,
    DeadlineExceededError,
    GpuError,
    IncompatibleError,
    InUseError,
    KVStoreError,
    OutOfSpaceError,
    PeerUnavailableError,
    StorageError,
    StoreClosedError,
)
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored
from kvstore.hashing import PrefixHasher, hash_blocks
from kvstore.layout import AxisTensor, BlockBuffers, ContiguousBlocks, PagedBuffers
from kvstore.lease import Lease
from kvstore.opening import connect, share
from kvstore.opening import open_store as open
from kvstore.pieces import PieceBuffers
from kvstore.reservation import Reservation
from kvstore.store import BlockInfo, Hit, Store
from kvstore.transfer import Transfer, TransferResult

__all__ = [
    "AllBlocksCleared",
    "AxisTensor",
    "BlockBuffers",
    "BlockHash",
    "BlockHashes",
    "BlockInfo",
    "BlockRemoved",
    "BlockSpec",
    "BlockStored",
    "ConfigError",
    "ContiguousBlocks",
    "CorruptError",
    "DeadlineExceededError",
    "GpuError",
    "Hit",
    "InUseError",
    "IncompatibleError",
    "KVStoreError",
    "Lease",
    "Namespace",
    "OutOfSpaceError",
    "PagedBuffers",
    "PeerUnavailableError",
    "PieceBuffers",
    "PrefixHasher",
    "Reservation",
    "StorageError",
    "Store",
    "StoreClosedError",
    "StoreConfig",
    "TlsFiles",
    "Transfer",
    "TransferResult",
    "connect",
    "default_address",
    "hash_blocks",
    "load_config",
    "open",
    "share",
]
