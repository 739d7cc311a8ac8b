#include "core/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

#include "core/arena_checks.h"
#include "core/check.h"
#include "core/mapping.h"

// Since Linux 5.14 and 6.1; older C libraries do not name them, older kernels answer EINVAL.
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace kvstore {

namespace {

std::size_t RoundUp(std::size_t bytes) { return (bytes + kPageBytes - 1) & ~(kPageBytes - 1); }

std::string Describe(const char *what, int error) {
    return std::string(what) + ": " + std::strerror(error);
}

}  // namespace

std::unique_ptr<Arena> Arena::Create(std::size_t bytes, std::size_t chunk_bytes, bool huge_pages,
                                     std::string *error) {
    KV_CHECK(chunk_bytes > 0 && chunk_bytes % kPageBytes == 0 && chunk_bytes <= bytes);
    const ArenaGeometry geometry = ArenaGeometry::Of(bytes, chunk_bytes, huge_pages);
    const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge_pages ? MFD_HUGETLB : 0u);
    const int fd = memfd_create("kvstore-arena", flags);
    if (fd < 0) {
        *error = Describe("memfd_create", errno);
        return nullptr;
    }
    // The metadata's memory is taken when there is some; of huge pages a hole could not be filled.
    const std::size_t taken = huge_pages ? geometry.total_bytes : geometry.metadata;
    int failed = posix_fallocate(fd, 0, static_cast<off_t>(taken));
    if (failed == 0 && ftruncate(fd, static_cast<off_t>(geometry.total_bytes)) != 0) failed = errno;
    if (failed != 0) {
        *error = Describe("posix_fallocate", failed);
        close(fd);
        return nullptr;
    }
    std::array<std::uint8_t, kArenaIdBytes> id;
    if (fchmod(fd, S_IRUSR | S_IWUSR) != 0 || getentropy(id.data(), id.size()) != 0 ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) {
        *error = Describe("memfd", errno);
        close(fd);
        return nullptr;
    }
    void *base = MapOnHugeEdge(geometry.total_bytes, fd);
    if (base == nullptr) {
        *error = Describe("mmap", errno);
        close(fd);
        return nullptr;
    }
    // Best effort, both. With 4 KiB pages a copy out of the arena takes a TLB miss a page and the
    // hardware's prefetch stops at its end; collapsing takes less time than touching them does.
    if (!huge_pages) madvise(base, taken, MADV_COLLAPSE);
    madvise(base, taken, MADV_POPULATE_WRITE);
    auto arena = std::unique_ptr<Arena>(new Arena(fd, static_cast<std::uint8_t *>(base), geometry));
    Superblock &block = arena->superblock();
    std::memcpy(block.magic, kArenaMagic, sizeof(kArenaMagic));
    block.version = kArenaVersion;
    block.page_bytes = kPageBytes;
    std::memcpy(block.arena_id, id.data(), id.size());
    block.total_bytes = geometry.total_bytes;
    block.chunk_bytes = geometry.chunk_bytes;
    block.num_chunks = geometry.num_chunks;
    block.first_chunk = geometry.first_chunk;
    block.metadata = geometry.metadata;
    SuperblockChecksum(block, block.checksum);
    arena->TakeIdentity();
    for (std::uint32_t chunk = arena->num_chunks(); chunk-- > 0;) {
        arena->unassigned_.push_back(chunk);
    }
    return arena;
}

Arena::Arena(int fd, std::uint8_t *base, const ArenaGeometry &geometry)
    : fd_(fd), base_(base), geometry_(geometry), bytes_(geometry.total_bytes) {
    chunks_.resize(geometry.num_chunks);
}

Arena::~Arena() {
    munmap(base_, bytes_);
    close(fd_);
}

bool Arena::FindClass(std::size_t slot_bytes, SizeClass *size_class) const {
    for (SizeClass i = 0; i < classes_.size(); ++i) {
        if (classes_[i].slot_bytes == slot_bytes) {
            *size_class = i;
            return true;
        }
    }
    return false;
}

