#include "core/sha256.h"

#include <bit>
#include <cstring>
#include <vector>

#include "core/hash_dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace kvstore {
namespace {

constexpr std::size_t kBlockBytes = 64;
constexpr std::uint32_t kInitial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
alignas(16) constexpr std::uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

inline std::uint32_t ReadBigEndian(const std::uint8_t *bytes) {
    return static_cast<std::uint32_t>(bytes[0]) << 24 | static_cast<std::uint32_t>(bytes[1]) << 16 |
           static_cast<std::uint32_t>(bytes[2]) << 8 | bytes[3];
}

void CompressPortable(std::uint32_t state[8], const std::uint8_t *blocks, std::size_t num_blocks) {
    for (; num_blocks > 0; --num_blocks, blocks += kBlockBytes) {
        std::uint32_t w[64];
        for (int t = 0; t < 16; ++t) w[t] = ReadBigEndian(blocks + 4 * t);
        for (int t = 16; t < 64; ++t) {
            const std::uint32_t s0 =
                std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ (w[t - 15] >> 3);
            const std::uint32_t s1 =
                std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ (w[t - 2] >> 10);
            w[t] = w[t - 16] + s0 + w[t - 7] + s1;
        }
        std::uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        std::uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int t = 0; t < 64; ++t) {
            const std::uint32_t sum1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
            const std::uint32_t t1 = h + sum1 + ((e & f) ^ (~e & g)) + kRound[t] + w[t];
            const std::uint32_t sum0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
            const std::uint32_t t2 = sum0 + ((a & b) ^ (a & c) ^ (b & c));
            h = g;
            g = f;
            f = e;
            e = d + t1;
            d = c;
            c = b;
            b = a;
            a = t1 + t2;
        }
        state[0] += a;
        state[1] += b;
        state[2] += c;
        state[3] += d;
        state[4] += e;
        state[5] += f;
        state[6] += g;
        state[7] += h;
    }
}

#if defined(__x86_64__)

// The SHA instructions want the state as the vectors {F,E,B,A} and {H,G,D,C}; two rounds at a time,
// four message words in a vector (Intel, "Intel SHA Extensions", 2013).
__attribute__((target("sha,sse4.1"))) void CompressShaNi(std::uint32_t state[8],
                                                         const std::uint8_t *blocks,
                                                         std::size_t num_blocks) {
    const __m128i swap_bytes = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    auto *words = reinterpret_cast<__m128i *>(state);
    const __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128(words), 0xB1);
    const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128(words + 1), 0x1B);
    __m128i feba = _mm_alignr_epi8(badc, hgfe, 8);
    __m128i hgdc = _mm_blend_epi16(hgfe, badc, 0xF0);
    for (; num_blocks > 0; --num_blocks, blocks += kBlockBytes) {
        const __m128i feba_before = feba;
        const __m128i hgdc_before = hgdc;
        __m128i w[4];
        for (int i = 0; i < 4; ++i) {
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i *>(blocks) + i),
                                    swap_bytes);
        }
#pragma GCC unroll 16
        for (int quad = 0; quad < 16; ++quad) {
            __m128i &oldest = w[quad % 4];
            const __m128i k = _mm_load_si128(reinterpret_cast<const __m128i *>(kRound) + quad);
            const __m128i input = _mm_add_epi32(oldest, k);
            hgdc = _mm_sha256rnds2_epu32(hgdc, feba, input);
            feba = _mm_sha256rnds2_epu32(feba, hgdc, _mm_shuffle_epi32(input, 0x0E));
            if (quad < 12) {
                const __m128i newest = w[(quad + 3) % 4];
                const __m128i seven_back = _mm_alignr_epi8(newest, w[(quad + 2) % 4], 4);
                oldest = _mm_sha256msg1_epu32(oldest, w[(quad + 1) % 4]);
                oldest = _mm_sha256msg2_epu32(_mm_add_epi32(oldest, seven_back), newest);
            }
        }
        feba = _mm_add_epi32(feba, feba_before);
        hgdc = _mm_add_epi32(hgdc, hgdc_before);
    }
    const __m128i abef = _mm_shuffle_epi32(feba, 0x1B);
    const __m128i ghcd = _mm_shuffle_epi32(hgdc, 0xB1);
    _mm_storeu_si128(words, _mm_blend_epi16(abef, ghcd, 0xF0));
    _mm_storeu_si128(words + 1, _mm_alignr_epi8(ghcd, abef, 8));
}

// __builtin_cpu_supports("sha") is younger than the compilers we allow.
bool HasShaNi() {
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    return (ebx & bit_SHA) != 0 && __builtin_cpu_supports("sse4.1");
}

#endif

}  // namespace

Sha256Compress PickSha256Compress() {
#if defined(__x86_64__)
    static const bool has_sha_ni = HasShaNi();
    if (has_sha_ni && HashSimdLimit() == HashSimdLevel::kBest) return CompressShaNi;
#endif
    return CompressPortable;
}

void Sha256(Sha256Compress compress, const std::uint8_t *data, std::size_t num_bytes,
            std::uint8_t out[32]) {
    std::uint32_t state[8];
    std::memcpy(state, kInitial, sizeof(state));
    const std::size_t whole_blocks = num_bytes / kBlockBytes;
    if (whole_blocks > 0) compress(state, data, whole_blocks);
    const std::size_t rest = num_bytes % kBlockBytes;
    std::uint8_t last[2 * kBlockBytes] = {};
    if (rest > 0) std::memcpy(last, data + whole_blocks * kBlockBytes, rest);
    last[rest] = 0x80;
    const std::size_t last_blocks = rest + 1 + 8 <= kBlockBytes ? 1 : 2;
    const std::uint64_t num_bits = static_cast<std::uint64_t>(num_bytes) * 8;
    for (int i = 0; i < 8; ++i) {
        last[last_blocks * kBlockBytes - 1 - i] = static_cast<std::uint8_t>(num_bits >> (8 * i));
    }
    compress(state, last, last_blocks);
    for (int i = 0; i < 32; ++i) {
        out[i] = static_cast<std::uint8_t>(state[i / 4] >> (24 - 8 * (i % 4)));
    }
}

void HmacSha256(const std::uint8_t *key, std::size_t key_bytes, const std::uint8_t *message,
                std::size_t message_bytes, std::uint8_t out[32]) {
    const Sha256Compress compress = PickSha256Compress();
    std::uint8_t padded[kBlockBytes] = {};
    if (key_bytes > kBlockBytes) {
        Sha256(compress, key, key_bytes, padded);
    } else if (key_bytes > 0) {
        std::memcpy(padded, key, key_bytes);
    }
    std::vector<std::uint8_t> inner(kBlockBytes + message_bytes);
    for (std::size_t i = 0; i < kBlockBytes; ++i) inner[i] = padded[i] ^ 0x36;
    if (message_bytes > 0) std::memcpy(inner.data() + kBlockBytes, message, message_bytes);
    std::uint8_t outer[kBlockBytes + 32];
    for (std::size_t i = 0; i < kBlockBytes; ++i) outer[i] = padded[i] ^ 0x5C;
    Sha256(compress, inner.data(), inner.size(), outer + kBlockBytes);
    Sha256(compress, outer, sizeof(outer), out);
}

}  // namespace kvstore
