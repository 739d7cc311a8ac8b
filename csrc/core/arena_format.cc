#include "core/arena_format.h"

#include <cstring>

#include "core/mapping.h"

namespace kvstore {

namespace {

std::size_t RoundUp(std::size_t bytes, std::size_t unit) {
    return (bytes + unit - 1) / unit * unit;
}

std::uint64_t Fold(std::uint64_t a, std::uint64_t b) {
    const unsigned __int128 product =
        static_cast<unsigned __int128>(a ^ 0x9E3779B97F4A7C15ull) * (b ^ 0xD6E8FEB86659FD93ull);
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

}  // namespace

std::uint64_t SealOf(std::uint64_t seed, std::uint64_t sequence, const SlotBlock &block) {
    std::uint64_t words[sizeof(SlotBlock) / 8];
    std::memcpy(words, &block, sizeof(words));
    static_assert(sizeof(words) / 8 == 11);
    std::uint64_t seal = Fold(seed ^ sequence, words[0]);
    for (int i = 1; i < 11; i += 2) seal = Fold(seal ^ words[i], words[i + 1]);
    return seal == 0 ? 1 : seal;
}

ArenaGeometry ArenaGeometry::Of(std::size_t bytes, std::size_t chunk_bytes, bool huge_pages) {
    ArenaGeometry made;
    made.chunk_bytes = chunk_bytes;
    made.num_chunks = bytes / chunk_bytes;
    made.first_chunk = kPageBytes + RoundUp(made.num_chunks * sizeof(std::uint64_t), kPageBytes);
    made.metadata = made.first_chunk + made.num_chunks * chunk_bytes;
    made.total_bytes =
        RoundUp(made.metadata + 2 * kMetadataAreaBytes, huge_pages ? kHugePageBytes : kPageBytes);
    return made;
}

ChunkLayout ChunkLayout::Of(std::size_t chunk_bytes, std::size_t slot_bytes) {
    ChunkLayout layout;
    std::size_t slots = slot_bytes == 0 ? 0 : chunk_bytes / slot_bytes;
    const auto header_bytes = [](std::size_t n) {
        return RoundUp(n * sizeof(SlotHeader), kPageBytes);
    };
    while (slots > 0 && header_bytes(slots) + slots * slot_bytes > chunk_bytes) --slots;
    layout.num_slots = static_cast<SlotId>(slots);
    layout.header_bytes = header_bytes(slots);
    return layout;
}

}  // namespace kvstore
