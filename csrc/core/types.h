// The integers and the hash that everything in csrc speaks of, each a type of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvstore {

// The 32-byte chained content hash that names a block within its namespace.
struct BlockHash {
    std::uint8_t bytes[32];

    // BlockHashes are outputs of a cryptographic hash, so any 8 bytes are as good as a hash of
    // them.
    std::uint64_t Prefix64() const {
        std::uint64_t word;
        std::memcpy(&word, bytes, sizeof(word));
        return word;
    }
    friend bool operator==(const BlockHash &a, const BlockHash &b) {
        return std::memcmp(a.bytes, b.bytes, sizeof(a.bytes)) == 0;
    }
};
static_assert(sizeof(BlockHash) == 32);

using NamespaceId = std::uint32_t;  // ordinal of a registered Namespace
using EntryId = std::uint32_t;      // place of a block in the index
using SlotId = std::uint32_t;       // place of a block in the arena
using LeaseId = std::uint64_t;

// Unit of slots and of disk extents: what O_DIRECT asks of both.
inline constexpr std::size_t kPageBytes = 4096;

inline constexpr EntryId kNoEntry = UINT32_MAX;
inline constexpr SlotId kNoSlot = UINT32_MAX;

}  // namespace kvstore
