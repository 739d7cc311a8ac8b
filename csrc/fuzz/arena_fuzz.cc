// Feeds a damaged arena to adoption.
//
// The first call makes a whole arena: two namespaces of different block sizes, chains, a block
// being written, a removed one, metadata. An input is a byte of options and patches (offset u32,
// length u8, bytes); with kReseal, the checksums of the superblock and of all slot headers are made
// right again, with kCut, the memory is cut short.
//
// Checked beyond what the sanitizers see: every block that is granted afterwards has the bytes of
// its checksum, the store can still be filled and emptied, and nothing is in use at the end.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "copy/copy.h"
#include "copy/verify.h"
#include "core/arena_checks.h"
#include "core/arena_format.h"
#include "core/check.h"
#include "core/store_core.h"

namespace {

using namespace kvstore;

constexpr std::size_t kArenaBytes = 256 << 10;
constexpr std::size_t kChunkBytes = 64 << 10;
constexpr std::size_t kSmall = 4096;
constexpr std::size_t kLarge = 12000;
constexpr std::uint8_t kReseal = 1;
constexpr std::uint8_t kCut = 2;
constexpr std::size_t kHashes = 12;

BlockHash HashOf(std::uint8_t seed) {
    BlockHash hash{};
    std::memset(hash.bytes, seed + 1, sizeof(hash.bytes));
    return hash;
}

std::vector<BlockHash> ChainOf(std::uint8_t seed, std::size_t n) {
    std::vector<BlockHash> hashes;
    for (std::size_t i = 0; i < n; ++i) {
        hashes.push_back(HashOf(static_cast<std::uint8_t>(seed + i)));
    }
    return hashes;
}

// Puts a chain; leaves it reserved when not `commit`.
void Put(StoreCore &core, OwnerId owner, NamespaceId ns, const std::vector<BlockHash> &hashes,
         bool commit) {
    const std::size_t size = core.block_bytes(ns);
    std::vector<ReserveStatus> statuses(hashes.size());
    std::vector<Grant> grants(hashes.size());
    const Chain chain{hashes.data(), hashes.size(), 0, nullptr};
    const std::uint64_t id = core.Reserve(owner, ns, chain, false, statuses.data(), grants.data());
    if (id == 0 || !commit) return;
    std::vector<std::uint64_t> sums;
    for (std::size_t i = 0; i < hashes.size(); ++i) {
        if (statuses[i] != ReserveStatus::kReserved) continue;
        std::uint8_t *payload = core.arena().base() + grants[i].payload_offset;
        std::memset(payload, hashes[i].bytes[0], size);
        sums.push_back(Xxh3(payload, size));
    }
    KV_CHECK(core.Commit(owner, id, sums.data(), nullptr, sums.size()));
}

// A whole arena's bytes.
const std::vector<std::uint8_t> &Template() {
    static const std::vector<std::uint8_t> bytes = [] {
        std::string error;
        auto arena = Arena::Create(kArenaBytes, kChunkBytes, false, &error);
        KV_CHECK(arena != nullptr);
        StoreCore core(std::move(arena), "lru");
        NamespaceId small = 0, large = 0;
        KV_CHECK(core.AddNamespace(kSmall, &small) && core.AddNamespace(kLarge, &large));
        KV_CHECK(core.SetMetadata("two namespaces", &error));
        const OwnerId owner = core.NewOwner({7, 1, 1, 0});
        Put(core, owner, small, ChainOf(0, 6), true);
        Put(core, owner, large, ChainOf(100, 4), true);
        Put(core, owner, small, ChainOf(50, 2), false);
        const std::vector<BlockHash> gone = ChainOf(5, 1);
        core.Remove(small, gone.data(), 1);
        return std::vector<std::uint8_t>(core.arena().base(),
                                         core.arena().base() + core.arena().bytes());
    }();
    return bytes;
}

// Seals the superblock, and each slot header that lies where the chunk table says.
void Reseal(std::vector<std::uint8_t> *bytes) {
    auto &super = *reinterpret_cast<Superblock *>(bytes->data());
    SuperblockChecksum(super, super.checksum);
    std::uint64_t seed;
    std::memcpy(&seed, super.arena_id, sizeof(seed));
    const ArenaGeometry geometry = ArenaGeometry::Of(kArenaBytes, kChunkBytes, false);
    for (std::size_t chunk = 0; chunk < geometry.num_chunks; ++chunk) {
        std::uint32_t pages;
        std::memcpy(&pages, bytes->data() + kPageBytes + chunk * 8, sizeof(pages));
        const ChunkLayout layout = ChunkLayout::Of(kChunkBytes, std::size_t{pages} * kPageBytes);
        std::uint8_t *headers = bytes->data() + geometry.first_chunk + chunk * kChunkBytes;
        for (SlotId slot = 0; pages > 0 && slot < layout.num_slots; ++slot) {
            auto &header = *reinterpret_cast<SlotHeader *>(headers + slot * sizeof(SlotHeader));
            header.seal.store(SealOf(seed, header.sequence.load(), header.block));
        }
    }
}

int Memfd(const std::vector<std::uint8_t> &bytes) {
    const int fd = memfd_create("kvstore-fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    KV_CHECK(fd >= 0 && ftruncate(fd, static_cast<off_t>(bytes.size())) == 0);
    KV_CHECK(pwrite(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()));
    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
    return fd;
}

void CheckBlocks(StoreCore &core, OwnerId owner, NamespaceId ns) {
    const std::size_t size = core.block_bytes(ns);
    for (int seed = 0; seed < 256; ++seed) {
        const BlockHash hash = HashOf(static_cast<std::uint8_t>(seed));
        LeaseId lease = 0;
        Grant grant;
        std::size_t damaged = 0;
        if (AcquireVerified(core, owner, ns, &hash, 1, StoreCore::kNever, true, &lease, &grant,
                            &damaged) == 0) {
            continue;
        }
        KV_CHECK(grant.payload_offset + size <= core.arena().bytes());
        KV_CHECK(Xxh3(core.arena().base() + grant.payload_offset, size) == grant.checksum);
        KV_CHECK(core.Release(owner, lease));
    }
}

void Use(std::unique_ptr<Arena> arena) {
    StoreCore core(std::move(arena), "lru");
    NamespaceId small = 0, large = 0;
    if (!core.AddNamespace(kSmall, &small) || !core.AddNamespace(kLarge, &large)) return;
    core.Recover({{0, small}, {1, large}});
    const OwnerId owner = core.NewOwner();
    CheckBlocks(core, owner, small);
    CheckBlocks(core, owner, large);
    for (const Quarantined &held : core.Quarantine()) core.ReleaseQuarantine(held.writer.id);
    Put(core, owner, small, ChainOf(0, kHashes), true);
    Put(core, owner, large, ChainOf(200, kHashes), true);
    CheckBlocks(core, owner, small);
    core.Clear(small);
    core.Clear(large);
    const CoreStats stats = core.Stats();
    KV_CHECK(stats.cpu_used_bytes == 0 && stats.blocks == 0 && stats.leases == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    if (size < 1) return 0;
    const std::uint8_t options = data[0];
    std::vector<std::uint8_t> bytes = Template();
    for (std::size_t at = 1; at + 5 <= size;) {
        std::uint32_t offset;
        std::memcpy(&offset, data + at, sizeof(offset));
        const std::size_t n = std::min<std::size_t>(data[at + 4], size - at - 5);
        offset %= bytes.size();
        std::memcpy(bytes.data() + offset, data + at + 5, std::min(n, bytes.size() - offset));
        at += 5 + n;
    }
    if (options & kReseal) Reseal(&bytes);
    if (options & kCut) bytes.resize(bytes.size() / (2 + (options >> 4)));
    const int fd = Memfd(bytes);
    std::string error;
    auto arena = Arena::Adopt(fd, &error);
    close(fd);
    if (arena == nullptr) {
        KV_CHECK(!error.empty());
    } else {
        Use(std::move(arena));
    }
    return 0;
}
