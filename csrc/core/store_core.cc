#include "core/store_core.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <mutex>
#include <utility>

#include "core/check.h"

namespace kvstore {

namespace {

using ReadLock = std::shared_lock<FairMutex>;
using WriteLock = std::unique_lock<FairMutex>;

// So that nobody waits for the lock for longer than some milliseconds.
constexpr std::size_t kLooksPerTurn = 8192;
constexpr std::size_t kLooksAhead = 256;

}  // namespace

std::int64_t SteadyNowNs() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

StoreCore::StoreCore(std::unique_ptr<Arena> arena, std::string policy)
    : arena_(std::move(arena)),
      policy_name_(std::move(policy)),
      recovering_(arena_->is_adopted()),
      tenants_(1) {
    next_sequence_ = std::max(next_sequence_, arena_->sequence_ceiling());
    arena_->RaiseSequenceCeiling(next_sequence_ + kSequenceStep);
}

bool StoreCore::AddNamespace(std::size_t block_bytes, NamespaceId *ns, TenantId tenant) {
    WriteLock lock(mutex_);
    KV_CHECK(tenant < tenants_.size());
    SizeClass size_class;
    if (!arena_->FindOrAddClass(block_bytes, &size_class)) return false;
    const SlotId num_slots = arena_->num_slots(size_class);
    if (size_class == classes_.size()) {
        classes_.emplace_back().owner_of.assign(num_slots, kNoEntry);
    }
    auto &policies = tenants_[tenant].policies;
    if (policies.size() <= size_class) policies.resize(size_class + 1);
    if (policies[size_class] == nullptr) {
        policies[size_class] = MakeEvictionPolicy(policy_name_, num_slots);
        KV_CHECK(policies[size_class] != nullptr);
    }
    // While recovering, the numbers that are taken are not known yet.
    const std::uint32_t stored_id = recovering_ ? UINT32_MAX : next_stored_id_++;
    namespaces_.push_back({block_bytes, size_class, tenant, stored_id, policies[size_class].get()});
    *ns = static_cast<NamespaceId>(namespaces_.size() - 1);
    return true;
}

std::size_t StoreCore::num_namespaces() const {
    ReadLock lock(mutex_);
    return namespaces_.size();
}

std::size_t StoreCore::block_bytes(NamespaceId ns) const {
    ReadLock lock(mutex_);
    return namespaces_[ns].block_bytes;
}

OwnerId StoreCore::NewOwner(const SlotWriter &writer) {
    WriteLock lock(mutex_);
    if (writer.id != 0) writers_.emplace(next_id_, writer);
    return next_id_++;
}

void StoreCore::ReleaseOwner(OwnerId owner) {
    std::vector<std::uint64_t> unfinished;
    {
        WriteLock lock(mutex_);
        unfinished = EndLeasesOf(owner);
        writers_.erase(owner);
        Changed();
    }
    for (const std::uint64_t id : unfinished) Abort(owner, id);
}

void StoreCore::AbandonOwner(OwnerId owner) {
    {
        WriteLock lock(mutex_);
        const auto known = writers_.find(owner);
        if (known != writers_.end()) {
            const SlotWriter writer = known->second;
            for (const std::uint64_t number : EndLeasesOf(owner)) {
                const auto it = reservations_.find(number);
                const std::vector<EntryId> blocks = std::move(it->second.blocks);
                reservations_.erase(it);
                for (std::size_t i = blocks.size(); i-- > 0;) QuarantineSlot(blocks[i], writer);
            }
        }
    }
    ReleaseOwner(owner);
}

// Ends the owner's leases; returns its reservations.
std::vector<std::uint64_t> StoreCore::EndLeasesOf(OwnerId owner) {
    for (auto it = leases_.begin(); leased_.contains(owner) && it != leases_.end();) {
        if (it->second.owner == owner) {
            EndLease(it->second);
            it = leases_.erase(it);
        } else {
            ++it;
        }
    }
    std::vector<std::uint64_t> unfinished;
    for (const auto &[id, reservation] : reservations_) {
        if (reservation.owner == owner) unfinished.push_back(id);
    }
    return unfinished;
}

// --- looking

std::size_t StoreCore::Match(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                             std::int64_t start) const {
    ReadLock lock(mutex_);
    return index_.MatchPrefix(ns, hashes, n, start);
}

void StoreCore::Residency(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                          std::uint8_t *residency) const {
    std::vector<EntryId> found(std::min(n, kLooksPerTurn));
    for (; n > 0; hashes += found.size(), residency += found.size(), n -= found.size()) {
        found.resize(std::min(n, kLooksPerTurn));
        ReadLock lock(mutex_);
        index_.FindMany(ns, hashes, found.size(), found.data());
        for (std::size_t i = 0; i < found.size(); ++i) {
            residency[i] = 0;
            if (found[i] == kNoEntry) continue;
            const Entry &entry = index_[found[i]];
            residency[i] = static_cast<std::uint8_t>(
                (entry.cpu == CpuState::kReady ? 1 : 0) | (entry.on_ssd() ? 2 : 0) |
                (entry.cpu == CpuState::kWriting || entry.cpu == CpuState::kDone ? 4 : 0));
        }
    }
}

Grant StoreCore::GrantOf(const Entry &entry) const {
    const SizeClass size_class = ClassOf(entry);
    Grant grant;
    grant.payload_offset = arena_->payload_offset(size_class, entry.slot);
    grant.header_offset = arena_->header_offset(size_class, entry.slot);
    grant.sequence =
        arena_->header(size_class, entry.slot).sequence.load(std::memory_order_relaxed);
    grant.checksum = entry.checksum;
    grant.unverified = entry.unverified;
    grant.on_ssd = entry.on_ssd();
    return grant;
}

// --- reading

std::size_t StoreCore::Acquire(OwnerId owner, NamespaceId ns, const BlockHash *hashes,
                               std::size_t n, std::int64_t expires_ns, bool use, LeaseId *lease,
                               Grant *grants) {
    *lease = 0;
    std::vector<EntryId> found(n);
    WriteLock lock(mutex_);
    EndOverdueLeases();
    const auto leased = leased_.find(owner);
    const std::size_t taken = kLeaseCost + (leased == leased_.end() ? 0 : leased->second);
    const std::size_t most = taken < kLeasedMax ? std::min(n, kLeasedMax - taken) : 0;
    std::size_t held = 0;
    std::size_t looked = 0;
    while (held < most) {
        if (held ==
            looked) {  // not all at once: most of a long chain that is not here is no matter
            const std::size_t step = std::min(most - looked, kLooksAhead);
            index_.FindMany(ns, hashes + looked, step, &found[looked]);
            looked += step;
        }
        if (found[held] == kNoEntry || index_[found[held]].cpu != CpuState::kReady) break;
        Entry &entry = index_[found[held]];
        if (entry.leases >= kLeasesMax) break;
        ++entry.leases;
        entry.used = entry.used || use;
        grants[held] = GrantOf(entry);
        ++held;
    }
    if (held == 0) return 0;
    // The tail first, so that what continues a block is never more recent than the block.
    for (std::size_t i = held; use && i-- > 0;) {
        const Entry &entry = index_[found[i]];
        PolicyOf(entry).Touch(entry.slot);
    }
    found.resize(held);
    *lease = AddLease(owner, expires_ns, std::move(found));
    return held;
}

bool StoreCore::Release(OwnerId owner, LeaseId lease) {
    WriteLock lock(mutex_);
    const auto it = leases_.find(lease);
    if (it == leases_.end() || it->second.owner != owner) return false;
    EndLease(it->second);
    leases_.erase(it);
    Changed();
    return true;
}

LeaseId StoreCore::ShareLease(OwnerId owner, LeaseId lease, std::uint64_t first, std::uint64_t n,
                              OwnerId reader, std::vector<Grant> *grants) {
    WriteLock lock(mutex_);
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
    return AddLease(reader, kNever, std::move(blocks));
}

std::size_t StoreCore::ExpireLeases() {
    WriteLock lock(mutex_);
    return EndOverdueLeases();
}

std::size_t StoreCore::EndOverdueLeases() {
    if (expiries_.empty()) return 0;
    const std::int64_t now = SteadyNowNs();
    std::size_t ended = 0;
    while (!expiries_.empty() && expiries_.front().first <= now) {
        std::pop_heap(expiries_.begin(), expiries_.end(), std::greater<>());
        const auto it = leases_.find(expiries_.back().second);
        expiries_.pop_back();
        if (it == leases_.end()) continue;
        EndLease(it->second);
        leases_.erase(it);
        ++ended;
    }
    stats_.leases_expired += ended;
    if (ended > 0) Changed();
    return ended;
}

LeaseId StoreCore::AddLease(OwnerId owner, std::int64_t expires_ns, std::vector<EntryId> blocks) {
    leased_[owner] += kLeaseCost + blocks.size();
    const LeaseId lease = next_id_++;
    leases_.emplace(lease, Lease{owner, expires_ns, std::move(blocks)});
    if (expires_ns == kNever) return lease;
    expiries_.emplace_back(expires_ns, lease);
    std::push_heap(expiries_.begin(), expiries_.end(), std::greater<>());
    if (expiries_.size() > 2 * leases_.size() + 1024) {  // most of them were released
        std::erase_if(expiries_, [&](const auto &each) { return !leases_.contains(each.second); });
        std::make_heap(expiries_.begin(), expiries_.end(), std::greater<>());
    }
    return lease;
}

void StoreCore::EndLease(const Lease &lease) {
    const auto leased = leased_.find(lease.owner);
    leased->second -= kLeaseCost + lease.blocks.size();
    if (leased->second == 0) leased_.erase(leased);
    for (std::size_t i = lease.blocks.size(); i-- > 0;) Unlease(lease.blocks[i]);
}

void StoreCore::Unlease(EntryId id) {
    Entry &entry = index_[id];
    KV_CHECK(entry.leases > 0);
    if (--entry.leases > 0) return;
    if (!entry.detached) {
        MaybeDue(id);
    } else if (entry.cpu == CpuState::kReady) {
        TakeSlot(id);
        FreeDetached(id);
    }
}

void StoreCore::FreeDetached(EntryId id) {
    KV_CHECK(index_[id].detached && index_[id].slot == kNoSlot);
    index_.Free(id);
}

// --- checking

void StoreCore::MarkVerified(NamespaceId ns, const BlockHash *hashes,
                             const std::uint64_t *sequences, std::size_t n) {
    WriteLock lock(mutex_);
    for (std::size_t i = 0; i < n; ++i) {
        const EntryId id = index_.Find(ns, hashes[i]);
        if (id == kNoEntry || !index_[id].unverified) continue;
        if (GrantOf(index_[id]).sequence != sequences[i]) continue;
        index_[id].unverified = false;
        --stats_.unverified;
    }
}

bool StoreCore::RemoveDamaged(NamespaceId ns, const BlockHash &hash, std::uint64_t sequence) {
    WriteLock lock(mutex_);
    const EntryId id = index_.Find(ns, hash);
    if (id == kNoEntry || index_[id].cpu != CpuState::kReady ||
        GrantOf(index_[id]).sequence != sequence) {
        return false;
    }
    Entry &entry = index_[id];
    ++stats_.damaged;
    if (entry.on_ssd() && entry.leases == 0) {
        PolicyOf(entry).Remove(entry.slot);
        Emit(EventKind::kRemoved, TierKind::kCpu, entry);
        TakeSlot(id);
    } else {
        Drop(id);
    }
    Changed();
    return true;
}

LeaseId StoreCore::AcquireForScrub(OwnerId owner, std::uint64_t *cursor, std::size_t max_bytes,
                                   std::vector<ScrubBlock> *blocks) {
    constexpr std::uint64_t kSlotsPerCall = 4096;  // some tens of microseconds under the lock
    blocks->clear();
    std::vector<EntryId> pinned;
    std::size_t bytes = 0;
    WriteLock lock(mutex_);
    SizeClass size_class = 0;
    std::uint64_t first = 0;  // number of the class's first slot
    const std::uint64_t stop = *cursor + kSlotsPerCall;
    for (; *cursor < stop; ++*cursor) {
        while (size_class < classes_.size() &&
               *cursor - first >= classes_[size_class].owner_of.size()) {
            first += classes_[size_class].owner_of.size();
            ++size_class;
        }
        if (size_class == classes_.size()) {
            *cursor = 0;
            break;
        }
        const EntryId id = classes_[size_class].owner_of[*cursor - first];
        if (id == kNoEntry || id == kQuarantined) continue;
        Entry &entry = index_[id];
        if (entry.cpu != CpuState::kReady || entry.detached) continue;
        const std::size_t payload_bytes = namespaces_[entry.namespace_id].block_bytes;
        if (!pinned.empty() && bytes + payload_bytes > max_bytes) break;
        bytes += payload_bytes;
        ++entry.leases;
        pinned.push_back(id);
        blocks->push_back({entry.namespace_id, entry.hash, payload_bytes, GrantOf(entry)});
    }
    if (pinned.empty()) return 0;
    return AddLease(owner, kNever, std::move(pinned));
}

// --- removing

void StoreCore::Drop(EntryId root) {
    std::vector<EntryId> subtree;
    CollectSubtree(root, &subtree);
    // What continues a block comes after it in the list: take leaves first.
    for (std::size_t i = subtree.size(); i-- > 0;) {
        const EntryId id = subtree[i];
        Entry &entry = index_[id];
        KV_CHECK(!entry.detached);
        if (entry.on_ssd()) ForgetSsd(id);
        const EntryId parent = entry.parent;
        index_.UnlinkFromParent(id);
        if (parent != kNoEntry) MaybeDue(parent);
        index_.Unmap(id);
        --stats_.blocks;
        entry.detached = true;
        entry.rooted = false;
        if (entry.cpu == CpuState::kReady) {
            PolicyOf(entry).Remove(entry.slot);
            Emit(EventKind::kRemoved, TierKind::kCpu, entry);
        }
        const bool has_writer = entry.cpu == CpuState::kWriting;
        if (has_writer || entry.leases > 0) {
            if (entry.slot != kNoSlot) UnsealSlot(HeaderOf(entry));  // gone for a later process too
            continue;
        }
        if (entry.slot != kNoSlot) TakeSlot(id);
        FreeDetached(id);
    }
}

std::size_t StoreCore::Remove(NamespaceId ns, const BlockHash *hashes, std::size_t n) {
    WriteLock lock(mutex_);
    std::size_t removed = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const EntryId id = index_.Find(ns, hashes[i]);
        if (id == kNoEntry) continue;
        Drop(id);
        ++removed;
    }
    if (removed > 0) Changed();
    return removed;
}

void StoreCore::Clear(NamespaceId ns) {
    WriteLock lock(mutex_);
    std::vector<EntryId> roots;
    for (const EntryId id : index_.Ids()) {
        if (index_[id].namespace_id == ns && index_[id].parent == kNoEntry) roots.push_back(id);
    }
    muted_ = true;
    for (const EntryId id : roots) Drop(id);
    muted_ = false;
    Entry cleared;
    cleared.namespace_id = ns;
    Emit(EventKind::kCleared, TierKind::kCpu, cleared);
    Changed();
}

}  // namespace kvstore
