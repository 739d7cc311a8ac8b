// What a server that moves payload for others asks of StoreCore.
#include <algorithm>
#include <chrono>
#include <mutex>
#include <utility>

#include "core/store_core.h"

namespace kvstore {

bool StoreCore::ReservationGrants(OwnerId owner, std::uint64_t reservation,
                                  std::vector<Grant> *grants) const {
    std::shared_lock lock(mutex_);
    const auto it = reservations_.find(reservation);
    if (it == reservations_.end() || it->second.owner != owner) return false;
    grants->clear();
    grants->reserve(it->second.blocks.size());
    for (const EntryId id : it->second.blocks) grants->push_back(GrantOf(index_[id]));
    return true;
}

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

std::uint64_t StoreCore::ChangeCount() const {
    const CoreStats stats = Stats();
    return stats.committed * 1000003 + stats.reservations * 10007 + stats.leases * 101 +
           stats.evicted + stats.cpu_used_bytes;
}

std::uint64_t StoreCore::WaitForChange(std::uint64_t seen, std::int64_t deadline_ns) const {
    constexpr std::int64_t kStepNs = 2'000'000;
    while (true) {
        const std::uint64_t now = ChangeCount();
        const std::int64_t time = SteadyNowNs();
        if (now != seen || time >= deadline_ns) return now;
        const std::chrono::steady_clock::time_point until{
            std::chrono::nanoseconds(std::min(deadline_ns, time + kStepNs))};
        std::unique_lock lock(mutex_);
        ++waiters_;
        became_ready_.wait_until(lock, until);
        --waiters_;
    }
}

}  // namespace kvstore
