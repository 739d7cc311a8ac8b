import numpy as np
import numpy.typing as npt

# --- hash
# --- copy
# --- quant
CODEC_HEADER_BYTES: int

class CodecFormat:
    """What encoder and decoder of a block must agree on; immutable."""

    def __init__(
        self,
        *,
        codec: int,
        element: int,
        planes: int,
        tokens: int,
        heads: int,
        dim: int,
        raw_bytes: int,
        shuffle_width: int = 0,
    ) -> None: ...
    @property
    def encoded_bytes(self) -> int: ...

def codec_simd_level() -> int: ...
def codec_encode(
    format: CodecFormat,
    raw_addrs: npt.NDArray[np.uint64],
    out: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.uint64],
    statuses: npt.NDArray[np.uint8],
    errors: npt.NDArray[np.float64],
    simd: int | None = None,
) -> None: ...
def codec_decode(
    format: CodecFormat,
    encoded_addrs: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.uint64],
    out_addrs: npt.NDArray[np.uint64],
    statuses: npt.NDArray[np.uint8],
    simd: int | None = None,
) -> None: ...
def codec_check_headers(
    format: CodecFormat,
    encoded_addrs: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.uint64],
    encoded_bytes: npt.NDArray[np.uint64],
    statuses: npt.NDArray[np.uint8],
) -> None: ...
def codec_write_header(
    format: CodecFormat, out: npt.NDArray[np.uint8], encoded_bytes: int
) -> None: ...
def codec_copy(
    from_addrs: npt.NDArray[np.uint64], to_addrs: npt.NDArray[np.uint64], bytes: int
) -> None: ...
def codec_shuffle(address: int, shuffled: npt.NDArray[np.uint8], width: int) -> None: ...
def codec_unshuffle(shuffled: npt.NDArray[np.uint8], address: int, width: int) -> None: ...

# --- io
# --- policy
# --- core
