#include "copy/quant.h"

#include <cstring>
#include <initializer_list>
#include <vector>

#include "core/check.h"

// The kernels are plain loops that compilers vectorise. Each is forced inline into one function per
// instruction level, so one source gives all levels (and NEON, where that is the baseline), and no
// level can give other bytes than another: no code depends on a sum of products, which some fuse.
#define KV_INLINE inline __attribute__((always_inline))

namespace kvstore {
namespace {

constexpr std::uint8_t kVersion = 1;
constexpr std::uint8_t kMagic[4] = {'k', 'v', 'c', 'd'};
constexpr std::size_t kHashOffset = 56;
constexpr std::uint64_t kChannelsMax = std::uint64_t{1} << 24;  // bounds the scratch memory
constexpr std::uint64_t kRawBytesMax = std::uint64_t{1} << 40;

constexpr std::uint32_t kMinScaleBits = 0x00800000;  // 2^-126: its inverse is normal as well
constexpr std::uint16_t kScaleUpperMin = 0x0080;
constexpr std::uint16_t kScaleUpperMax = 0x7f7f;

KV_INLINE std::uint32_t BitsOf(float value) { return __builtin_bit_cast(std::uint32_t, value); }
KV_INLINE float FloatOf(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

// The lesser of two, and one of two, in integers: where floats are compared or computed under a
// condition, compilers assume that they may trap, and do not vectorise.
KV_INLINE std::uint32_t Least(std::uint32_t a, std::uint32_t b) { return a < b ? a : b; }
KV_INLINE std::uint32_t Choose(bool condition, std::uint32_t a, std::uint32_t b) {
    const std::uint32_t mask = 0 - std::uint32_t{condition};
    return (a & mask) | (b & ~mask);
}

// Drops `shift` bits of a positive number, rounding to nearest even.
KV_INLINE std::uint32_t RoundShift(std::uint32_t bits, int shift) {
    return (bits + ((std::uint32_t{1} << (shift - 1)) - 1) + ((bits >> shift) & 1)) >> shift;
}

// The element types. Bits of a magnitude order as the magnitudes do, with Inf and NaN on top.
// FromFloat takes finite values and saturates, so a decoded block never has an Inf the raw block
// had not. None of the conversions relies on subnormal float32 arithmetic, which a process may have
// switched off.

struct Float32 {
    using Bits = std::uint32_t;
    static constexpr Bits kMagnitude = 0x7fffffff;
    static constexpr Bits kInfinity = 0x7f800000;
    static KV_INLINE float ToFloat(Bits bits) { return FloatOf(bits); }
    static KV_INLINE Bits FromFloat(float value) {
        const std::uint32_t bits = BitsOf(value);
        return Least(bits & kMagnitude, 0x7f7fffff) | (bits & 0x80000000u);
    }
};

struct Bfloat16 {
    using Bits = std::uint16_t;
    static constexpr Bits kMagnitude = 0x7fff;
    static constexpr Bits kInfinity = 0x7f80;
    static KV_INLINE float ToFloat(Bits bits) { return FloatOf(std::uint32_t{bits} << 16); }
    static KV_INLINE Bits FromFloat(float value) {
        const std::uint32_t bits = BitsOf(value);
        const std::uint32_t magnitude = Least(bits & 0x7fffffffu, 0x7f7f0000);
        return static_cast<Bits>(RoundShift(magnitude, 16) | ((bits >> 16) & 0x8000u));
    }
};

struct Float16 {
    using Bits = std::uint16_t;
    static constexpr Bits kMagnitude = 0x7fff;
    static constexpr Bits kInfinity = 0x7c00;
    static KV_INLINE float ToFloat(Bits bits) {
        const std::uint32_t magnitude = bits & 0x7fffu;
        const std::uint32_t normal = (magnitude << 13) + (112u << 23);
        const std::uint32_t subnormal =
            BitsOf(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
        const std::uint32_t sign = (std::uint32_t{bits} & 0x8000u) << 16;
        return FloatOf(Choose(magnitude < 0x400, subnormal, normal) | sign);
    }
    static KV_INLINE Bits FromFloat(float value) {
        const std::uint32_t bits = BitsOf(value);
        const std::uint32_t magnitude = Least(bits & 0x7fffffffu, BitsOf(65504.0f));
        const std::uint32_t normal = RoundShift(magnitude, 13) - (112u << 10);
        // Adding 0.5 leaves the value in units of 2^-24, float16's smallest, in the lower bits.
        const std::uint32_t subnormal = BitsOf(FloatOf(magnitude) + 0.5f) - BitsOf(0.5f);
        const std::uint32_t half = Choose(magnitude < BitsOf(0x1p-14f), subnormal, normal);
        return static_cast<Bits>(half | ((bits >> 16) & 0x8000u));
    }
};

// The quantisers. SetScales gets the largest magnitude of each channel and gives the scale and its
// inverse for each channel, and the scales to store.

struct Int8 {
    static constexpr bool kScalePerChannel = true;

    static KV_INLINE std::uint8_t Encode(float scaled) {
        // |scaled| is at most 127 and a rounding error, for scales are rounded up.
        const int rounded = static_cast<int>(__builtin_rintf(scaled));
        return static_cast<std::uint8_t>(static_cast<std::int8_t>(rounded));
    }
    static KV_INLINE float Decode(std::uint8_t code) {
        return static_cast<float>(static_cast<std::int8_t>(code));
    }
    static KV_INLINE bool IsInvalid(std::uint8_t code) { return code == 0x80; }

    template <class Element>
    static KV_INLINE void SetScales(const typename Element::Bits *__restrict largest, std::size_t,
                                    std::size_t channels, float *__restrict scales,
                                    float *__restrict inverses, std::uint16_t *__restrict stored) {
        for (std::size_t c = 0; c < channels; ++c) {
            const std::uint32_t exact = BitsOf(Element::ToFloat(largest[c]) / 127.0f);
            const std::uint32_t up = (exact + 0xffffu) & 0xffff0000u;
            const std::uint32_t bits = up < kMinScaleBits ? kMinScaleBits : up;
            scales[c] = FloatOf(bits);
            inverses[c] = 1.0f / FloatOf(bits);
            stored[c] = static_cast<std::uint16_t>(bits >> 16);
        }
    }
};

struct Fp8 {
    static constexpr bool kScalePerChannel = false;

    static KV_INLINE std::uint8_t Encode(float scaled) {
        const std::uint32_t bits = BitsOf(scaled);
        const std::uint32_t magnitude = bits & 0x7fffffffu;
        const std::uint32_t normal = RoundShift(magnitude, 20) - (120u << 3);
        // Adding 2^14 leaves the value in units of 2^-9, e4m3's smallest, in the lower bits.
        const std::uint32_t subnormal = BitsOf(FloatOf(magnitude) + 0x1p14f) - BitsOf(0x1p14f);
        const std::uint32_t code = Choose(magnitude < BitsOf(0x1p-6f), subnormal, normal);
        return static_cast<std::uint8_t>(Least(code, 0x7e) | ((bits >> 24) & 0x80u));
    }
    static KV_INLINE float Decode(std::uint8_t code) {
        const std::uint32_t magnitude = code & 0x7fu;
        const std::uint32_t normal = (magnitude << 20) + (120u << 23);
        const std::uint32_t subnormal =
            BitsOf(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-9f);
        const std::uint32_t sign = (std::uint32_t{code} & 0x80u) << 24;
        return FloatOf(Choose(magnitude < 8, subnormal, normal) | sign);
    }
    static KV_INLINE bool IsInvalid(std::uint8_t code) { return (code & 0x7f) == 0x7f; }  // NaN

    template <class Element>
    static KV_INLINE void SetScales(const typename Element::Bits *__restrict largest,
                                    std::size_t dim, std::size_t channels, float *__restrict scales,
                                    float *__restrict inverses, std::uint16_t *__restrict stored) {
        for (std::size_t head = 0; head * dim < channels; ++head) {
            typename Element::Bits top = 0;
            for (std::size_t c = head * dim; c < (head + 1) * dim; ++c) {
                top = largest[c] > top ? largest[c] : top;
            }
            const std::uint32_t exact = BitsOf(Element::ToFloat(top) / 448.0f);
            const std::uint32_t up = (exact + 0x7fffffu) & 0x7f800000u;
            const std::uint32_t bits = up < kMinScaleBits ? kMinScaleBits : up;
            const float scale = FloatOf(bits);
            for (std::size_t c = head * dim; c < (head + 1) * dim; ++c) {
                scales[c] = scale;
                inverses[c] = 1.0f / scale;
            }
            stored[head] = static_cast<std::uint16_t>(bits >> 16);
        }
    }
};

// One plane's worth of intermediate values, taken once per batch.
struct Scratch {
    explicit Scratch(const CodecFormat &format)
        : largest(format.channels() * sizeof(std::uint32_t)),
          scales(format.channels()),
          inverses(format.channels()),
          stored(format.channels()) {}

    std::vector<std::uint8_t> largest;  // holds Element::Bits
    std::vector<float> scales;
    std::vector<float> inverses;
    std::vector<std::uint16_t> stored;
};

std::size_t ScalesPerPlane(const CodecFormat &format) {
    return format.codec == CodecId::kInt8 ? format.channels() : format.heads;
}

template <class Element, class Quantiser>
KV_INLINE void AddError(const typename Element::Bits *__restrict values,
                        const std::uint8_t *__restrict codes, const float *__restrict scales,
                        std::size_t n, CodecError *error) {
    constexpr std::size_t kLanes = 8;  // independent sums, so that the loop can be vectorised
    double top[kLanes] = {}, errors[kLanes] = {}, squares[kLanes] = {};
    std::size_t c = 0;
    for (; c + kLanes <= n; c += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const std::size_t at = c + lane;
            const double value = Element::ToFloat(values[at]);
            const double back =
                Element::ToFloat(Element::FromFloat(Quantiser::Decode(codes[at]) * scales[at]));
            const double off = value > back ? value - back : back - value;
            top[lane] = off > top[lane] ? off : top[lane];
            errors[lane] += off * off;
            squares[lane] += value * value;
        }
    }
    for (; c < n; ++c) {
        const double value = Element::ToFloat(values[c]);
        const double back =
            Element::ToFloat(Element::FromFloat(Quantiser::Decode(codes[c]) * scales[c]));
        const double off = value > back ? value - back : back - value;
        top[0] = off > top[0] ? off : top[0];
        errors[0] += off * off;
        squares[0] += value * value;
    }
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
        error->abs_max = top[lane] > error->abs_max ? top[lane] : error->abs_max;
        error->error_square_sum += errors[lane];
        error->value_square_sum += squares[lane];
    }
    error->elements += static_cast<double>(n);
}

template <class Element, class Quantiser>
KV_INLINE CodecStatus EncodeBody(const CodecFormat &format, const std::uint8_t *raw,
                                 std::uint8_t *body, Scratch *scratch, std::size_t sample,
                                 CodecError *error) {
    using Bits = typename Element::Bits;
    const std::size_t channels = format.channels();
    const std::size_t tokens = format.tokens;
    const std::size_t scale_count = Quantiser::kScalePerChannel ? channels : format.heads;
    const Bits *__restrict plane = reinterpret_cast<const Bits *>(raw);
    std::uint8_t *__restrict codes = body + format.planes * scale_count * sizeof(std::uint16_t);
    Bits *__restrict largest = reinterpret_cast<Bits *>(scratch->largest.data());
    float *__restrict scales = scratch->scales.data();
    float *__restrict inverses = scratch->inverses.data();

    for (std::size_t p = 0; p < format.planes; ++p) {
        for (std::size_t c = 0; c < channels; ++c) largest[c] = plane[c] & Element::kMagnitude;
        for (std::size_t t = 1; t < tokens; ++t) {
            const Bits *__restrict row = plane + t * channels;
            for (std::size_t c = 0; c < channels; ++c) {
                const Bits magnitude = row[c] & Element::kMagnitude;
                largest[c] = magnitude > largest[c] ? magnitude : largest[c];
            }
        }
        Bits top = 0;
        for (std::size_t c = 0; c < channels; ++c) top = largest[c] > top ? largest[c] : top;
        if (top >= Element::kInfinity) return CodecStatus::kNotFinite;

        Quantiser::template SetScales<Element>(largest, format.dim, channels, scales, inverses,
                                               scratch->stored.data());
        const std::size_t scale_bytes = scale_count * sizeof(std::uint16_t);
        std::memcpy(body + p * scale_bytes, scratch->stored.data(), scale_bytes);

        for (std::size_t t = 0; t < tokens; ++t) {
            const Bits *__restrict row = plane + t * channels;
            std::uint8_t *__restrict to = codes + t * channels;
            for (std::size_t c = 0; c < channels; ++c) {
                to[c] = Quantiser::Encode(Element::ToFloat(row[c]) * inverses[c]);
            }
        }
        const std::size_t t = (p + sample) % tokens;
        AddError<Element, Quantiser>(plane + t * channels, codes + t * channels, scales, channels,
                                     error);
        plane += tokens * channels;
        codes += tokens * channels;
    }
    return CodecStatus::kOk;
}

template <class Element, class Quantiser>
KV_INLINE CodecStatus DecodeBody(const CodecFormat &format, const std::uint8_t *body,
                                 std::uint8_t *raw, Scratch *scratch) {
    using Bits = typename Element::Bits;
    const std::size_t channels = format.channels();
    const std::size_t tokens = format.tokens;
    const std::size_t scale_count = Quantiser::kScalePerChannel ? channels : format.heads;
    const std::size_t scale_bytes = scale_count * sizeof(std::uint16_t);
    Bits *__restrict plane = reinterpret_cast<Bits *>(raw);
    const std::uint8_t *__restrict codes = body + format.planes * scale_bytes;
    std::uint16_t *__restrict stored = scratch->stored.data();
    float *__restrict scales = scratch->scales.data();

    std::uint32_t bad = 0;
    for (std::size_t p = 0; p < format.planes; ++p) {
        std::memcpy(stored, body + p * scale_bytes, scale_bytes);
        for (std::size_t s = 0; s < scale_count; ++s) {
            bad |= std::uint32_t{stored[s] < kScaleUpperMin} |
                   std::uint32_t{stored[s] > kScaleUpperMax};
        }
        if (bad != 0) return CodecStatus::kBadBody;
        if constexpr (Quantiser::kScalePerChannel) {
            for (std::size_t c = 0; c < channels; ++c) {
                scales[c] = FloatOf(std::uint32_t{stored[c]} << 16);
            }
        } else {
            for (std::size_t head = 0; head < format.heads; ++head) {
                const float scale = FloatOf(std::uint32_t{stored[head]} << 16);
                for (std::size_t d = 0; d < format.dim; ++d) scales[head * format.dim + d] = scale;
            }
        }
        for (std::size_t t = 0; t < tokens; ++t) {
            Bits *__restrict row = plane + t * channels;
            const std::uint8_t *__restrict from = codes + t * channels;
            for (std::size_t c = 0; c < channels; ++c) {
                row[c] = Element::FromFloat(Quantiser::Decode(from[c]) * scales[c]);
            }
            std::uint8_t invalid = 0;
            for (std::size_t c = 0; c < channels; ++c) {
                invalid |= static_cast<std::uint8_t>(Quantiser::IsInvalid(from[c]));
            }
            bad |= invalid;
        }
        plane += tokens * channels;
        codes += tokens * channels;
    }
    return bad == 0 ? CodecStatus::kOk : CodecStatus::kBadBody;
}

using EncodeFunction = CodecStatus (*)(const CodecFormat &, const std::uint8_t *, std::uint8_t *,
                                       Scratch *, std::size_t, CodecError *);
using DecodeFunction = CodecStatus (*)(const CodecFormat &, const std::uint8_t *, std::uint8_t *,
                                       Scratch *);

// One struct per level, for the attribute has to stand on a function of its own.
#define KV_CODEC_LEVEL(Name, attribute)                                                          \
    struct Name {                                                                                \
        template <class Element, class Quantiser>                                                \
        attribute static CodecStatus Encode(const CodecFormat &format, const std::uint8_t *raw,  \
                                            std::uint8_t *body, Scratch *scratch,                \
                                            std::size_t sample, CodecError *error) {             \
            return EncodeBody<Element, Quantiser>(format, raw, body, scratch, sample, error);    \
        }                                                                                        \
        template <class Element, class Quantiser>                                                \
        attribute static CodecStatus Decode(const CodecFormat &format, const std::uint8_t *body, \
                                            std::uint8_t *raw, Scratch *scratch) {               \
            return DecodeBody<Element, Quantiser>(format, body, raw, scratch);                   \
        }                                                                                        \
    }

KV_CODEC_LEVEL(ScalarLevel, );
#if defined(__x86_64__)
KV_CODEC_LEVEL(Avx2Level, __attribute__((target("avx2"))));
KV_CODEC_LEVEL(Avx512Level, __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl"))));
#endif
#undef KV_CODEC_LEVEL

struct Functions {
    EncodeFunction encode = nullptr;
    DecodeFunction decode = nullptr;
};

template <class Level, class Element>
Functions PickQuantiser(CodecId codec) {
    if (codec == CodecId::kInt8) {
        return {Level::template Encode<Element, Int8>, Level::template Decode<Element, Int8>};
    }
    return {Level::template Encode<Element, Fp8>, Level::template Decode<Element, Fp8>};
}

template <class Level>
Functions PickElement(const CodecFormat &format) {
    switch (format.element) {
        case ElementType::kFloat32:
            return PickQuantiser<Level, Float32>(format.codec);
        case ElementType::kFloat16:
            return PickQuantiser<Level, Float16>(format.codec);
        case ElementType::kBfloat16:
            return PickQuantiser<Level, Bfloat16>(format.codec);
        case ElementType::kOpaque:
            break;
    }
    return {};
}

Functions Pick(const CodecFormat &format, Simd simd) {
    KV_CHECK(format.codec == CodecId::kInt8 || format.codec == CodecId::kFp8);
    KV_CHECK(IsValidFormat(format) && simd <= BestSimd());
#if defined(__x86_64__)
    if (simd == Simd::kAvx512) return PickElement<Avx512Level>(format);
    if (simd == Simd::kAvx2) return PickElement<Avx2Level>(format);
#endif
    return PickElement<ScalarLevel>(format);
}

// All hosts that kvstore runs on are little-endian, so fields are stored as they lie in memory.
template <class T>
void Put(std::uint8_t *header, std::size_t offset, T value) {
    std::memcpy(header + offset, &value, sizeof(value));
}

template <class T>
T Get(const std::uint8_t *header, std::size_t offset) {
    T value;
    std::memcpy(&value, header + offset, sizeof(value));
    return value;
}

// FNV-1a: tells a damaged header from an intact one that asks for another spec. Any change of one
// byte changes it.
std::uint64_t HeaderHash(const std::uint8_t *header) {
    std::uint64_t hash = 0xcbf29ce484222325u;
    for (std::size_t i = 0; i < kHashOffset; ++i) hash = (hash ^ header[i]) * 0x100000001b3u;
    return hash;
}

}  // namespace

std::size_t ElementBytes(ElementType element) {
    switch (element) {
        case ElementType::kFloat32:
            return 4;
        case ElementType::kFloat16:
        case ElementType::kBfloat16:
            return 2;
        case ElementType::kOpaque:
            break;
    }
    return 0;
}

bool IsValidFormat(const CodecFormat &format) {
    if (format.raw_bytes == 0 || format.raw_bytes > kRawBytesMax) return false;
    if (format.codec == CodecId::kZstd) {
        const std::uint8_t width = format.shuffle_width;
        return (width == 1 || width == 2 || width == 4) && format.raw_bytes % width == 0;
    }
    if (format.codec != CodecId::kInt8 && format.codec != CodecId::kFp8) return false;
    if (std::uint64_t{format.heads} * format.dim > kChannelsMax) return false;
    std::uint64_t bytes = ElementBytes(format.element);
    for (const std::uint32_t count : {format.planes, format.tokens, format.heads, format.dim}) {
        if (__builtin_mul_overflow(bytes, count, &bytes)) return false;
    }
    return bytes == format.raw_bytes && format.shuffle_width == 0;
}

std::uint64_t QuantEncodedBytes(const CodecFormat &format) {
    const std::uint64_t elements = format.raw_bytes / ElementBytes(format.element);
    return kCodecHeaderBytes + format.planes * ScalesPerPlane(format) * sizeof(std::uint16_t) +
           elements;
}

Simd BestSimd() {
#if defined(__x86_64__)
    static const Simd best = [] {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl")) {
            return Simd::kAvx512;
        }
        return __builtin_cpu_supports("avx2") ? Simd::kAvx2 : Simd::kScalar;
    }();
    return best;
#else
    return Simd::kScalar;
#endif
}

void QuantEncode(const CodecFormat &format, const std::uint8_t *const *raw, std::size_t n,
                 std::uint8_t *const *out, CodecStatus *statuses, CodecError *errors, Simd simd) {
    const EncodeFunction encode = Pick(format, simd).encode;
    const std::uint64_t encoded_bytes = QuantEncodedBytes(format);
    Scratch scratch(format);
    for (std::size_t i = 0; i < n; ++i) {
        errors[i] = CodecError{};
        statuses[i] = encode(format, raw[i], out[i] + kCodecHeaderBytes, &scratch, i, &errors[i]);
        if (statuses[i] == CodecStatus::kOk) {
            WriteCodecHeader(format, encoded_bytes, out[i]);
        } else {
            std::memset(out[i], 0, kCodecHeaderBytes);
            errors[i] = CodecError{};
        }
    }
}

void QuantDecode(const CodecFormat &format, const std::uint8_t *const *encoded,
                 const std::uint64_t *lengths, std::size_t n, std::uint8_t *const *out,
                 CodecStatus *statuses, Simd simd) {
    const DecodeFunction decode = Pick(format, simd).decode;
    const std::uint64_t expected_bytes = QuantEncodedBytes(format);
    Scratch scratch(format);
    for (std::size_t i = 0; i < n; ++i) {
        std::uint64_t encoded_bytes = 0;
        statuses[i] = ReadCodecHeader(format, encoded[i], lengths[i], &encoded_bytes);
        if (statuses[i] != CodecStatus::kOk) continue;
        statuses[i] = encoded_bytes == expected_bytes
                          ? decode(format, encoded[i] + kCodecHeaderBytes, out[i], &scratch)
                          : CodecStatus::kBadHeader;
    }
}

void WriteCodecHeader(const CodecFormat &format, std::uint64_t encoded_bytes, std::uint8_t *out) {
    std::uint8_t header[kCodecHeaderBytes] = {};
    std::memcpy(header, kMagic, sizeof(kMagic));
    header[4] = kVersion;
    header[5] = static_cast<std::uint8_t>(format.codec);
    header[6] = static_cast<std::uint8_t>(format.element);
    Put(header, 8, format.raw_bytes);
    Put(header, 16, encoded_bytes);
    Put(header, 24, format.planes);
    Put(header, 28, format.tokens);
    Put(header, 32, format.heads);
    Put(header, 36, format.dim);
    header[40] = format.shuffle_width;
    Put(header, kHashOffset, HeaderHash(header));
    std::memcpy(out, header, sizeof(header));
}

CodecStatus ReadCodecHeader(const CodecFormat &format, const std::uint8_t *encoded,
                            std::uint64_t length, std::uint64_t *encoded_bytes) {
    if (length < kCodecHeaderBytes) return CodecStatus::kTruncated;
    std::uint8_t header[kCodecHeaderBytes];
    std::memcpy(header, encoded, sizeof(header));
    if (std::memcmp(header, kMagic, sizeof(kMagic)) != 0 ||
        Get<std::uint64_t>(header, kHashOffset) != HeaderHash(header)) {
        return CodecStatus::kBadHeader;
    }
    if (header[4] != kVersion) return CodecStatus::kWrongVersion;
    if (header[5] != static_cast<std::uint8_t>(format.codec)) return CodecStatus::kWrongCodec;
    const CodecFormat found{static_cast<CodecId>(header[5]),
                            static_cast<ElementType>(header[6]),
                            header[40],
                            Get<std::uint32_t>(header, 24),
                            Get<std::uint32_t>(header, 28),
                            Get<std::uint32_t>(header, 32),
                            Get<std::uint32_t>(header, 36),
                            Get<std::uint64_t>(header, 8)};
    if (found != format) return CodecStatus::kWrongSpec;
    *encoded_bytes = Get<std::uint64_t>(header, 16);
    if (*encoded_bytes < kCodecHeaderBytes) return CodecStatus::kBadHeader;
    return *encoded_bytes > length ? CodecStatus::kTruncated : CodecStatus::kOk;
}

namespace {

template <std::size_t kWidth>
void Shuffle(const std::uint8_t *__restrict in, std::size_t n, std::uint8_t *__restrict out) {
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t w = 0; w < kWidth; ++w) out[w * n + i] = in[i * kWidth + w];
    }
}

template <std::size_t kWidth>
void Unshuffle(const std::uint8_t *__restrict in, std::size_t n, std::uint8_t *__restrict out) {
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t w = 0; w < kWidth; ++w) out[i * kWidth + w] = in[w * n + i];
    }
}

}  // namespace

void ShuffleBytes(const std::uint8_t *in, std::size_t bytes, std::size_t width, std::uint8_t *out) {
    KV_CHECK(width == 1 || width == 2 || width == 4);
    if (width == 1) std::memcpy(out, in, bytes);
    if (width == 2) Shuffle<2>(in, bytes / 2, out);
    if (width == 4) Shuffle<4>(in, bytes / 4, out);
}

void UnshuffleBytes(const std::uint8_t *in, std::size_t bytes, std::size_t width,
                    std::uint8_t *out) {
    KV_CHECK(width == 1 || width == 2 || width == 4);
    if (width == 1) std::memcpy(out, in, bytes);
    if (width == 2) Unshuffle<2>(in, bytes / 2, out);
    if (width == 4) Unshuffle<4>(in, bytes / 4, out);
}

}  // namespace kvstore
