#include "copy/xxh3.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>

#include "copy/copy.h"
#include "core/check.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header trips it (gcc bug 105593), at the place of inlining.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace kvstore {
namespace {

static_assert(std::endian::native == std::endian::little,
              "stripes are read as little-endian words");

constexpr std::uint64_t kPrime32_1 = 0x9E3779B1U;
constexpr std::uint64_t kPrime32_2 = 0x85EBCA77U;
constexpr std::uint64_t kPrime32_3 = 0xC2B2AE3DU;
constexpr std::uint64_t kPrime64_1 = 0x9E3779B185EBCA87ULL;
constexpr std::uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4FULL;
constexpr std::uint64_t kPrime64_3 = 0x165667B19E3779F9ULL;
constexpr std::uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63ULL;
constexpr std::uint64_t kPrime64_5 = 0x27D4EB2F165667C5ULL;
constexpr std::uint64_t kPrimeMx1 = 0x165667919E3779F9ULL;
constexpr std::uint64_t kPrimeMx2 = 0x9FB21C651E98DF25ULL;

constexpr std::size_t kSecretBytes = 192;
constexpr std::uint32_t kStripesPerBlock = (kSecretBytes - kStripeBytes) / 8;
constexpr std::size_t kScrambleSecret = kSecretBytes - kStripeBytes;
constexpr std::size_t kLastStripeSecret = kScrambleSecret - 7;

alignas(64) constexpr std::uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

std::uint32_t Read32(const std::uint8_t *p) {
    std::uint32_t v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

std::uint64_t Read64(const std::uint8_t *p) {
    std::uint64_t v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

std::uint64_t Mul128Fold64(std::uint64_t a, std::uint64_t b) {
    __extension__ using Wide = unsigned __int128;
    const Wide product = static_cast<Wide>(a) * b;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

std::uint64_t Avalanche(std::uint64_t h) {
    h ^= h >> 37;
    h *= kPrimeMx1;
    return h ^ (h >> 32);
}

std::uint64_t AvalancheXxh64(std::uint64_t h) {
    h ^= h >> 33;
    h *= kPrime64_2;
    h ^= h >> 29;
    h *= kPrime64_3;
    return h ^ (h >> 32);
}

std::uint64_t Mix16(const std::uint8_t *in, const std::uint8_t *secret) {
    return Mul128Fold64(Read64(in) ^ Read64(secret), Read64(in + 8) ^ Read64(secret + 8));
}

std::uint64_t HashUpTo16(const std::uint8_t *in, std::size_t n) {
    if (n > 8) {
        const std::uint64_t low = Read64(in) ^ Read64(kSecret + 24) ^ Read64(kSecret + 32);
        const std::uint64_t high = Read64(in + n - 8) ^ Read64(kSecret + 40) ^ Read64(kSecret + 48);
        return Avalanche(n + __builtin_bswap64(low) + high + Mul128Fold64(low, high));
    }
    if (n >= 4) {
        const std::uint64_t both =
            Read32(in + n - 4) + (static_cast<std::uint64_t>(Read32(in)) << 32);
        std::uint64_t h = both ^ Read64(kSecret + 8) ^ Read64(kSecret + 16);
        h ^= std::rotl(h, 49) ^ std::rotl(h, 24);
        h *= kPrimeMx2;
        h ^= (h >> 35) + n;
        h *= kPrimeMx2;
        return h ^ (h >> 28);
    }
    if (n == 0) return AvalancheXxh64(Read64(kSecret + 56) ^ Read64(kSecret + 64));
    const std::uint32_t packed = (static_cast<std::uint32_t>(in[0]) << 16) |
                                 (static_cast<std::uint32_t>(in[n >> 1]) << 24) | in[n - 1] |
                                 (static_cast<std::uint32_t>(n) << 8);
    return AvalancheXxh64(packed ^ (Read32(kSecret) ^ Read32(kSecret + 4)));
}

std::uint64_t HashUpTo240(const std::uint8_t *in, std::size_t n) {
    if (n <= 16) return HashUpTo16(in, n);
    std::uint64_t h = n * kPrime64_1;
    if (n <= 128) {
        for (std::size_t i = (n - 1) / 32 + 1; i-- > 0;) {
            h += Mix16(in + 16 * i, kSecret + 32 * i);
            h += Mix16(in + n - 16 * (i + 1), kSecret + 32 * i + 16);
        }
        return Avalanche(h);
    }
    for (std::size_t i = 0; i < 8; ++i) h += Mix16(in + 16 * i, kSecret + 16 * i);
    h = Avalanche(h);
    for (std::size_t i = 8; i < n / 16; ++i) h += Mix16(in + 16 * i, kSecret + 16 * (i - 8) + 3);
    h += Mix16(in + n - 16, kSecret + 136 - 17);
    return Avalanche(h);
}

void AccumulateScalar(std::uint64_t *lanes, const std::uint8_t *in, const std::uint8_t *secret) {
    for (std::size_t i = 0; i < 8; ++i) {
        const std::uint64_t value = Read64(in + 8 * i);
        const std::uint64_t key = value ^ Read64(secret + 8 * i);
        lanes[i ^ 1] += value;
        lanes[i] += (key & 0xFFFFFFFFU) * (key >> 32);
    }
}

using State = Xxh3Stream::State;

// Every kernel takes the run's pieces one after the other, `bytes` a multiple of kStripeBytes
// where it hashes. `state` is null where it only copies.
struct Kernels {
    void (*hash)(const PieceRun &, State *);
    void (*copy_hash)(const PieceRun &, State *);
    void (*copy_hash_streaming)(const PieceRun &, State *);
    void (*copy_streaming)(const PieceRun &);
};

template <bool kCopy>
void HashScalar(const PieceRun &run, State *state) {
    for (std::size_t p = 0; p < run.count; ++p) {
        const std::uint8_t *from = run.from + static_cast<std::ptrdiff_t>(p) * run.from_stride;
        std::uint8_t *to =
            kCopy ? run.to + static_cast<std::ptrdiff_t>(p) * run.to_stride : nullptr;
        for (std::size_t at = 0; at < run.bytes; at += kStripeBytes) {
            AccumulateScalar(state->lanes, from + at, kSecret + 8 * state->stripe);
            if constexpr (kCopy) std::memcpy(to + at, from + at, kStripeBytes);
            if (++state->stripe < kStripesPerBlock) continue;
            state->stripe = 0;
            for (std::size_t i = 0; i < 8; ++i) {
                std::uint64_t &lane = state->lanes[i];
                lane =
                    (lane ^ (lane >> 47) ^ Read64(kSecret + kScrambleSecret + 8 * i)) * kPrime32_1;
            }
        }
    }
}

void CopyCached(const PieceRun &run) {
    for (std::size_t p = 0; p < run.count; ++p) {
        const auto i = static_cast<std::ptrdiff_t>(p);
        std::memcpy(run.to + i * run.to_stride, run.from + i * run.from_stride, run.bytes);
    }
}

constexpr Kernels kScalarKernels = {HashScalar<false>, HashScalar<true>, HashScalar<true>,
                                    CopyCached};

#if defined(__x86_64__)

// How a stripe's bytes get to the destination. Non-temporal stores need aligned addresses; where
// the destination is not, the copy runs `shift` bytes ahead of the hash (kShifted) and loads the
// line twice: the second load comes from L1.
enum class Store { kNone, kCached, kAligned, kShifted };

// Bytes the software prefetch runs ahead of the loads; not past the ends of short pieces, whose
// callers prefetch the next ones.
std::size_t AheadBytes(const PieceRun &run) { return run.bytes >= kPrefetchPieceBytes ? 1024 : 0; }

#define KV_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2")))
#define KV_AVX2 __attribute__((target("avx2")))

template <Store kStore>
KV_AVX512
    __attribute__((always_inline)) inline __m512i Stripe512(__m512i lanes,
                                                            const std::uint8_t *secret,
                                                            const std::uint8_t *from,
                                                            std::uint8_t *to, std::size_t shift,
                                                            std::size_t ahead) {
    const __m512i value = _mm512_loadu_si512(from);
    _mm_prefetch(reinterpret_cast<const char *>(from + ahead), _MM_HINT_T0);
    const __m512i key = _mm512_xor_si512(value, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    const __m512i swapped = _mm512_shuffle_epi32(value, _MM_PERM_BADC);
    if constexpr (kStore == Store::kCached) _mm512_storeu_si512(to, value);
    if constexpr (kStore == Store::kAligned) {
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to), value);
    }
    if constexpr (kStore == Store::kShifted) {
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to + shift),
                            _mm512_loadu_si512(from + shift));
    }
    return _mm512_add_epi64(lanes, _mm512_add_epi64(product, swapped));
}

// Stripes [0, count) of one piece.
template <Store kStore>
KV_AVX512 inline __m512i Stripes512(__m512i lanes, std::uint32_t *stripe, const std::uint8_t *from,
                                    std::uint8_t *to, std::size_t shift, std::size_t ahead,
                                    std::size_t count) {
    while (count > 0) {
        std::uint32_t at = *stripe;
        const std::size_t end = std::min<std::size_t>(kStripesPerBlock, at + count);
        count -= end - at;
        if (at == 0 && end == kStripesPerBlock) {
#pragma GCC unroll 16
            for (std::uint32_t i = 0; i < kStripesPerBlock; ++i) {
                lanes = Stripe512<kStore>(lanes, kSecret + 8 * i, from + kStripeBytes * i,
                                          to + kStripeBytes * i, shift, ahead);
            }
            from += kStripeBytes * kStripesPerBlock;
            to += kStripeBytes * kStripesPerBlock;
            at = kStripesPerBlock;
        }
        for (; at < end; ++at) {
            lanes = Stripe512<kStore>(lanes, kSecret + 8 * at, from, to, shift, ahead);
            from += kStripeBytes;
            to += kStripeBytes;
        }
        if (at == kStripesPerBlock) {
            const __m512i mixed =
                _mm512_xor_si512(_mm512_xor_si512(lanes, _mm512_srli_epi64(lanes, 47)),
                                 _mm512_loadu_si512(kSecret + kScrambleSecret));
            const __m512i prime = _mm512_set1_epi64(static_cast<long long>(kPrime32_1));
            const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);
            lanes = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64(high, 32));
            at = 0;
        }
        *stripe = at;
    }
    return lanes;
}

