"""What names a block and what shape it has: BlockSpec, Namespace and BlockHashes.

A block is found by (namespace, block hash). The Namespace holds everything besides the tokens that
must match for the bytes to be reusable; a BlockHash covers the tokens and all blocks before them.
All three types are values: immutable, and safe to share between threads.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, asdict, dataclass, fields
from functools import cached_property
from typing import Any, Final, NewType, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError, IncompatibleError

BlockHash = NewType("BlockHash", bytes)
HashArray: TypeAlias = npt.NDArray[np.uint8]

HASH_BYTES: Final = 32
# What `hash_blocks` computes; and what else may name a namespace's blocks: SGLang's own chain (with
# its seeds and pairs of tokens), or 32 bytes that the caller answers for.
CHAIN_ALGORITHMS: Final = ("blake3", "sha256", "vllm_sha256", "vllm_sha256_cbor")
HASH_ALGORITHMS: Final = (*CHAIN_ALGORITHMS, "sglang_sha256", "external")
DTYPE_BYTES: Final = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3": 1,
    "int8": 1,
    "uint8": 1,  # what engines call the bytes of a KV cache that they quantised themselves
}
BLOCK_KINDS: Final = ("kv", "latent")

# Part of every description, so that a later, different one is refused and not misread.
_NAMESPACE_VERSION: Final = 1


def _check_count(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name}: need an int, got {value!r}")
    if value < minimum:
        raise ConfigError(f"{name}: {value} is below {minimum}")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(choices)}")


def _check_text(name: str, value: object, *, may_be_empty: bool) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name}: need a str, got {value!r}")
    if not value and not may_be_empty:
        raise ConfigError(f"{name}: must not be empty")


@dataclass(frozen=True)
class BlockSpec:
    """The shape of a block: `block_tokens` tokens of all layers of one model shard.

    Kind "kv" has a K and a V part per layer. Kind "latent" (MLA) has one part: a vector of
    `head_dim` per token, with `num_kv_heads` 1.

    Raises:
        ConfigError: a field is wrong; the message names it.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    kind: str = "kv"

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_tokens"):
            _check_count(name, getattr(self, name), 1)
        _check_choice("dtype", self.dtype, tuple(DTYPE_BYTES))
        _check_choice("kind", self.kind, BLOCK_KINDS)
        if self.kind == "latent" and self.num_kv_heads != 1:
            raise ConfigError(f"num_kv_heads: a latent block has 1, got {self.num_kv_heads}")

    @classmethod
    def of_bytes(cls, num_bytes: int) -> "BlockSpec":
        """Blocks of `num_bytes` opaque bytes: for engines that keep their inside to themselves.

        Raises:
            ConfigError: `num_bytes` is no positive int.
        """
        _check_count("num_bytes", num_bytes, 1)
        return cls(1, 1, num_bytes, 1, "uint8", "latent")

    @property
    def num_parts(self) -> int:
        """Parts per layer: 2 for K and V, 1 for a latent."""
        return 2 if self.kind == "kv" else 1

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of a block, all parts."""
        row_bytes = self.num_kv_heads * self.head_dim * self.dtype_bytes
        return self.num_parts * self.block_tokens * row_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.num_layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers and parts."""
        return self.block_bytes // self.block_tokens


