// Taking over an arena, and the metadata in it. Nothing read here is trusted before it was checked:
// the descriptor may be anybody's file.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/arena.h"
#include "core/arena_checks.h"
#include "core/blake3.h"
#include "core/check.h"
#include "core/mapping.h"

namespace kvstore {

namespace {

bool ReadAt(int fd, void *to, std::size_t bytes, std::size_t offset) {
    auto *at = static_cast<char *>(to);
    while (bytes > 0) {
        const ssize_t got = pread(fd, at, bytes, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        at += got;
        offset += static_cast<std::size_t>(got);
        bytes -= static_cast<std::size_t>(got);
    }
    return true;
}

void Checksum16(const std::uint8_t *data, std::size_t bytes, std::uint8_t out[16]) {
    std::uint8_t whole[32];
    Blake3(PickBlake3Compress(), data, bytes, nullptr, whole);
    std::memcpy(out, whole, 16);
}

// What is wrong with the superblock; empty when nothing is.
std::string Check(const Superblock &block, std::size_t file_bytes, ArenaGeometry *geometry) {
    if (std::memcmp(block.magic, kArenaMagic, sizeof(kArenaMagic)) != 0) return "is no arena";
    if (block.version != kArenaVersion) {
        return "has version " + std::to_string(block.version) + ", this is version " +
               std::to_string(kArenaVersion);
    }
    std::uint8_t checksum[16];
    SuperblockChecksum(block, checksum);
    if (std::memcmp(checksum, block.checksum, sizeof(checksum)) != 0) {
        return "has a damaged superblock (checksum)";
    }
    if (block.total_bytes != file_bytes) {
        return "has " + std::to_string(file_bytes) + " bytes, its superblock says " +
               std::to_string(block.total_bytes);
    }
    if (block.page_bytes != kPageBytes || block.chunk_bytes == 0 ||
        block.chunk_bytes % kPageBytes != 0 || block.chunk_bytes > file_bytes ||
        block.num_chunks == 0 || block.num_chunks > file_bytes / block.chunk_bytes) {
        return "has a superblock that makes no sense";
    }
    for (const bool huge_pages : {false, true}) {
        *geometry =
            ArenaGeometry::Of(block.num_chunks * block.chunk_bytes, block.chunk_bytes, huge_pages);
        if (geometry->total_bytes == file_bytes && geometry->first_chunk == block.first_chunk &&
            geometry->metadata == block.metadata) {
            return "";
        }
    }
    return "has a superblock that makes no sense";
}

}  // namespace

void SuperblockChecksum(const Superblock &block, std::uint8_t out[16]) {
    Checksum16(reinterpret_cast<const std::uint8_t *>(&block), offsetof(Superblock, checksum), out);
}

void MetadataChecksum(const MetadataHeader &header, const void *bytes, std::uint8_t out[16]) {
    std::string all(reinterpret_cast<const char *>(&header), offsetof(MetadataHeader, checksum));
    all.append(static_cast<const char *>(bytes), header.bytes);
    Checksum16(reinterpret_cast<const std::uint8_t *>(all.data()), all.size(), out);
}

std::unique_ptr<Arena> Arena::Adopt(int given, std::string *error) {
    const auto fail = [&](const std::string &what) {
        *error = "the descriptor " + what;
        return nullptr;
    };
    struct stat status;
    if (fstat(given, &status) != 0) return fail(std::string("is not open: ") + strerror(errno));
    if (!S_ISREG(status.st_mode)) return fail("is no memory file");
    const int seals = fcntl(given, F_GET_SEALS);
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || (seals & F_SEAL_GROW) == 0) {
        return fail("is not sealed against shrinking and growing");
    }
    const auto file_bytes = static_cast<std::size_t>(status.st_size);
    Superblock block{};
    if (file_bytes < kPageBytes || !ReadAt(given, &block, sizeof(block), 0)) {
        return fail("is too short for an arena");
    }
    ArenaGeometry geometry;
    const std::string wrong = Check(block, file_bytes, &geometry);
    if (!wrong.empty()) return fail(wrong);
    // A hole could not be filled later, or only by taking memory that nobody was asked for.
    if (static_cast<std::size_t>(status.st_blocks) * 512 < geometry.metadata) {
        return fail("has less memory than its size");
    }
    const int fd = fcntl(given, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) return fail(std::string("cannot be duplicated: ") + strerror(errno));
    void *base = MapOnHugeEdge(geometry.total_bytes, fd);
    if (base == nullptr) {
        const int failed = errno;
        close(fd);
        return fail(std::string("cannot be mapped for writing: ") + strerror(failed));
    }
    auto arena = std::unique_ptr<Arena>(new Arena(fd, static_cast<std::uint8_t *>(base), geometry));
    arena->TakeIdentity();
    arena->is_adopted_ = true;
    for (Chunk &chunk : arena->chunks_) chunk.owner = kHeld;
    return arena;
}

void Arena::TakeIdentity() {
    const Superblock &block = superblock();
    std::memcpy(id_.data(), block.arena_id, id_.size());
    std::memcpy(&seal_seed_, block.arena_id, sizeof(seal_seed_));
    for (const auto &ceiling : block.sequence_ceiling) {
        const std::uint64_t value = ceiling.load(std::memory_order_relaxed);
        if (value < kSequenceLimit) sequence_ceiling_ = std::max(sequence_ceiling_, value);
    }
}

void Arena::RaiseSequenceCeiling(std::uint64_t ceiling) {
    KV_CHECK(ceiling > sequence_ceiling_);
    sequence_ceiling_ = ceiling;
    // One after the other: whatever instruction is the last, one of them is right.
    for (auto &copy : superblock().sequence_ceiling) {
        copy.store(ceiling, std::memory_order_release);
        CompilerFence();
    }
}

Arena::ChunkRecord Arena::RecordedChunk(std::uint32_t chunk, std::size_t *slot_bytes) const {
    const auto *table = reinterpret_cast<const std::atomic<std::uint64_t> *>(base_ + kPageBytes);
    const std::uint64_t mark = table[chunk].load(std::memory_order_relaxed);
    if (mark == 0) return ChunkRecord::kNone;
    *slot_bytes = std::size_t{static_cast<std::uint32_t>(mark)} * kPageBytes;
    if (mark != ChunkMark(*slot_bytes) || *slot_bytes > geometry_.chunk_bytes ||
        ChunkLayout::Of(geometry_.chunk_bytes, *slot_bytes).num_slots == 0) {
        return ChunkRecord::kDamaged;
    }
    return ChunkRecord::kSlots;
}

void Arena::ClaimChunk(SizeClass size_class, std::uint32_t chunk,
                       const std::vector<bool> &is_used) {
    Class &owner = classes_[size_class];
    KV_CHECK(chunks_[chunk].owner == kHeld && is_used.size() == owner.slots_per_chunk);
    chunks_[chunk].owner = size_class;
    ++owner.num_chunks;
    const SlotId first = chunk * owner.slots_per_chunk;
    for (SlotId i = owner.slots_per_chunk; i-- > 0;) {
        if (is_used[i]) {
            ++chunks_[chunk].used;
            used_bytes_ += owner.slot_bytes;
        } else {
            owner.free.push_back(first + i);
        }
    }
}

void Arena::HoldChunk(std::uint32_t chunk, SlotId num_slots) {
    KV_CHECK(chunks_[chunk].owner == kHeld);
    chunks_[chunk].used = num_slots;
}

void Arena::Unhold(std::uint32_t chunk) {
    KV_CHECK(chunks_[chunk].owner == kHeld && chunks_[chunk].used > 0);
    if (--chunks_[chunk].used == 0) ReturnUnclaimed(chunk);
}

void Arena::ReturnUnclaimed(std::uint32_t chunk) {
    KV_CHECK(chunks_[chunk].owner == kHeld);
    chunks_[chunk].owner = kNobody;
    MarkChunk(chunk, 0);
    unassigned_.push_back(chunk);
}

Arena::MetadataFound Arena::ReadMetadata(std::size_t copy, std::uint64_t *sequence,
                                         std::string *bytes) const {
    const std::size_t at = geometry_.metadata + copy * kMetadataAreaBytes;
    MetadataHeader header;
    if (!ReadAt(fd_, &header, sizeof(header), at)) return MetadataFound::kDamaged;
    const MetadataHeader never{};
    if (std::memcmp(&header, &never, sizeof(header)) == 0) return MetadataFound::kNever;
    if (header.bytes > kMetadataAreaBytes - sizeof(header)) return MetadataFound::kDamaged;
    bytes->resize(header.bytes);
    std::uint8_t checksum[16];
    if (!ReadAt(fd_, bytes->data(), bytes->size(), at + sizeof(header))) {
        return MetadataFound::kDamaged;
    }
    MetadataChecksum(header, bytes->data(), checksum);
    if (std::memcmp(checksum, header.checksum, sizeof(checksum)) != 0) {
        return MetadataFound::kDamaged;
    }
    *sequence = header.sequence;
    return MetadataFound::kWhole;
}

std::string Arena::Metadata(MetadataFound *found) const {
    std::string copies[2];
    std::uint64_t sequences[2] = {};
    const MetadataFound states[2] = {ReadMetadata(0, &sequences[0], &copies[0]),
                                     ReadMetadata(1, &sequences[1], &copies[1])};
    *found = std::max(states[0], states[1]);  // whole above damaged above never
    if (*found != MetadataFound::kWhole) return "";
    const bool second = states[0] != MetadataFound::kWhole ||
                        (states[1] == MetadataFound::kWhole && sequences[1] > sequences[0]);
    return std::move(copies[second]);
}

bool Arena::SetMetadata(const std::string &bytes, std::string *error) {
    KV_CHECK(bytes.size() <= kMetadataAreaBytes - sizeof(MetadataHeader));
    std::string ignored;
    std::uint64_t sequences[2] = {};  // 0 where damaged: that one is written over
    for (std::size_t copy = 0; copy < 2; ++copy) ReadMetadata(copy, &sequences[copy], &ignored);
    const std::size_t copy = sequences[1] > sequences[0] ? 0 : 1;
    const std::size_t at = geometry_.metadata + copy * kMetadataAreaBytes;
    const std::size_t taken = sizeof(MetadataHeader) + bytes.size();
    const int failed = posix_fallocate(fd_, static_cast<off_t>(at), static_cast<off_t>(taken));
    // Of huge pages everything was taken at the start, and there is nothing to ask for.
    if (failed != 0 && failed != EOPNOTSUPP && failed != EINVAL) {
        *error = std::string("no memory for the metadata: ") + std::strerror(failed);
        return false;
    }
    auto *there = reinterpret_cast<MetadataHeader *>(base_ + at);
    MetadataHeader header{};
    header.sequence = std::max(sequences[0], sequences[1]) + 1;
    header.bytes = bytes.size();
    MetadataChecksum(header, bytes.data(), header.checksum);
    std::memset(there->checksum, 0, sizeof(there->checksum));
    CompilerFence();
    std::memcpy(base_ + at + sizeof(header), bytes.data(), bytes.size());
    CompilerFence();
    std::memcpy(there, &header, sizeof(header));
    return true;
}

}  // namespace kvstore
