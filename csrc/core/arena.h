// The cpu tier's memory: one memfd, mapped once, cut into chunks of slots. How its bytes lie is in
// arena_format.h.
//
// A chunk belongs to one size class (one slot size) until all its slots are free, so blocks of
// equal size never fragment the arena, and several block sizes live in one. A slot's payload starts
// on a 4 KiB edge and is padded to 4 KiB, so O_DIRECT reads land in it.
//
// Slot headers lie in the arena, not in our heap: whoever maps the arena can tell whether a slot
// still holds the block it was granted (`sequence`), and a later process can adopt the content.
//
// Invariants: the memory of chunks and headers is allocated when the arena is made (no SIGBUS
// later: a tmpfs ftruncate past its quota succeeds, posix_fallocate does not), sealed against
// shrinking and growing, and never unmapped or moved while the arena lives.
//
// Thread safety: none, but for `sequence`, which readers may load at any time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/arena_format.h"
#include "core/types.h"

namespace kvstore {

using SizeClass = std::uint32_t;

class Arena {
public:
    // Returns null and sets `error` when the memory cannot be had.
    // REQUIRES: chunk_bytes is a multiple of 4 KiB and 0 < chunk_bytes <= bytes.
    static std::unique_ptr<Arena> Create(std::size_t bytes, std::size_t chunk_bytes,
                                         bool huge_pages, std::string *error);
    // Takes over an arena that another process made; keeps a duplicate of `fd`. Returns null and
    // sets `error` when it is not one of this version, whole and sealed. Every chunk is out of use
    // until it was claimed, held or returned (below).
    static std::unique_ptr<Arena> Adopt(int fd, std::string *error);
    ~Arena();
    Arena(const Arena &) = delete;
    Arena &operator=(const Arena &) = delete;

    bool is_adopted() const { return is_adopted_; }
    const std::array<std::uint8_t, kArenaIdBytes> &id() const { return id_; }
    std::uint64_t seal_seed() const { return seal_seed_; }

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
    // The class of these slots if there is one.
    bool FindClass(std::size_t slot_bytes, SizeClass *size_class) const;

    // --- taking over, chunk by chunk
    enum class ChunkRecord { kNone, kSlots, kDamaged };
    // What the chunk table says; `slot_bytes` is set where kSlots, and fits a chunk.
    ChunkRecord RecordedChunk(std::uint32_t chunk, std::size_t *slot_bytes) const;
    // Header i of a chunk, whatever its slot size.
    SlotHeader &chunk_header(std::uint32_t chunk, SlotId i) {
        return *reinterpret_cast<SlotHeader *>(base_ + chunk_offset(chunk) +
                                               i * sizeof(SlotHeader));
    }
    // The chunk is of this class again. is_used[i] for each of its slots; the others are free.
    void ClaimChunk(SizeClass size_class, std::uint32_t chunk, const std::vector<bool> &is_used);
    // The chunk stays out of use until Unhold was called `num_slots` times; for ever when 0.
    void HoldChunk(std::uint32_t chunk, SlotId num_slots);
    void Unhold(std::uint32_t chunk);
    void ReturnUnclaimed(std::uint32_t chunk);
    bool is_held(std::uint32_t chunk) const {
        return chunks_[chunk].owner == kHeld && chunks_[chunk].used > 0;
    }
    SlotId slots_in_chunk(std::size_t slot_bytes) const {
        return ChunkLayout::Of(geometry_.chunk_bytes, slot_bytes).num_slots;
    }

    // No slot's sequence may reach the ceiling before it was raised.
    std::uint64_t sequence_ceiling() const { return sequence_ceiling_; }
    void RaiseSequenceCeiling(std::uint64_t ceiling);

    // The last bytes that were set and lie there undamaged. `found` says what there is.
    enum class MetadataFound { kNever, kDamaged, kWhole };
    std::string Metadata(MetadataFound *found) const;
    // Returns false and sets `error` when there is no memory for them.
    // REQUIRES: bytes.size() <= kMetadataAreaBytes - sizeof(MetadataHeader).
    bool SetMetadata(const std::string &bytes, std::string *error);

    int fd() const { return fd_; }
    std::uint8_t *base() const { return base_; }
    std::size_t bytes() const { return bytes_; }
    std::size_t used_bytes() const { return used_bytes_; }
    std::size_t capacity_bytes() const { return geometry_.num_chunks * geometry_.chunk_bytes; }

private:
    struct Class {
        std::size_t slot_bytes = 0;    // payload rounded up to 4 KiB
        std::size_t header_bytes = 0;  // of a chunk
        SlotId slots_per_chunk = 0;
        std::uint32_t num_chunks = 0;
        std::vector<SlotId> free;
    };
    struct Chunk {
        SizeClass owner = kNobody;
        SlotId used = 0;  // or, when held, slots that hold it
    };

    static constexpr SizeClass kNobody = UINT32_MAX;
    static constexpr SizeClass kHeld = UINT32_MAX - 1;

    Arena(int fd, std::uint8_t *base, const ArenaGeometry &geometry);
    std::size_t chunk_offset(std::uint32_t chunk) const {
        return geometry_.first_chunk + chunk * geometry_.chunk_bytes;
    }
    Superblock &superblock() const { return *reinterpret_cast<Superblock *>(base_); }
    void MarkChunk(std::uint32_t chunk, std::size_t slot_bytes);
    void TakeIdentity();
    MetadataFound ReadMetadata(std::size_t copy, std::uint64_t *sequence, std::string *bytes) const;
    void ReturnChunk(SizeClass size_class, std::uint32_t chunk);

    const int fd_;
    std::uint8_t *const base_;
    const ArenaGeometry geometry_;
    const std::size_t bytes_;
    std::array<std::uint8_t, kArenaIdBytes> id_{};
    bool is_adopted_ = false;
    std::uint64_t seal_seed_ = 0;
    std::uint64_t sequence_ceiling_ = 0;
    std::size_t used_bytes_ = 0;
    std::vector<Class> classes_;
    std::vector<Chunk> chunks_;
    std::vector<std::uint32_t> unassigned_;
};

}  // namespace kvstore