@dataclass(frozen=True)
class Namespace:
    """Everything besides the tokens that must match for a block's bytes to be reusable.

    `salt` separates tenants. It is taken in as its hash, `salt_digest`, and not kept, so it shows
    in no description, log or file; who knows a description can still test a guess, so a salt that
    must stay secret has to be long and random.

    Raises:
        ConfigError: a field is wrong; the message names it.
    """

    model: str
    spec: BlockSpec
    revision: str = ""
    layout: str = "canonical-1"
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    lora: str = ""
    salt: InitVar[bytes] = b""
    hash_algorithm: str = "blake3"
    salt_digest: str = ""

    @classmethod
    def of(
        cls, namespace: "Namespace | BlockSpec | str", spec: BlockSpec | None = None
    ) -> "Namespace":
        """Return a namespace from one, from a BlockSpec alone, or from a model's name and `spec`.

        Raises:
            ConfigError: a name without a spec.
        """
        if isinstance(namespace, Namespace):
            return namespace
        if isinstance(namespace, BlockSpec):
            return cls(model="unnamed", spec=namespace)
        if spec is None:
            raise ConfigError(f"spec: the name {namespace!r} does not say what its blocks are")
        return cls(model=namespace, spec=spec)

    def __post_init__(self, salt: bytes) -> None:
        _check_text("model", self.model, may_be_empty=False)
        _check_text("revision", self.revision, may_be_empty=True)
        _check_text("layout", self.layout, may_be_empty=False)
        _check_text("lora", self.lora, may_be_empty=True)
        if not isinstance(self.spec, BlockSpec):
            raise ConfigError(f"spec: need a BlockSpec, got {self.spec!r}")
        for axis in ("tp", "pp"):
            rank, size = getattr(self, f"{axis}_rank"), getattr(self, f"{axis}_size")
            _check_count(f"{axis}_size", size, 1)
            _check_count(f"{axis}_rank", rank, 0)
            if rank >= size:
                raise ConfigError(f"{axis}_rank: {rank} is not below {axis}_size {size}")
        _check_choice("hash_algorithm", self.hash_algorithm, HASH_ALGORITHMS)
        self._take_salt(salt)

    def _take_salt(self, salt: bytes) -> None:
        if not isinstance(salt, bytes):
            raise ConfigError(f"salt: need bytes, got {type(salt).__name__}")
        _check_text("salt_digest", self.salt_digest, may_be_empty=True)
        if salt:
            digest = hashlib.sha256(b"kvstore namespace salt\0" + salt).hexdigest()
            if self.salt_digest not in ("", digest):
                raise ConfigError("salt_digest: is not the digest of salt; give one of the two")
            object.__setattr__(self, "salt_digest", digest)
        elif self.salt_digest and (
            len(self.salt_digest) != 64 or set(self.salt_digest) - set("0123456789abcdef")
        ):
            raise ConfigError("salt_digest: need 64 lower-case hexadecimal digits")

    def describe(self) -> dict[str, Any]:
        """This namespace as plain JSON types, without the salt."""
        return {"version": _NAMESPACE_VERSION, **asdict(self)}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Namespace":
        """The namespace that `describe` described, with the same digest.

        Raises:
            IncompatibleError: a description of another version.
            ConfigError: a value in it is wrong.
        """
        if not isinstance(description, dict) or description.get("version") != _NAMESPACE_VERSION:
            raise IncompatibleError(f"not a namespace description of version {_NAMESPACE_VERSION}")
        values = {name: value for name, value in description.items() if name != "version"}
        _check_fields("namespace", values, {field.name for field in fields(cls)})
        spec = values.pop("spec")
        _check_fields("spec", spec, {field.name for field in fields(BlockSpec)})
        return cls(spec=BlockSpec(**spec), **values)

    def canonical(self) -> bytes:
        """The same bytes for equal namespaces, in every process and release of this version."""
        text = json.dumps(self.describe(), sort_keys=True, separators=(",", ":"))
        return text.encode("ascii")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of `canonical()`: the namespace's name wherever 32 bytes are wanted."""
        return hashlib.sha256(self.canonical()).digest()


def _check_fields(what: str, values: object, expected: set[str]) -> None:
    if not isinstance(values, dict) or set(values) != expected:
        found = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise IncompatibleError(f"{what} description has {found}, not {sorted(expected)}")


