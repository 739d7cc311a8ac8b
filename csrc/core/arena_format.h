// What lies in an arena's memory besides payload: all that a later process needs to take it over.
//
//   | superblock, a page | chunk table | chunk 0 | chunk 1 | ... | metadata 0 | metadata 1 |
//
//   superblock   written once, before anybody else knows the arena; checksummed.
//   chunk table  8 B a chunk: its slot size, so whose headers lie at its begin.
//   chunk        | slot headers, 128 B each, up to a 4 KiB edge | slot 0 | slot 1 | ... |
//   metadata     the owner's own words (which namespaces there are), twice: the copies are written
//                in turn, so one is whole at any instruction. Memory is taken at the first write.
//
// The process may be killed at any instruction; what it stored before that, in program order, is
// there. So the order of stores below is the format's crash safety, and CompilerFence() keeps it.
//
// A slot header is in one of three states, told apart by `seal` and the parity of `sequence`:
//
//   free      seal 0, even
//   writing   seal 0, odd     `writer` was stored before
//   ready     seal == SealOf(header), even: stored last at commit, zeroed first when the slot
//             leaves its block
//
// The seal finds headers that were half written, flipped bits and payload taken for a header. It
// is no protection against somebody who may write to the arena: see docs/design/0003-daemon.md.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace kvstore {

// Who may write to a slot's payload. id 0: this process, so nobody once it is dead.
struct SlotWriter {
    std::uint64_t id = 0;
    std::uint64_t pid_start = 0;  // in clock ticks since boot, as /proc/PID/stat has it
    std::uint32_t pid = 0;
    std::uint32_t spare = 0;
};
static_assert(sizeof(SlotWriter) == 24);

struct SlotBlock {
    std::uint64_t payload_bytes;
    std::uint64_t checksum;      // XXH3-64 of the payload, set at commit
    std::uint32_t namespace_id;  // the number the namespace has in this arena (StoreCore)
    std::uint32_t depth;         // 1-based place in its chain, 0 when unknown
    BlockHash hash;
    BlockHash parent;
};
static_assert(sizeof(SlotBlock) == 88);

struct SlotHeader {
    // Grows with every change of owner: odd while the slot is written, even otherwise. A reader
    // that finds the value it was granted, after its copy, has read that block's bytes.
    std::atomic<std::uint64_t> sequence;
    SlotBlock block;
    std::atomic<std::uint64_t> seal;
    SlotWriter writer;
};
static_assert(sizeof(SlotHeader) == 128);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

// Never 0. `seed` is the arena's, so that bytes of another arena are no header in this one.
std::uint64_t SealOf(std::uint64_t seed, std::uint64_t sequence, const SlotBlock &block);

// Stores before stay before stores after, as far as the same thread can tell: costs nothing.
inline void CompilerFence() { std::atomic_signal_fence(std::memory_order_seq_cst); }

inline constexpr char kArenaMagic[8] = {'k', 'v', 'a', 'r', 'e', 'n', 'a', '\n'};
inline constexpr std::uint32_t kArenaVersion = 2;
inline constexpr std::size_t kArenaIdBytes = 16;
inline constexpr std::size_t kMetadataBytesMax = 1 << 20;
// Room for the namespaces' numbers, which the core keeps beside the caller's metadata.
inline constexpr std::size_t kMetadataAreaBytes = kMetadataBytesMax + (256 << 10);
// Far above what any number of restarts can reach; a larger one is damage.
inline constexpr std::uint64_t kSequenceLimit = std::uint64_t{1} << 62;

struct Superblock {
    char magic[8];
    std::uint32_t version;
    std::uint32_t page_bytes;
    std::uint8_t arena_id[kArenaIdBytes];
    std::uint64_t total_bytes;
    std::uint64_t chunk_bytes;
    std::uint64_t num_chunks;
    std::uint64_t first_chunk;  // offset
    std::uint64_t metadata;     // offset of copy 0
    std::uint8_t checksum[16];  // BLAKE3 of all before
    // No slot's sequence ever reached the larger of the two: where the next process goes on.
    std::atomic<std::uint64_t> sequence_ceiling[2];
};
static_assert(sizeof(Superblock) <= kPageBytes);

struct MetadataHeader {
    std::uint64_t sequence;  // the copy with the larger one is current; 0: never written
    std::uint64_t bytes;
    std::uint8_t checksum[16];  // BLAKE3 of the two above and the bytes
};

// A chunk of slots of `slot_bytes`, or 0 for none. The second half is a check on the first.
inline std::uint64_t ChunkMark(std::size_t slot_bytes) {
    const auto pages = static_cast<std::uint32_t>(slot_bytes / kPageBytes);
    return pages == 0 ? 0 : std::uint64_t{static_cast<std::uint32_t>(~pages)} << 32 | pages;
}

// Where things lie, from the two sizes an arena is made of.
struct ArenaGeometry {
    std::size_t chunk_bytes = 0;
    std::size_t num_chunks = 0;
    std::size_t first_chunk = 0;
    std::size_t metadata = 0;
    std::size_t total_bytes = 0;

    // REQUIRES: 0 < chunk_bytes <= bytes, a multiple of kPageBytes.
    static ArenaGeometry Of(std::size_t bytes, std::size_t chunk_bytes, bool huge_pages);
};

// Slots of a chunk and where its first payload lies; 0 slots when none fits.
struct ChunkLayout {
    SlotId num_slots = 0;
    std::size_t header_bytes = 0;

    static ChunkLayout Of(std::size_t chunk_bytes, std::size_t slot_bytes);
};

}  // namespace kvstore
