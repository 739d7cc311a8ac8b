#include "copy/verify.h"

#include <vector>

#include "copy/copy.h"

namespace kvstore {

namespace {

// Blocks are checked once after an adoption, while somebody waits for them.
constexpr int kThreads = 4;

// The first of the granted blocks that is damaged, or `held`. Tells the core of the sound ones.
// Ends after `max_bytes` with `*is_left` set.
std::size_t CheckUnverified(StoreCore &core, NamespaceId ns, const BlockHash *hashes, Grant *grants,
                            std::size_t held, std::size_t max_bytes, bool *is_left) {
    std::vector<std::size_t> places;
    std::vector<const std::uint8_t *> blocks;
    for (std::size_t i = 0; i < held; ++i) {
        if (!grants[i].unverified) continue;
        if (!places.empty() && places.size() >= max_bytes / core.block_bytes(ns)) {
            *is_left = true;
            break;
        }
        places.push_back(i);
        blocks.push_back(core.arena().base() + grants[i].payload_offset);
    }
    if (places.empty()) return held;
    std::vector<std::uint64_t> checksums(places.size());
    ChecksumBlocks(blocks.data(), blocks.size(), core.block_bytes(ns), checksums.data(), kThreads);
    std::vector<BlockHash> sound;
    std::vector<std::uint64_t> sequences;
    std::size_t damaged = held;
    for (std::size_t i = 0; i < places.size() && damaged == held; ++i) {
        Grant &grant = grants[places[i]];
        if (checksums[i] == grant.checksum) {
            sound.push_back(hashes[places[i]]);
            sequences.push_back(grant.sequence);
            grant.unverified = false;
        } else {
            damaged = places[i];
        }
    }
    core.MarkVerified(ns, sound.data(), sequences.data(), sound.size());
    return damaged;
}

}  // namespace

std::size_t AcquireVerified(StoreCore &core, OwnerId owner, NamespaceId ns, const BlockHash *hashes,
                            std::size_t n, std::int64_t expires_ns, bool use, LeaseId *lease,
                            Grant *grants, std::size_t *num_damaged, std::size_t max_bytes,
                            bool *is_left) {
    *num_damaged = 0;
    for (;;) {
        bool some_left = false;
        const std::size_t held = core.Acquire(owner, ns, hashes, n, expires_ns, use, lease, grants);
        const std::size_t sound =
            CheckUnverified(core, ns, hashes, grants, held, max_bytes, &some_left);
        if (sound == held && !some_left) return held;
        // What follows the damaged block goes with it, so the lease is taken anew without it.
        core.Release(owner, *lease);
        if (sound == held) {
            *is_left = true;
            *lease = 0;
            return 0;
        }
        *num_damaged += core.RemoveDamaged(ns, hashes[sound], grants[sound].sequence);
        n = sound;
    }
}

}  // namespace kvstore
