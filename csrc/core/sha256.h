// SHA-256 of a whole message (FIPS 180-4), with the SHA instructions of x86 where there are any.
//
// Thread safety: all functions are pure.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore {

// Folds `num_blocks` blocks of 64 bytes into the state.
using Sha256Compress = void (*)(std::uint32_t state[8], const std::uint8_t *blocks,
                                std::size_t num_blocks);

// The fastest code that this processor and HashSimdLimit() allow.
Sha256Compress PickSha256Compress();

// out = SHA-256(data). `out` may lie inside `data`.
void Sha256(Sha256Compress compress, const std::uint8_t *data, std::size_t num_bytes,
            std::uint8_t out[32]);

// out = HMAC-SHA-256 of the message under the key (RFC 2104).
void HmacSha256(const std::uint8_t *key, std::size_t key_bytes, const std::uint8_t *message,
                std::size_t message_bytes, std::uint8_t out[32]);

}  // namespace kvstore
