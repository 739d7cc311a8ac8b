// The cpu tier's memory: one memfd, mapped once, cut into chunks of slots.
//
//   | arena header, 4 KiB | chunk 0 | chunk 1 | ... |
//   chunk of a size class: | slot headers, 128 B each, up to a 4 KiB edge | slot 0 | slot 1 | ... |
//
// A chunk belongs to one size class (one slot size) until all its slots are free, so blocks of
// equal size never fragment the arena, and several block sizes live in one. A slot's payload starts
// on a 4 KiB edge and is padded to 4 KiB, so O_DIRECT reads land in it.
//
// Slot headers lie in the arena, not in our heap: whoever maps the arena can tell whether a slot
// still holds the block it was granted (`sequence`), and a later process can adopt the content.
//
// Invariants: the memory is allocated when the arena is made (no SIGBUS later: a tmpfs ftruncate
// past its quota succeeds, posix_fallocate does not), sealed against shrinking and growing, and
// never unmapped or moved while the arena lives.
//
// Thread safety: none, but for `sequence`, which readers may load at any time.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/types.h"

namespace kvstore {

using SizeClass = std::uint32_t;

struct SlotHeader {
    // Grows by one with every change of owner: odd while the slot is written, even otherwise. A
    // reader that finds the value it was granted, after its copy, has read that block's bytes.
    std::atomic<std::uint64_t> sequence;
    std::uint64_t payload_bytes;
    std::uint64_t checksum;  // XXH3-64 of the payload, set at commit
    NamespaceId namespace_id;
    std::uint32_t depth;  // 1-based place in its chain, 0 when unknown
    BlockHash hash;
    BlockHash parent;
    std::uint8_t spare[32];
};
static_assert(sizeof(SlotHeader) == 128);

class Arena {
public:
    // Returns null and sets `error` when the memory cannot be had.
    // REQUIRES: chunk_bytes is a multiple of 4 KiB and 0 < chunk_bytes <= bytes.
    static std::unique_ptr<Arena> Create(std::size_t bytes, std::size_t chunk_bytes,
                                         bool huge_pages, std::string *error);
    ~Arena();
    Arena(const Arena &) = delete;
    Arena &operator=(const Arena &) = delete;

    // The class of slots that hold `payload_bytes`; made when new. Returns false when a slot of
    // that size does not fit in a chunk.
    bool FindOrAddClass(std::size_t payload_bytes, SizeClass *size_class);

    // A free slot, or kNoSlot when the class's chunks are full and no chunk is unassigned.
    SlotId Allocate(SizeClass size_class);
    void Free(SizeClass size_class, SlotId slot);

    // Slots of a class are numbered [0, num_slots(class)) as if it had the whole arena.
    SlotId num_slots(SizeClass size_class) const;
    SlotId slots_per_chunk(SizeClass size_class) const;
    std::uint32_t num_chunks() const { return static_cast<std::uint32_t>(chunks_.size()); }
    std::uint32_t num_chunks_of(SizeClass size_class) const;
    std::uint32_t num_classes() const { return static_cast<std::uint32_t>(classes_.size()); }
    bool chunk_belongs(std::uint32_t chunk, SizeClass size_class) const;

    std::uint8_t *payload(SizeClass size_class, SlotId slot) {
        return base_ + payload_offset(size_class, slot);
    }
    std::uint64_t payload_offset(SizeClass size_class, SlotId slot) const;
    std::uint64_t header_offset(SizeClass size_class, SlotId slot) const;
    SlotHeader &header(SizeClass size_class, SlotId slot) {
        return *reinterpret_cast<SlotHeader *>(base_ + header_offset(size_class, slot));
    }
    std::size_t slot_bytes(SizeClass size_class) const { return classes_[size_class].slot_bytes; }

    int fd() const { return fd_; }
    std::uint8_t *base() const { return base_; }
    std::size_t bytes() const { return bytes_; }
    std::size_t used_bytes() const { return used_bytes_; }

private:
    struct Class {
        std::size_t slot_bytes = 0;    // payload rounded up to 4 KiB
        std::size_t header_bytes = 0;  // of a chunk
        SlotId slots_per_chunk = 0;
        std::uint32_t num_chunks = 0;
        std::vector<SlotId> free;
    };
    struct Chunk {
        SizeClass owner = UINT32_MAX;
        SlotId used = 0;
    };

    Arena(int fd, std::uint8_t *base, std::size_t bytes, std::size_t chunk_bytes);
    std::size_t chunk_offset(std::uint32_t chunk) const {
        return kPageBytes + chunk * chunk_bytes_;
    }
    void ReturnChunk(SizeClass size_class, std::uint32_t chunk);

    const int fd_;
    std::uint8_t *const base_;
    const std::size_t bytes_;
    const std::size_t chunk_bytes_;
    std::size_t used_bytes_ = 0;
    std::vector<Class> classes_;
    std::vector<Chunk> chunks_;
    std::vector<std::uint32_t> unassigned_;
};

}  // namespace kvstore