template <Store kStore>
KV_AVX512 void Hash512(const PieceRun &run, State *state) {
    __m512i lanes = _mm512_load_si512(state->lanes);
    std::uint32_t stripe = state->stripe;
    const std::size_t stripes = run.bytes / kStripeBytes;
    const std::size_t ahead = AheadBytes(run);
    for (std::size_t p = 0; p < run.count; ++p) {
        const auto i = static_cast<std::ptrdiff_t>(p);
        const std::uint8_t *from = run.from + i * run.from_stride;
        std::uint8_t *to = kStore == Store::kNone ? nullptr : run.to + i * run.to_stride;
        const std::size_t shift = -reinterpret_cast<std::uintptr_t>(to) % kStripeBytes;
        if (kStore != Store::kAligned || shift == 0) {
            lanes = Stripes512<kStore>(lanes, &stripe, from, to, 0, ahead, stripes);
            continue;
        }
        const std::size_t last = kStripeBytes * (stripes - 1);
        std::memcpy(to, from, shift);
        lanes = Stripes512<Store::kShifted>(lanes, &stripe, from, to, shift, ahead, stripes - 1);
        lanes = Stripes512<Store::kNone>(lanes, &stripe, from + last, nullptr, 0, 0, 1);
        std::memcpy(to + last + shift, from + last + shift, kStripeBytes - shift);
    }
    _mm512_store_si512(state->lanes, lanes);
    state->stripe = stripe;
}

