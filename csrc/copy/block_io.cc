#include "copy/block_io.h"

#include <vector>

#include "copy/copy.h"
#include "copy/verify.h"
#include "core/check.h"

namespace kvstore {

PutResult PutBlocks(StoreCore &core, OwnerId owner, NamespaceId ns, const Chain &chain,
                    const CopyPlan &plan, const std::int64_t *ids, int threads) {
    std::vector<ReserveStatus> statuses(chain.n);
    std::vector<Grant> grants(chain.n);
    const std::uint64_t reservation =
        core.Reserve(owner, ns, chain, false, statuses.data(), grants.data());
    PutResult result;
    std::vector<std::int64_t> from;
    std::vector<std::uint8_t *> to;
    const auto is_there = [](ReserveStatus status) {
        return status == ReserveStatus::kReserved || status == ReserveStatus::kPresent;
    };
    while (result.num_leading < chain.n && is_there(statuses[result.num_leading])) {
        ++result.num_leading;
    }
    for (std::size_t i = 0; i < chain.n; ++i) {
        switch (statuses[i]) {
            case ReserveStatus::kReserved:
                from.push_back(ids[i]);
                to.push_back(core.arena().base() + grants[i].payload_offset);
                break;
            case ReserveStatus::kPresent:
                ++result.num_present;
                break;
            case ReserveStatus::kPending:
                ++result.num_pending;
                break;
            case ReserveStatus::kNoSpace:
                ++result.num_no_space;
                break;
            case ReserveStatus::kOrphan:
                ++result.num_orphan;
                break;
        }
    }
    if (reservation == 0) return result;
    std::vector<std::uint64_t> checksums(to.size());
    GatherBlocks(plan, from.data(), to.data(), to.size(), checksums.data(), threads);
    // False when the owner was released meanwhile; then nothing of this put is visible.
    if (core.Commit(owner, reservation, checksums.data(), nullptr, to.size())) {
        result.num_stored = to.size();
    }
    return result;
}

LoadResult LoadBlocks(StoreCore &core, OwnerId owner, NamespaceId ns, const BlockHash *hashes,
                      std::size_t n, const CopyPlan &plan, const std::int64_t *ids, bool verify,
                      int threads) {
    LoadResult result;
    std::vector<Grant> grants(n);
    LeaseId lease = 0;
    std::size_t num_damaged;  // the core counts them
    const std::size_t held = AcquireVerified(core, owner, ns, hashes, n, StoreCore::kNever, true,
                                             &lease, grants.data(), &num_damaged);
    if (held == 0) return result;
    std::vector<const std::uint8_t *> from(held);
    for (std::size_t i = 0; i < held; ++i) {
        from[i] = core.arena().base() + grants[i].payload_offset;
    }
    std::vector<std::uint64_t> checksums(verify ? held : 0);
    ScatterBlocks(plan, ids, from.data(), held, verify ? checksums.data() : nullptr, threads);
    result.num_loaded = held;
    for (std::size_t i = 0; i < checksums.size(); ++i) {
        if (checksums[i] != grants[i].checksum) {
            result.num_loaded = i;
            result.corrupt = true;
            break;
        }
    }
    if (!core.Release(owner, lease))
        return {};  // the owner was released: slots may have been reused
    if (result.corrupt) core.Remove(ns, &hashes[result.num_loaded], 1);
    return result;
}

}  // namespace kvstore
