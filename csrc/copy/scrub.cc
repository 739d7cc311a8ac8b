#include "copy/scrub.h"

#include <algorithm>
#include <vector>

#include "copy/copy.h"

namespace kvstore {

namespace {

// At most this share of the arena is pinned at a time.
constexpr std::size_t kPinnedShare = 64;
constexpr std::size_t kPinnedBytesMax = 1 << 20;

}  // namespace

ScrubResult Scrub(StoreCore &core, std::uint64_t cursor, std::size_t max_bytes) {
    const std::size_t pinned_max =
        std::min(kPinnedBytesMax, core.arena().capacity_bytes() / kPinnedShare);
    const OwnerId owner = core.NewOwner();
    ScrubResult result;
    result.cursor = cursor;
    std::vector<StoreCore::ScrubBlock> blocks;
    do {
        const std::size_t left = max_bytes - std::min<std::size_t>(max_bytes, result.bytes);
        const LeaseId lease =
            core.AcquireForScrub(owner, &result.cursor, std::min(left, pinned_max), &blocks);
        std::vector<bool> damaged(blocks.size());
        for (std::size_t i = 0; i < blocks.size(); ++i) {
            const auto &block = blocks[i];
            const std::uint8_t *payload = core.arena().base() + block.grant.payload_offset;
            damaged[i] = Xxh3(payload, block.payload_bytes) != block.grant.checksum;
            result.bytes += block.payload_bytes;
            if (!damaged[i] && block.grant.unverified) {
                core.MarkVerified(block.namespace_id, &block.hash, &block.grant.sequence, 1);
            }
        }
        if (lease != 0) core.Release(owner, lease);
        for (std::size_t i = 0; i < blocks.size(); ++i) {
            if (!damaged[i]) continue;
            result.num_damaged += core.RemoveDamaged(blocks[i].namespace_id, blocks[i].hash,
                                                     blocks[i].grant.sequence);
        }
    } while (result.cursor != 0 && result.bytes < max_bytes);
    core.ReleaseOwner(owner);
    return result;
}

}  // namespace kvstore