KV_AVX512 void CopyStreaming512(const PieceRun &run) {
    const std::size_t ahead = AheadBytes(run);
    for (std::size_t p = 0; p < run.count; ++p) {
        const auto i = static_cast<std::ptrdiff_t>(p);
        const std::uint8_t *from = run.from + i * run.from_stride;
        std::uint8_t *to = run.to + i * run.to_stride;
        std::size_t at =
            std::min<std::size_t>(-reinterpret_cast<std::uintptr_t>(to) % kStripeBytes, run.bytes);
        std::memcpy(to, from, at);
        for (; at + kStripeBytes <= run.bytes; at += kStripeBytes) {
            _mm_prefetch(reinterpret_cast<const char *>(from + at + ahead), _MM_HINT_T0);
            _mm512_stream_si512(reinterpret_cast<__m512i *>(to + at),
                                _mm512_loadu_si512(from + at));
        }
        std::memcpy(to + at, from + at, run.bytes - at);
    }
}

struct Lanes256 {
    __m256i low, high;
};

KV_AVX2 inline __m256i Load256(const std::uint8_t *p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
}

KV_AVX2 inline __m256i Half256(__m256i lanes, __m256i value, const std::uint8_t *secret) {
    const __m256i key = _mm256_xor_si256(value, Load256(secret));
    const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
    return _mm256_add_epi64(lanes, _mm256_add_epi64(product, _mm256_shuffle_epi32(value, 0x4E)));
}

