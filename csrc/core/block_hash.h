// The chained hash that names a block: h_i = H(h_{i-1}, token ids of block i, extra keys of block
// i).
//
// Chains:
//
//   blake3            Ours, the default. h_i = BLAKE3 keyed with h_{i-1}, message = message_i. The
//                     key of block 0 is BLAKE3("kvstore block hash chain 1").
//   sha256            SGLang's. h_i = SHA-256(h_{i-1} || message_i); block 0 has nothing before it.
//   vllm_sha256       vLLM's default. h_i = SHA-256(pickle((h_{i-1}, token tuple, extra keys)))
//   with
//                     pickle protocol 5 as CPython writes it; h_{-1} = SHA-256(pickle(seed)).
//   vllm_sha256_cbor  The same with canonical CBOR (RFC 8949, section 4.2.1).
//
// message_i is the token ids as u32 little-endian, followed, when the block has an extra key, by
//
//   the extra key | zeros up to a multiple of 4 | u32 LE length of the extra key | 0x01
//
// Two different (tokens, extra key) never give one message, so only a collision of the hash could
// make two blocks equal: a message without an extra key has a length of 0 modulo 4, one with an
// extra key has 1; and of the latter, the length before the final byte says where the key begins,
// hence which words are tokens. That holds whatever the block sizes of the two are. (In chain
// sha256 a first block can equal a later block that has 8 tokens less and whose parent's hash reads
// as those 8 tokens. That is SGLang's format; a namespace has one block size, so it cannot happen
// within one.)
//
// For the vLLM chains an extra key is the serialised third element of vLLM's tuple: its CBOR, or
// its pickle opcodes as they follow the token tuple, memo references counted from there.
//
// Thread safety: all functions are pure. They read what they are given until they return.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/types.h"

namespace kvstore {

enum class HashChain { kBlake3, kSha256, kVllmSha256, kVllmSha256Cbor };

// Token ids as the caller holds them. Only ids from 0 to 2^32-1 can be hashed; in an array of
// signed integers a negative one shows as larger, see FirstBadToken.
struct TokenSpan {
    enum class Width { kUint32, kInt32, kInt64, kUint64 };

    const void *data = nullptr;  // aligned for its width
    std::size_t count = 0;
    Width width = Width::kUint32;
};

// An extra key. Absent (null data) is not the same as empty.
struct ExtraKey {
    const std::uint8_t *data = nullptr;
    std::size_t num_bytes = 0;
};

// A block with an extra key in chain vllm_sha256 must pickle into one frame of CPython's pickler,
// since where it would split depends on the objects inside. This is the room for the extra key.
std::size_t VllmExtraKeyBytesMax(std::size_t block_tokens);

// Index of the first id that is not in [0, 2^32), or tokens.count.
std::size_t FirstBadToken(const TokenSpan &tokens);

// The hash that block 0 of a chain continues from; for kSha256 there is none and the result is
// zero.
BlockHash ChainRoot(HashChain chain);

// Hashes tokens.count / block_tokens whole blocks; tokens after the last whole block are ignored.
// `parent` is the hash before the first block, null at the root of the chain. `extra_keys` is empty
// or has one entry per block. REQUIRES: block_tokens > 0; `out` has room; FirstBadToken(tokens) ==
// tokens.count (an id that changes meanwhile costs only its own chain's hashes); extra keys are
// under 2^32 bytes, and for kVllmSha256 at most VllmExtraKeyBytesMax(block_tokens).
void HashBlocks(HashChain chain, const TokenSpan &tokens, std::size_t block_tokens,
                const BlockHash *parent, std::span<const ExtraKey> extra_keys, BlockHash *out);

}  // namespace kvstore