class BlockHashes:
    """Hashes of consecutive blocks, with what is known of where in their chain they stand.

    `array` is (n, 32) uint8, C-contiguous and read-only. `start` is the position of the first hash
    in its chain, -1 when unknown. `parent` is the hash before the first: None at the root of a
    chain, and also None when nothing is known. At start 0 a parent is the chain's own root value
    (say a vLLM seed of one's own), not a block.

    Equality compares the hashes only: a chained hash already stands for everything before it.

    The constructor takes its arguments as they are; `of` and `chain` check and convert.
    """

    __slots__ = ("array", "parent", "start")
    __hash__ = None  # type: ignore[assignment]

    array: HashArray
    start: int
    parent: bytes | None

    def __init__(self, array: HashArray, start: int = -1, parent: bytes | None = None) -> None:
        self.array = array
        self.start = start
        self.parent = parent

    @classmethod
    def of(cls, hashes: "HashesLike") -> "BlockHashes":
        """`hashes` itself if it is BlockHashes already, else unlinked: with no known lineage.

        A writable array is copied, so that later writes to it do not reach the result.

        Raises:
            ValueError: an element is not 32 bytes, or the array is not (n, 32) uint8.
        """
        if isinstance(hashes, BlockHashes):
            return hashes
        return cls(_as_hash_array(hashes))

    @classmethod
    def chain(
        cls, hashes: "HashesLike", start: int = 0, parent: bytes | None = None
    ) -> "BlockHashes":
        """Say that `hashes` follow one another in a chain, the first at `start`, after `parent`.

        Raises:
            ValueError: as for `of`; or `start` is negative, or above 0 without a parent.
        """
        if start < 0:
            raise ValueError(f"start: {start} is negative")
        if start > 0 and parent is None:
            raise ValueError("parent: a chain that does not start at 0 needs the hash before it")
        if parent is not None and len(parent) != HASH_BYTES:
            raise ValueError(f"parent: has {len(parent)} bytes, not {HASH_BYTES}")
        array = hashes.array if isinstance(hashes, BlockHashes) else _as_hash_array(hashes)
        return cls(array, start, parent)

    @property
    def linked(self) -> bool:
        """True when the position in the chain is known."""
        return self.start >= 0

    @property
    def last(self) -> bytes | None:
        """The last hash; `parent` if there are none. What the next block is chained to."""
        return self.array[-1].tobytes() if len(self.array) else self.parent

    def after(self) -> "BlockHashes":
        """The empty piece just behind this one."""
        count = len(self.array)
        return BlockHashes(self.array[count:], _moved(self.start, count), self.last)

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[BlockHash]:
        joined = self.array.tobytes()
        for offset in range(0, len(joined), HASH_BYTES):
            yield BlockHash(joined[offset : offset + HASH_BYTES])

    @overload
    def __getitem__(self, index: int) -> BlockHash: ...
    @overload
    def __getitem__(self, index: slice) -> "BlockHashes": ...
    def __getitem__(self, index: int | slice) -> "BlockHash | BlockHashes":
        array = self.array
        if not isinstance(index, slice):
            return BlockHash(array[index].tobytes())
        begin, end, step = index.indices(len(array))
        if step != 1:
            picked = array[index].copy()
            picked.flags.writeable = False
            return BlockHashes(picked)
        parent = array[begin - 1].tobytes() if begin else self.parent
        return BlockHashes(array[begin : max(begin, end)], _moved(self.start, begin), parent)

    def __add__(self, other: "BlockHashes") -> "BlockHashes":
        """The two pieces as one.

        Raises:
            ValueError: they are linked and `other` does not follow on this one.
        """
        if not isinstance(other, BlockHashes):
            return NotImplemented
        if self.linked or other.linked:
            follows = other.start == _moved(self.start, len(self)) and other.parent == self.last
            if not (self.linked and follows):
                raise ValueError("these hashes do not follow on one another in a chain")
        array = np.concatenate((self.array, other.array))
        array.flags.writeable = False
        return BlockHashes(array, self.start, self.parent)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockHashes):
            return NotImplemented
        return np.array_equal(self.array, other.array)

    def hex(self) -> list[str]:
        """Every hash as 64 hexadecimal digits."""
        return [block_hash.hex() for block_hash in self]

    def __repr__(self) -> str:
        where = f"start={self.start}" if self.linked else "unlinked"
        first = self.array[0].tobytes().hex()[:16] + "..." if len(self) else ""
        return f"BlockHashes({len(self)}, {where}, [{first}])"


HashesLike: TypeAlias = BlockHashes | HashArray | Sequence[bytes]


def _moved(start: int, count: int) -> int:
    return start + count if start >= 0 else -1


def _as_hash_array(hashes: HashArray | Sequence[bytes]) -> HashArray:
    if isinstance(hashes, np.ndarray):
        if hashes.dtype != np.uint8 or hashes.ndim != 2 or hashes.shape[1] != HASH_BYTES:
            raise ValueError(
                f"hashes: need (n, {HASH_BYTES}) uint8, got {hashes.shape} {hashes.dtype}"
            )
        if hashes.flags.c_contiguous and not hashes.flags.writeable:
            return hashes
        array = np.array(hashes, order="C")
        array.flags.writeable = False
        return array
    if isinstance(hashes, bytes | bytearray | str):
        raise ValueError("hashes: need a sequence of hashes, got one string of bytes")
    if set(map(len, hashes)) - {HASH_BYTES}:
        wrong = next(i for i, value in enumerate(hashes) if len(value) != HASH_BYTES)
        raise ValueError(f"hashes[{wrong}]: has {len(hashes[wrong])} bytes, not {HASH_BYTES}")
    return np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, HASH_BYTES)