KV_AVX2 inline __m256i Scramble256(__m256i lanes, const std::uint8_t *secret) {
    const __m256i mixed =
        _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), Load256(secret));
    const __m256i prime = _mm256_set1_epi64x(static_cast<long long>(kPrime32_1));
    const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
}

template <Store kStore>
KV_AVX2 __attribute__((always_inline)) inline Lanes256 Stripe256(
    Lanes256 lanes, const std::uint8_t *secret, const std::uint8_t *from, std::uint8_t *to,
    std::size_t shift, std::size_t ahead) {
    const __m256i low = Load256(from);
    const __m256i high = Load256(from + 32);
    _mm_prefetch(reinterpret_cast<const char *>(from + ahead), _MM_HINT_T0);
    auto *line = reinterpret_cast<__m256i *>(to);
    if constexpr (kStore == Store::kCached) {
        _mm256_storeu_si256(line, low);
        _mm256_storeu_si256(line + 1, high);
    }
    if constexpr (kStore == Store::kAligned) {
        _mm256_stream_si256(line, low);
        _mm256_stream_si256(line + 1, high);
    }
    if constexpr (kStore == Store::kShifted) {
        line = reinterpret_cast<__m256i *>(to + shift);
        _mm256_stream_si256(line, Load256(from + shift));
        _mm256_stream_si256(line + 1, Load256(from + shift + 32));
    }
    return {Half256(lanes.low, low, secret), Half256(lanes.high, high, secret + 32)};
}

template <Store kStore>
KV_AVX2 inline Lanes256 Stripes256(Lanes256 lanes, std::uint32_t *stripe, const std::uint8_t *from,
                                   std::uint8_t *to, std::size_t shift, std::size_t ahead,
                                   std::size_t count) {
    while (count > 0) {
        std::uint32_t at = *stripe;
        const std::size_t end = std::min<std::size_t>(kStripesPerBlock, at + count);
        count -= end - at;
#pragma GCC unroll 4
        for (; at < end; ++at) {
            lanes = Stripe256<kStore>(lanes, kSecret + 8 * at, from, to, shift, ahead);
            from += kStripeBytes;
            to += kStripeBytes;
        }
        if (at == kStripesPerBlock) {
            lanes = {Scramble256(lanes.low, kSecret + kScrambleSecret),
                     Scramble256(lanes.high, kSecret + kScrambleSecret + 32)};
            at = 0;
        }
        *stripe = at;
    }
    return lanes;
}

