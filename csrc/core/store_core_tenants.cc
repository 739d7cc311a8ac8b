// Tenants: what each may hold, and who gives when there is no room.
#include <algorithm>
#include <mutex>

#include "core/check.h"
#include "core/store_core.h"

namespace kvstore {

TenantId StoreCore::AddTenant(std::uint64_t cpu_quota_bytes, std::uint64_t ssd_quota_bytes) {
    const std::unique_lock<FairMutex> lock(mutex_);
    Tenant &tenant = tenants_.emplace_back();
    tenant.stats.cpu_quota_bytes = cpu_quota_bytes;
    tenant.stats.ssd_quota_bytes = ssd_quota_bytes;
    cpu_quotas_ += std::min<std::uint64_t>(cpu_quota_bytes, arena_->capacity_bytes());
    if (cpu_quota_bytes == 0) ++tenants_without_quota_;
    return static_cast<TenantId>(tenants_.size() - 1);
}

std::size_t StoreCore::num_tenants() const {
    const std::shared_lock<FairMutex> lock(mutex_);
    return tenants_.size();
}

TenantStats StoreCore::StatsOf(TenantId tenant) const {
    const std::shared_lock<FairMutex> lock(mutex_);
    return tenants_[tenant].stats;
}

std::int64_t StoreCore::OverShare(const Tenant &tenant) const {
    const std::uint64_t capacity = arena_->capacity_bytes();
    std::uint64_t share = std::min<std::uint64_t>(tenant.stats.cpu_quota_bytes, capacity);
    if (share == 0 && cpu_quotas_ < capacity) {
        share = (capacity - cpu_quotas_) / tenants_without_quota_;
    }
    return static_cast<std::int64_t>(tenant.stats.cpu_used_bytes) -
           static_cast<std::int64_t>(share);
}

bool StoreCore::MayTakeFrom(TenantId giver, TenantId taker) const {
    return giver == taker || OverShare(tenants_[giver]) > OverShare(tenants_[taker]);
}

// A chunk may hold blocks of several tenants and the heads of long chains, so it is taken as a
// whole only when no other tenant ends up further below its share than the one that takes.
bool StoreCore::MayTakeAll(const std::vector<EntryId> &leaving, TenantId taker) const {
    std::vector<std::int64_t> taken(tenants_.size());
    for (const EntryId id : leaving) {
        const Entry &entry = index_[id];
        if (entry.slot == kNoSlot) continue;
        taken[namespaces_[entry.namespace_id].tenant] +=
            static_cast<std::int64_t>(arena_->slot_bytes(ClassOf(entry)));
    }
    for (TenantId giver = 0; giver < tenants_.size(); ++giver) {
        if (giver != taker && taken[giver] > 0 &&
            OverShare(tenants_[giver]) - taken[giver] < OverShare(tenants_[taker])) {
            return false;
        }
    }
    return true;
}

// Room for one more slot within the tenant's own quota, from blocks of the same size if possible.
bool StoreCore::MakeRoomInQuota(const NamespaceInfo &space) {
    const TenantStats &stats = tenants_[space.tenant].stats;
    const std::size_t slot_bytes = arena_->slot_bytes(space.size_class);
    while (stats.cpu_quota_bytes != 0 &&
           stats.cpu_used_bytes + slot_bytes > stats.cpu_quota_bytes) {
        bool evicted = EvictOne(space.tenant, space.size_class);
        for (SizeClass other = 0; !evicted && other < classes_.size(); ++other) {
            evicted = EvictOne(space.tenant, other);
        }
        if (!evicted) return false;
    }
    return true;
}

// The tenants that are more over their share than the one that asks, the most first; then that one.
bool StoreCore::EvictForOthers(const NamespaceInfo &space) {
    std::vector<std::pair<std::int64_t, TenantId>> givers;
    for (TenantId tenant = 0; tenant < tenants_.size(); ++tenant) {
        if (tenant != space.tenant && MayTakeFrom(tenant, space.tenant)) {
            givers.emplace_back(-OverShare(tenants_[tenant]), tenant);
        }
    }
    std::sort(givers.begin(), givers.end());
    for (const auto &[over, tenant] : givers) {
        if (EvictOne(tenant, space.size_class)) return true;
    }
    return EvictOne(space.tenant, space.size_class);
}

}  // namespace kvstore