bool Arena::FindOrAddClass(std::size_t payload_bytes, SizeClass *size_class) {
    const std::size_t slot_bytes = RoundUp(payload_bytes);
    if (FindClass(slot_bytes, size_class)) return true;
    const ChunkLayout layout = ChunkLayout::Of(geometry_.chunk_bytes, slot_bytes);
    if (layout.num_slots == 0) return false;
    Class made;
    made.slot_bytes = slot_bytes;
    made.slots_per_chunk = layout.num_slots;
    made.header_bytes = layout.header_bytes;
    classes_.push_back(std::move(made));
    if (classes_.size() == 2) {  // the first class was alone and kept its empty chunks
        for (std::uint32_t chunk = 0; chunk < num_chunks(); ++chunk) {
            if (chunks_[chunk].owner == 0 && chunks_[chunk].used == 0) ReturnChunk(0, chunk);
        }
    }
    *size_class = static_cast<SizeClass>(classes_.size() - 1);
    return true;
}

SlotId Arena::Allocate(SizeClass size_class) {
    Class &owner = classes_[size_class];
    if (owner.free.empty()) {
        if (unassigned_.empty()) return kNoSlot;
        const std::uint32_t chunk = unassigned_.back();
        unassigned_.pop_back();
        chunks_[chunk].owner = size_class;
        ++owner.num_chunks;
        const SlotId first = chunk * owner.slots_per_chunk;
        for (SlotId i = owner.slots_per_chunk; i-- > 0;) {
            new (&header(size_class, first + i)) SlotHeader{};
            owner.free.push_back(first + i);
        }
        CompilerFence();  // the table never names a chunk whose headers are not made
        MarkChunk(chunk, owner.slot_bytes);
    }
    const SlotId slot = owner.free.back();
    owner.free.pop_back();
    ++chunks_[slot / owner.slots_per_chunk].used;
    used_bytes_ += owner.slot_bytes;
    return slot;
}

void Arena::Free(SizeClass size_class, SlotId slot) {
    Class &owner = classes_[size_class];
    const std::uint32_t chunk = slot / owner.slots_per_chunk;
    KV_CHECK(chunks_[chunk].owner == size_class && chunks_[chunk].used > 0);
    owner.free.push_back(slot);
    used_bytes_ -= owner.slot_bytes;
    // A lone class keeps its chunks: nobody else could use them.
    if (--chunks_[chunk].used == 0 && classes_.size() > 1) ReturnChunk(size_class, chunk);
}

void Arena::ReturnChunk(SizeClass size_class, std::uint32_t chunk) {
    Class &owner = classes_[size_class];
    std::erase_if(owner.free, [&](SlotId slot) { return slot / owner.slots_per_chunk == chunk; });
    chunks_[chunk].owner = kNobody;
    MarkChunk(chunk, 0);
    --owner.num_chunks;
    unassigned_.push_back(chunk);
}

void Arena::MarkChunk(std::uint32_t chunk, std::size_t slot_bytes) {
    auto *table = reinterpret_cast<std::atomic<std::uint64_t> *>(base_ + kPageBytes);
    table[chunk].store(ChunkMark(slot_bytes), std::memory_order_release);
    CompilerFence();
}

SlotId Arena::num_slots(SizeClass size_class) const {
    return num_chunks() * classes_[size_class].slots_per_chunk;
}

SlotId Arena::slots_per_chunk(SizeClass size_class) const {
    return classes_[size_class].slots_per_chunk;
}

std::uint32_t Arena::num_chunks_of(SizeClass size_class) const {
    return classes_[size_class].num_chunks;
}

bool Arena::chunk_belongs(std::uint32_t chunk, SizeClass size_class) const {
    return chunks_[chunk].owner == size_class;
}

std::uint64_t Arena::payload_offset(SizeClass size_class, SlotId slot) const {
    const Class &owner = classes_[size_class];
    const std::uint32_t chunk = slot / owner.slots_per_chunk;
    return chunk_offset(chunk) + owner.header_bytes +
           (slot % owner.slots_per_chunk) * owner.slot_bytes;
}

std::uint64_t Arena::header_offset(SizeClass size_class, SlotId slot) const {
    const Class &owner = classes_[size_class];
    const std::uint32_t chunk = slot / owner.slots_per_chunk;
    return chunk_offset(chunk) + (slot % owner.slots_per_chunk) * sizeof(SlotHeader);
}

}  // namespace kvstore