template <Store kStore>
KV_AVX2 void Hash256(const PieceRun &run, State *state) {
    auto *memory = reinterpret_cast<__m256i *>(state->lanes);
    Lanes256 lanes = {_mm256_load_si256(memory), _mm256_load_si256(memory + 1)};
    std::uint32_t stripe = state->stripe;
    const std::size_t stripes = run.bytes / kStripeBytes;
    const std::size_t ahead = AheadBytes(run);
    for (std::size_t p = 0; p < run.count; ++p) {
        const auto i = static_cast<std::ptrdiff_t>(p);
        const std::uint8_t *from = run.from + i * run.from_stride;
        std::uint8_t *to = kStore == Store::kNone ? nullptr : run.to + i * run.to_stride;
        const std::size_t shift = -reinterpret_cast<std::uintptr_t>(to) % kStripeBytes;
        if (kStore != Store::kAligned || shift == 0) {
            lanes = Stripes256<kStore>(lanes, &stripe, from, to, 0, ahead, stripes);
            continue;
        }
        const std::size_t last = kStripeBytes * (stripes - 1);
        std::memcpy(to, from, shift);
        lanes = Stripes256<Store::kShifted>(lanes, &stripe, from, to, shift, ahead, stripes - 1);
        lanes = Stripes256<Store::kNone>(lanes, &stripe, from + last, nullptr, 0, 0, 1);
        std::memcpy(to + last + shift, from + last + shift, kStripeBytes - shift);
    }
    _mm256_store_si256(memory, lanes.low);
    _mm256_store_si256(memory + 1, lanes.high);
    state->stripe = stripe;
}

KV_AVX2 void CopyStreaming256(const PieceRun &run) {
    const std::size_t ahead = AheadBytes(run);
    for (std::size_t p = 0; p < run.count; ++p) {
        const auto i = static_cast<std::ptrdiff_t>(p);
        const std::uint8_t *from = run.from + i * run.from_stride;
        std::uint8_t *to = run.to + i * run.to_stride;
        std::size_t at =
            std::min<std::size_t>(-reinterpret_cast<std::uintptr_t>(to) % kStripeBytes, run.bytes);
        std::memcpy(to, from, at);
        for (; at + kStripeBytes <= run.bytes; at += kStripeBytes) {
            _mm_prefetch(reinterpret_cast<const char *>(from + at + ahead), _MM_HINT_T0);
            auto *line = reinterpret_cast<__m256i *>(to + at);
            _mm256_stream_si256(line, Load256(from + at));
            _mm256_stream_si256(line + 1, Load256(from + at + 32));
        }
        std::memcpy(to + at, from + at, run.bytes - at);
    }
}

constexpr Kernels kAvx2Kernels = {Hash256<Store::kNone>, Hash256<Store::kCached>,
                                  Hash256<Store::kAligned>, CopyStreaming256};
constexpr Kernels kAvx512Kernels = {Hash512<Store::kNone>, Hash512<Store::kCached>,
                                    Hash512<Store::kAligned>, CopyStreaming512};

const Kernels *const kKernels[] = {&kScalarKernels, &kAvx2Kernels, &kAvx512Kernels};

#else

const Kernels *const kKernels[] = {&kScalarKernels};

#endif

std::atomic<int> &Level() {
    static std::atomic<int> level{static_cast<int>(BestSimdLevel())};
    return level;
}

const Kernels &Active() { return *kKernels[Level().load(std::memory_order_relaxed)]; }

// Streaming stores pay for whole lines only: short pieces that are not whole lines go through the
// cache.
constexpr std::size_t kStreamingPieceBytes = 512;

bool Streams(const PieceRun &run, StoreMode mode) {
    if (mode != StoreMode::kStreaming) return false;
    const std::uintptr_t lines = reinterpret_cast<std::uintptr_t>(run.to) |
                                 static_cast<std::uintptr_t>(run.to_stride) | run.bytes;
    return run.bytes >= kStreamingPieceBytes || lines % kStripeBytes == 0;
}

}  // namespace

SimdLevel BestSimdLevel() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        return SimdLevel::kAvx512;
    }
    if (__builtin_cpu_supports("avx2")) return SimdLevel::kAvx2;
#endif
    return SimdLevel::kScalar;
}

SimdLevel CurrentSimdLevel() {
    return static_cast<SimdLevel>(Level().load(std::memory_order_relaxed));
}

