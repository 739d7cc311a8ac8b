// What can be seen of a store while it works: waiting for a change, events, counts.
#include <chrono>
#include <mutex>

#include "core/store_core.h"

namespace kvstore {

namespace {

using ReadLock = std::shared_lock<FairMutex>;
using WriteLock = std::unique_lock<FairMutex>;

}  // namespace

std::size_t StoreCore::WaitFor(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                               std::int64_t start, std::size_t want,
                               std::int64_t deadline_ns) const {
    const std::chrono::steady_clock::time_point deadline{std::chrono::nanoseconds(deadline_ns)};
    WriteLock lock(mutex_);
    ++waiters_;
    std::size_t matched = index_.MatchPrefix(ns, hashes, n, start);
    while (matched < want &&
           became_ready_.wait_until(lock, deadline) == std::cv_status::no_timeout) {
        matched = index_.MatchPrefix(ns, hashes, n, start);
    }
    --waiters_;
    return index_.MatchPrefix(ns, hashes, n, start);
}

// Called with the lock held, after the change.
void StoreCore::Changed() {
    change_count_.fetch_add(1, std::memory_order_seq_cst);
    if (change_waiters_.load(std::memory_order_seq_cst) == 0) return;
    {
        const std::lock_guard<std::mutex> lock(change_mutex_);
    }
    change_.notify_all();
}

std::uint64_t StoreCore::WaitForChange(std::uint64_t seen, std::int64_t deadline_ns) const {
    const std::chrono::steady_clock::time_point deadline{std::chrono::nanoseconds(deadline_ns)};
    std::unique_lock<std::mutex> lock(change_mutex_);
    change_waiters_.fetch_add(1, std::memory_order_seq_cst);
    change_.wait_until(lock, deadline,
                       [&] { return change_count_.load(std::memory_order_seq_cst) != seen; });
    change_waiters_.fetch_sub(1, std::memory_order_seq_cst);
    return ChangeCount();
}

namespace {

std::uint64_t GhostKey(NamespaceId ns, const BlockHash &hash) {
    return hash.Prefix64() ^ (ns * 0x9E3779B97F4A7C15ull);
}

}  // namespace

void StoreCore::RememberEvicted(const Entry &entry) {
    if (ghosts_ != nullptr) ghosts_->Push(GhostKey(entry.namespace_id, entry.hash), 1);
}

MissReason StoreCore::Why(NamespaceId ns, const BlockHash &hash) {
    {
        ReadLock lock(mutex_);
        const EntryId id = index_.Find(ns, hash);
        if (id != kNoEntry) {
            return index_[id].available() ? MissReason::kAvailable : MissReason::kPending;
        }
        if (ghosts_ != nullptr) {
            return ghosts_->Has(GhostKey(ns, hash)) ? MissReason::kEvicted : MissReason::kAbsent;
        }
    }
    WriteLock lock(mutex_);
    if (ghosts_ == nullptr) ghosts_ = std::make_unique<GhostQueue<std::uint8_t>>(kGhosts);
    return MissReason::kAbsent;
}

void StoreCore::EnableEvents(std::size_t capacity) {
    WriteLock lock(mutex_);
    events_capacity_ = capacity;
}

void StoreCore::Emit(EventKind kind, TierKind tier, const Entry &entry) {
    if (muted_) return;
    NamespaceInfo &space = namespaces_[entry.namespace_id];
    ++space.event_sequence;
    if (events_capacity_ == 0) return;
    if (space.events.size() == events_capacity_) space.events.pop_front();
    Event event;
    event.sequence = space.event_sequence;
    event.kind = kind;
    event.tier = tier;
    event.namespace_id = entry.namespace_id;
    event.hash = entry.hash;
    event.parent = ParentHash(entry);
    event.depth = entry.depth;
    space.events.push_back(event);
}

std::uint64_t StoreCore::EventSequence(NamespaceId ns) const {
    ReadLock lock(mutex_);
    return namespaces_[ns].event_sequence;
}

std::vector<Event> StoreCore::EventsAfter(NamespaceId ns, std::uint64_t after) const {
    ReadLock lock(mutex_);
    const std::deque<Event> &events = namespaces_[ns].events;
    if (events.empty() || after >= events.back().sequence) return {};
    const std::uint64_t seen =
        after + 1 > events.front().sequence ? after + 1 - events.front().sequence : 0;
    return {events.begin() + static_cast<std::ptrdiff_t>(seen), events.end()};
}

CoreStats StoreCore::Stats() const {
    ReadLock lock(mutex_);
    CoreStats stats = stats_;
    stats.cpu_used_bytes = arena_->used_bytes();
    stats.cpu_capacity_bytes = arena_->capacity_bytes();
    stats.index_bytes = index_.memory_bytes();
    stats.leases = leases_.size();
    stats.reservations = reservations_.size();
    for (const auto &[id, held] : quarantine_) stats.quarantined += held.slots.size();
    return stats;
}

}  // namespace kvstore
