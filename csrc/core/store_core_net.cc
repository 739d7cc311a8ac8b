// What a server that moves payload for others asks of StoreCore.
#include <mutex>
#include <utility>

#include "core/store_core.h"

namespace kvstore {

LeaseId StoreCore::ShareLease(OwnerId owner, LeaseId lease, std::uint64_t first, std::uint64_t n,
                              std::vector<Grant> *grants) {
    std::unique_lock lock(mutex_);
    EndOverdueLeases();
    const auto it = leases_.find(lease);
    if (it == leases_.end() || it->second.owner != owner) return 0;
    const std::vector<EntryId> &held = it->second.blocks;
    if (n == 0 || first > held.size() || n > held.size() - first) return 0;
    const auto begin = held.begin() + static_cast<std::ptrdiff_t>(first);
    std::vector<EntryId> blocks(begin, begin + static_cast<std::ptrdiff_t>(n));
    grants->clear();
    grants->reserve(blocks.size());
    for (const EntryId id : blocks) {
        ++index_[id].leases;
        grants->push_back(GrantOf(index_[id]));
    }
    const LeaseId shared = next_id_++;
    leases_.emplace(shared, Lease{owner, kNever, std::move(blocks)});
    return shared;
}

}  // namespace kvstore