bool ForceSimdLevel(SimdLevel level) {
    if (static_cast<int>(level) < 0 || level > BestSimdLevel()) return false;
    Level().store(static_cast<int>(level), std::memory_order_relaxed);
    return true;
}

void StreamFence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

void CopyPieces(const PieceRun &run, StoreMode mode) {
    if (Streams(run, mode)) {
        Active().copy_streaming(run);
    } else {
        CopyCached(run);
    }
}

Xxh3Stream::Xxh3Stream(std::uint64_t payload_bytes)
    : state_{{kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5,
              kPrime32_1},
             0},
      payload_bytes_(payload_bytes),
      stripes_left_((payload_bytes - 1) / kStripeBytes) {
    KV_CHECK(payload_bytes > kXxh3ShortBytes);
}

void Xxh3Stream::Update(const std::uint8_t *from, std::size_t bytes) {
    const std::size_t stripes = std::min<std::uint64_t>(bytes / kStripeBytes, stripes_left_);
    KV_CHECK(bytes % kStripeBytes == 0 || bytes_done_ + bytes == payload_bytes_);
    Active().hash({nullptr, from, 0, 0, stripes * kStripeBytes, 1}, &state_);
    stripes_left_ -= stripes;
    bytes_done_ += bytes;
}

void Xxh3Stream::CopyUpdate(std::uint8_t *to, const std::uint8_t *from, std::size_t bytes,
                            StoreMode mode) {
    CopyUpdate({to, from, 0, 0, bytes, 1}, mode);
}

void Xxh3Stream::CopyUpdate(const PieceRun &run, StoreMode mode) {
    const Kernels &kernels = Active();
    const auto kernel = Streams(run, mode) ? kernels.copy_hash_streaming : kernels.copy_hash;
    const std::size_t stripes = run.bytes / kStripeBytes;
    // The payload's last stripe is hashed apart, in Finish, so the piece that holds it is cut.
    const bool ends = bytes_done_ + run.bytes * run.count == payload_bytes_;
    const std::size_t whole = ends ? run.count - 1 : run.count;
    KV_CHECK(run.count > 0 && (run.bytes % kStripeBytes == 0 || whole == 0));
    KV_CHECK(stripes * whole <= stripes_left_);
    if (whole > 0) {
        PieceRun body = run;
        body.count = whole;
        kernel(body, &state_);
        stripes_left_ -= stripes * whole;
    }
    if (ends) {
        const auto i = static_cast<std::ptrdiff_t>(whole);
        std::uint8_t *to = run.to + i * run.to_stride;
        const std::uint8_t *from = run.from + i * run.from_stride;
        const std::size_t body = stripes_left_ * kStripeBytes;
        KV_CHECK(body <= run.bytes);
        if (body > 0) kernel({to, from, 0, 0, body, 1}, &state_);
        std::memcpy(to + body, from + body, run.bytes - body);
        stripes_left_ = 0;
    }
    bytes_done_ += run.bytes * run.count;
}

std::uint64_t Xxh3Stream::Finish(const std::uint8_t *last_stripe) const {
    KV_CHECK(bytes_done_ == payload_bytes_);
    State end = state_;
    AccumulateScalar(end.lanes, last_stripe, kSecret + kLastStripeSecret);
    std::uint64_t h = payload_bytes_ * kPrime64_1;
    for (std::size_t i = 0; i < 4; ++i) {
        h += Mul128Fold64(end.lanes[2 * i] ^ Read64(kSecret + 11 + 16 * i),
                          end.lanes[2 * i + 1] ^ Read64(kSecret + 11 + 16 * i + 8));
    }
    return Avalanche(h);
}

std::uint64_t Xxh3(const void *data, std::size_t bytes) {
    const auto *in = static_cast<const std::uint8_t *>(data);
    if (bytes <= kXxh3ShortBytes) return HashUpTo240(in, bytes);
    Xxh3Stream stream(bytes);
    stream.Update(in, bytes);
    return stream.Finish(in + bytes - kStripeBytes);
}

}  // namespace kvstore
