// BLAKE3, plain and keyed, of any length, 32 bytes out.
//
// Written from the paper "BLAKE3: one function, fast everywhere" (O'Connor, Aumasson, Neves,
// Wilcox-O'Hearn, 2020), sections 2.1 to 2.5. What we hash is short and chained (one block of
// tokens keyed by the hash before it), so the latency of one compression decides and this code
// works on one compression at a time; it does not hash chunks side by side as a file hasher would.
//
// Thread safety: all functions are pure.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore {

inline constexpr std::size_t kBlake3BlockBytes = 64;

// Flags of the compression function (paper, table 3).
inline constexpr std::uint32_t kBlake3ChunkStart = 1 << 0;
inline constexpr std::uint32_t kBlake3ChunkEnd = 1 << 1;
inline constexpr std::uint32_t kBlake3Parent = 1 << 2;
inline constexpr std::uint32_t kBlake3Root = 1 << 3;
inline constexpr std::uint32_t kBlake3KeyedHash = 1 << 4;

// One compression, truncated to the 8 words of a chaining value. `out` may be `chaining`.
// REQUIRES: `block` is 64 bytes, zeros after block_bytes; no alignment.
using Blake3Compress = void (*)(const std::uint32_t chaining[8], const std::uint8_t *block,
                                std::uint64_t counter, std::uint32_t block_bytes,
                                std::uint32_t flags, std::uint32_t out[8]);

// The fastest compression that this processor and HashSimdLimit() allow.
Blake3Compress PickBlake3Compress();

// out = BLAKE3(data), or keyed with the 32 bytes at `key` when that is not null. `out` may be
// `key`.
void Blake3(Blake3Compress compress, const std::uint8_t *data, std::size_t num_bytes,
            const std::uint8_t *key, std::uint8_t out[32]);

}  // namespace kvstore
