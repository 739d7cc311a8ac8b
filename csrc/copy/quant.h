// Turns raw blocks into their encoded form and back, on the way to SSD and wire.
//
// Encoded form, little-endian: a 64-byte header that says how to decode it, then the body.
//
//    0  "kvcd"            16  u64 encoded bytes, header included   40  u8 shuffle width (zstd)
//    4  u8 version        24  u32 planes (layers * parts)          41  zeros
//    5  u8 codec          28  u32 tokens                           56  u64 FNV-1a of bytes 0..55
//    6  u8 element type   32  u32 heads
//    7  u8 zero           36  u32 head dim
//    8  u64 raw bytes
//
// Body of int8 and fp8: all scales, then all codes in the order of the raw block's elements.
// A scale is a positive normal float32 whose lower 16 bits are zero; the upper 16 are stored. That
// has float32's whole range at float16's size, and a product of scale and code is exact in float32.
//    int8: one scale per (plane, head, channel): the largest magnitude over the tokens / 127,
//          rounded up. code = round(x / scale), in [-127, 127].
//    fp8:  one scale per (plane, head): the smallest power of two that brings the largest magnitude
//          to 448 or less. code = e4m3fn(x / scale), round to nearest even, saturating.
// Body of zstd: one frame, made and read by the caller; the core keeps header and byte shuffle.
// `none` has no encoded form of its own: it is the raw bytes, so that they stay one disk extent.
//
// Trust: encoded bytes may be hostile. Lengths are checked before anything is read, and nothing is
// allocated by what they say. Addresses are the caller's to vouch for.
//
// Thread safety: all functions may be called from any thread; the GIL must not be held.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore {

enum class CodecId : std::uint8_t { kNone = 0, kInt8 = 1, kFp8 = 2, kZstd = 3 };

enum class ElementType : std::uint8_t { kOpaque = 0, kFloat32 = 1, kFloat16 = 2, kBfloat16 = 3 };

// What to make of one block. The first two are for encoding, the others for decoding.
enum class CodecStatus : std::uint8_t {
    kOk = 0,
    kNotFinite = 1,     // the raw block holds NaN or Inf; a lossy code would change its meaning
    kTruncated = 2,     // fewer bytes than the header says, or than a header has
    kBadHeader = 3,     // not a header of ours, or a damaged one
    kBadBody = 4,       // a scale or code that no encoder writes
    kWrongVersion = 5,  // from here on: intact, but not what the caller asked for
    kWrongCodec = 6,
    kWrongSpec = 7,
};

// The instructions that the kernels use. All levels give the same bytes.
enum class Simd : std::uint8_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// Everything that encoder and decoder must agree on; the header is this struct and the length.
struct CodecFormat {
    CodecId codec = CodecId::kNone;
    ElementType element = ElementType::kOpaque;
    std::uint8_t shuffle_width = 0;
    std::uint32_t planes = 0;
    std::uint32_t tokens = 0;
    std::uint32_t heads = 0;
    std::uint32_t dim = 0;
    std::uint64_t raw_bytes = 0;

    std::size_t channels() const { return std::size_t{heads} * dim; }

    friend bool operator==(const CodecFormat &, const CodecFormat &) = default;
};

// Error of a sample of one block's elements: one token of each plane, another in each plane.
struct CodecError {
    double abs_max = 0;
    double error_square_sum = 0;
    double value_square_sum = 0;
    double elements = 0;
};

inline constexpr std::size_t kCodecHeaderBytes = 64;

// 0 for opaque elements.
std::size_t ElementBytes(ElementType element);

// True when counts and raw bytes are within the caps and, for int8 and fp8, fit each other.
bool IsValidFormat(const CodecFormat &format);

// Length of an encoded block, header included. REQUIRES: int8 or fp8, IsValidFormat().
std::uint64_t QuantEncodedBytes(const CodecFormat &format);

// The best level that this machine runs.
Simd BestSimd();

// out[i] <- header and body of raw block raw[i]; statuses[i] is kOk or kNotFinite. A refused block
// leaves zeros where its header would be. errors[i] is set for blocks that are kOk.
// REQUIRES: int8 or fp8; raw[i] aligned to the element; out[i] has room for QuantEncodedBytes();
// simd <= BestSimd().
void QuantEncode(const CodecFormat &format, const std::uint8_t *const *raw, std::size_t n,
                 std::uint8_t *const *out, CodecStatus *statuses, CodecError *errors, Simd simd);

// out[i] <- raw block from lengths[i] bytes at encoded[i]; longer than needed is fine, since disk
// reads are padded. Where statuses[i] is not kOk, out[i] holds nothing of meaning.
// REQUIRES: as QuantEncode, with raw and out exchanged.
void QuantDecode(const CodecFormat &format, const std::uint8_t *const *encoded,
                 const std::uint64_t *lengths, std::size_t n, std::uint8_t *const *out,
                 CodecStatus *statuses, Simd simd);

// Writes the 64 header bytes. `encoded_bytes` counts them.
void WriteCodecHeader(const CodecFormat &format, std::uint64_t encoded_bytes, std::uint8_t *out);

// Compares the header of `length` bytes at `encoded` with `format`. On kOk, *encoded_bytes is at
// least a header and at most `length`.
CodecStatus ReadCodecHeader(const CodecFormat &format, const std::uint8_t *encoded,
                            std::uint64_t length, std::uint64_t *encoded_bytes);

// Groups the first bytes of all `width`-byte elements, then the second ones, and so on: exponents
// end up side by side, which is what makes floats compressible. Undone by UnshuffleBytes.
// REQUIRES: width is 1, 2 or 4 and divides bytes; the buffers do not overlap.
void ShuffleBytes(const std::uint8_t *in, std::size_t bytes, std::size_t width, std::uint8_t *out);
void UnshuffleBytes(const std::uint8_t *in, std::size_t bytes, std::size_t width,
                    std::uint8_t *out);

}  // namespace kvstore
