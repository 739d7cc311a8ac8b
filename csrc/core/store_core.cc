#include "core/store_core.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <utility>

#include "core/check.h"

namespace kvstore {

namespace {

using ReadLock = std::shared_lock<std::shared_mutex>;
using WriteLock = std::unique_lock<std::shared_mutex>;

}  // namespace

std::int64_t SteadyNowNs() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

StoreCore::StoreCore(std::unique_ptr<Arena> arena, std::string policy)
    : arena_(std::move(arena)), policy_name_(std::move(policy)) {
    KV_CHECK(arena_ != nullptr);
}

bool StoreCore::AddNamespace(std::size_t block_bytes, NamespaceId *ns) {
    WriteLock lock(mutex_);
    SizeClass size_class;
    if (!arena_->FindOrAddClass(block_bytes, &size_class)) return false;
    if (size_class == classes_.size()) {
        const SlotId num_slots = arena_->num_slots(size_class);
        ClassState state;
        state.policy = MakeEvictionPolicy(policy_name_, num_slots);
        KV_CHECK(state.policy != nullptr);
        state.owner_of.assign(num_slots, kNoEntry);
        classes_.push_back(std::move(state));
    }
    namespaces_.push_back({block_bytes, size_class, 0, {}});
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

OwnerId StoreCore::NewOwner() {
    WriteLock lock(mutex_);
    return next_id_++;
}

void StoreCore::ReleaseOwner(OwnerId owner) {
    std::vector<std::uint64_t> unfinished;
    {
        WriteLock lock(mutex_);
        for (auto it = leases_.begin(); it != leases_.end();) {
            if (it->second.owner == owner) {
                EndLease(it->second);
                it = leases_.erase(it);
            } else {
                ++it;
            }
        }
        for (const auto &[id, reservation] : reservations_) {
            if (reservation.owner == owner) unfinished.push_back(id);
        }
    }
    for (const std::uint64_t id : unfinished) Abort(owner, id);
}

// --- looking

std::size_t StoreCore::Match(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                             std::int64_t start) const {
    ReadLock lock(mutex_);
    return index_.MatchPrefix(ns, hashes, n, start);
}

void StoreCore::Residency(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                          std::uint8_t *residency) const {
    std::vector<EntryId> found(n);
    ReadLock lock(mutex_);
    index_.FindMany(ns, hashes, n, found.data());
    for (std::size_t i = 0; i < n; ++i) {
        residency[i] = 0;
        if (found[i] == kNoEntry) continue;
        const Entry &entry = index_[found[i]];
        residency[i] = static_cast<std::uint8_t>(
            (entry.cpu == CpuState::kReady ? 1 : 0) | (entry.on_ssd() ? 2 : 0) |
            (entry.cpu == CpuState::kWriting || entry.cpu == CpuState::kDone ? 4 : 0));
    }
}

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

Grant StoreCore::GrantOf(const Entry &entry) const {
    const SizeClass size_class = ClassOf(entry);
    Grant grant;
    grant.payload_offset = arena_->payload_offset(size_class, entry.slot);
    grant.header_offset = arena_->header_offset(size_class, entry.slot);
    grant.sequence =
        arena_->header(size_class, entry.slot).sequence.load(std::memory_order_relaxed);
    grant.checksum = entry.checksum;
    return grant;
}

// --- slots and eviction

bool StoreCore::MayLeave(const Entry &entry) const {
    return entry.cpu == CpuState::kReady && entry.leases == 0 && entry.cpu_children == 0;
}

SlotId StoreCore::AllocateSlot(SizeClass size_class) {
    SlotId slot = arena_->Allocate(size_class);
    if (slot != kNoSlot) return slot;
    if (StealChunk(size_class)) return arena_->Allocate(size_class);
    ClassState &state = classes_[size_class];
    const SlotId victim = state.policy->PopVictim(
        [&](SlotId candidate) { return MayLeave(index_[state.owner_of[candidate]]); });
    if (victim == kNoSlot) return kNoSlot;
    EvictFromCpu(state.owner_of[victim]);
    return arena_->Allocate(size_class);
}

// A class that holds less than its share of the chunks takes one from the class that holds most; so
// does one that holds none, also where there are more classes than chunks.
bool StoreCore::StealChunk(SizeClass size_class) {
    const std::uint32_t share = arena_->num_chunks() / arena_->num_classes();
    const std::uint32_t ours = arena_->num_chunks_of(size_class);
    if (arena_->num_classes() == 1 || (ours > 0 && ours >= share)) return false;
    SizeClass donor = 0;
    for (SizeClass i = 1; i < arena_->num_classes(); ++i) {
        if (arena_->num_chunks_of(i) > arena_->num_chunks_of(donor)) donor = i;
    }
    if (donor == size_class || (ours > 0 && arena_->num_chunks_of(donor) <= share)) return false;
    for (std::uint32_t chunk = 0; chunk < arena_->num_chunks(); ++chunk) {
        if (arena_->chunk_belongs(chunk, donor) && EmptyChunk(donor, chunk)) return true;
    }
    return false;
}

// Evicts every block of a chunk, with what continues them. False, and nothing done, when one of
// them is leased or being written.
bool StoreCore::EmptyChunk(SizeClass donor, std::uint32_t chunk) {
    const SlotId per_chunk = arena_->slots_per_chunk(donor);
    std::vector<EntryId> leaving;
    for (SlotId slot = chunk * per_chunk; slot < (chunk + 1) * per_chunk; ++slot) {
        const EntryId id = classes_[donor].owner_of[slot];
        if (id == kNoEntry) continue;
        if (index_[id].detached) return false;
        CollectSubtree(id, &leaving);
    }
    for (const EntryId id : leaving) {
        const Entry &entry = index_[id];
        if (entry.slot != kNoSlot && (entry.cpu != CpuState::kReady || entry.leases > 0)) {
            return false;
        }
    }
    // Deepest first, so that each is a leaf when its turn comes; a block may be listed twice.
    std::sort(leaving.begin(), leaving.end(), [&](EntryId a, EntryId b) {
        return std::pair(index_[a].depth, a) > std::pair(index_[b].depth, b);
    });
    leaving.erase(std::unique(leaving.begin(), leaving.end()), leaving.end());
    for (const EntryId id : leaving) {
        if (index_[id].slot == kNoSlot) continue;
        PolicyOf(index_[id]).Remove(index_[id].slot);
        EvictFromCpu(id);
    }
    return true;
}

void StoreCore::CollectSubtree(EntryId root, std::vector<EntryId> *subtree) const {
    std::size_t next = subtree->size();
    subtree->push_back(root);
    for (; next < subtree->size(); ++next) {
        for (EntryId child = index_[(*subtree)[next]].first_child; child != kNoEntry;
             child = index_[child].next_sibling) {
            subtree->push_back(child);
        }
    }
}

void StoreCore::GiveSlot(EntryId id, SlotId slot) {
    Entry &entry = index_[id];
    KV_CHECK(entry.slot == kNoSlot && entry.cpu == CpuState::kNone);
    entry.slot = slot;
    entry.cpu = CpuState::kWriting;
    if (entry.parent != kNoEntry) ++index_[entry.parent].cpu_children;
    classes_[ClassOf(entry)].owner_of[slot] = id;
    SlotHeader &header = HeaderOf(entry);
    next_sequence_ += 2;
    header.sequence.store(next_sequence_ + 1, std::memory_order_release);
    header.namespace_id = entry.namespace_id;
    header.depth = entry.depth;
    header.hash = entry.hash;
    header.parent = ParentHash(entry);
    header.payload_bytes = namespaces_[entry.namespace_id].block_bytes;
}

void StoreCore::TakeSlot(EntryId id) {
    Entry &entry = index_[id];
    next_sequence_ += 2;
    HeaderOf(entry).sequence.store(next_sequence_, std::memory_order_release);
    const SizeClass size_class = ClassOf(entry);
    classes_[size_class].owner_of[entry.slot] = kNoEntry;
    arena_->Free(size_class, entry.slot);
    if (entry.cpu == CpuState::kReady) --stats_.cpu_blocks;
    entry.slot = kNoSlot;
    entry.cpu = CpuState::kNone;
    if (entry.parent != kNoEntry) {
        KV_CHECK(index_[entry.parent].cpu_children > 0);
        --index_[entry.parent].cpu_children;
        MaybeDue(entry.parent);
    }
}

// REQUIRES: the policy no longer knows the slot.
void StoreCore::EvictFromCpu(EntryId id) {
    KV_CHECK(MayLeave(index_[id]));
    Emit(EventKind::kRemoved, TierKind::kCpu, index_[id]);
    TakeSlot(id);
    ++stats_.evicted;
    if (!index_[id].on_ssd()) Drop(id);
}

void StoreCore::MaybeDue(EntryId id) {
    const Entry &entry = index_[id];
    if (!entry.detached && MayLeave(entry)) PolicyOf(entry).Due(entry.slot);
}

// --- writing

std::uint64_t StoreCore::Reserve(OwnerId owner, NamespaceId ns, const Chain &chain,
                                 bool only_from_ssd, ReserveStatus *statuses, Grant *grants) {
    WriteLock lock(mutex_);
    EndOverdueLeases();  // or a store full of dead holders' blocks would refuse puts for ever
    EntryId parent = kNoEntry;
    ReserveStatus stopped = ReserveStatus::kReserved;
    if (chain.start > 0) {
        parent = index_.Find(ns, *chain.parent);
        if (parent == kNoEntry || index_[parent].depth != static_cast<std::uint64_t>(chain.start)) {
            stopped = ReserveStatus::kOrphan;
            parent = kNoEntry;
        }
    }
    Reservation reservation{owner, {}};
    if (parent != kNoEntry) ++index_[parent].leases;  // not evicted to make room for its own child
    for (std::size_t i = 0; i < chain.n; ++i) {
        if (stopped == ReserveStatus::kReserved) {
            EntryId reserved = kNoEntry;
            const EntryId before = parent;
            const ReserveStatus status =
                ReserveOne(chain, i, ns, only_from_ssd, &parent, &reserved);
            statuses[i] = status;
            if (status == ReserveStatus::kReserved) {
                reservation.blocks.push_back(reserved);
                grants[i] = GrantOf(index_[reserved]);
            }
            if (status == ReserveStatus::kNoSpace || status == ReserveStatus::kOrphan) {
                stopped = status;
            } else if (parent != before) {
                if (parent != kNoEntry) ++index_[parent].leases;
                if (before != kNoEntry) Unlease(before);
            }
        }
        if (stopped != ReserveStatus::kReserved) {
            statuses[i] = stopped;
            if (only_from_ssd) continue;  // a promotion, not a put
            ++(stopped == ReserveStatus::kNoSpace ? stats_.refused_no_space
                                                  : stats_.refused_orphan);
        }
    }
    if (parent != kNoEntry) Unlease(parent);
    if (reservation.blocks.empty()) return 0;
    const std::uint64_t id = next_id_++;
    reservations_.emplace(id, std::move(reservation));
    return id;
}

// `*parent` is the entry of the block before, and becomes that of block i (linked chains only).
ReserveStatus StoreCore::ReserveOne(const Chain &chain, std::size_t i, NamespaceId ns,
                                    bool only_from_ssd, EntryId *parent, EntryId *reserved) {
    const bool linked = chain.start >= 0;
    const auto depth = static_cast<std::uint32_t>(linked ? chain.start + i + 1 : 0);
    if (depth > 1 && *parent == kNoEntry) return ReserveStatus::kOrphan;
    EntryId id = index_.Find(ns, chain.hashes[i]);
    if (id != kNoEntry && linked && index_[id].depth == 0) AdoptLineage(id, *parent, depth);
    const bool in_chain = id == kNoEntry || index_[id].depth == depth;
    const bool on_ssd = id != kNoEntry && index_[id].on_ssd();
    if (id != kNoEntry && index_[id].cpu != CpuState::kNone) {
        *parent = linked && in_chain ? id : kNoEntry;
        return index_[id].cpu == CpuState::kReady ? ReserveStatus::kPresent
                                                  : ReserveStatus::kPending;
    }
    if (only_from_ssd && !on_ssd) return ReserveStatus::kOrphan;

    const SlotId slot = AllocateSlot(namespaces_[ns].size_class);
    if (slot == kNoSlot) return ReserveStatus::kNoSpace;
    if (id == kNoEntry) {
        id = index_.Insert(ns, chain.hashes[i]);
        ++stats_.blocks;
        index_[id].depth = depth;
        if (depth > 1) index_.LinkChild(*parent, id);
    }
    GiveSlot(id, slot);
    *parent = linked && in_chain ? id : kNoEntry;
    *reserved = id;
    return ReserveStatus::kReserved;
}

// A block that came without lineage turns out to be part of a chain.
void StoreCore::AdoptLineage(EntryId id, EntryId parent, std::uint32_t depth) {
    Entry &entry = index_[id];
    if (depth > 1) {
        if (entry.on_ssd() && !index_[parent].on_ssd()) return;  // ssd copies stay closed upwards
        if (!index_[parent].rooted) return;
        index_.LinkChild(parent, id);
    }
    entry.depth = depth;
    entry.rooted = entry.available();
}

bool StoreCore::Commit(OwnerId owner, std::uint64_t reservation, const std::uint64_t *checksums,
                       const bool *ok, std::size_t n) {
    WriteLock lock(mutex_);
    const auto it = reservations_.find(reservation);
    if (it == reservations_.end() || it->second.owner != owner) return false;
    const std::vector<EntryId> blocks = std::move(it->second.blocks);
    reservations_.erase(it);
    KV_CHECK(n == blocks.size());  // the caller asked ReservationSize
    for (std::size_t i = 0; i < n; ++i) {
        FinishWrite(blocks[i], checksums != nullptr ? checksums[i] : 0, ok == nullptr || ok[i]);
    }
    // The tail first, so that what continues a block is never more recent than the block.
    for (std::size_t i = fresh_.size(); i-- > 0;) {
        const Entry &entry = index_[fresh_[i]];
        if (entry.cpu == CpuState::kReady && !entry.detached) {
            PolicyOf(entry).Add(entry.slot, entry.hash.Prefix64());
        }
    }
    fresh_.clear();
    if (waiters_ > 0) became_ready_.notify_all();
    return true;
}

void StoreCore::Abort(OwnerId owner, std::uint64_t reservation) {
    WriteLock lock(mutex_);
    const auto it = reservations_.find(reservation);
    if (it == reservations_.end() || it->second.owner != owner) return;
    const std::vector<EntryId> blocks = std::move(it->second.blocks);
    reservations_.erase(it);
    for (std::size_t i = blocks.size(); i-- > 0;) FinishWrite(blocks[i], 0, false);
    if (waiters_ > 0) became_ready_.notify_all();
}

std::size_t StoreCore::ReservationSize(OwnerId owner, std::uint64_t reservation) const {
    ReadLock lock(mutex_);
    const auto it = reservations_.find(reservation);
    const bool ours = it != reservations_.end() && it->second.owner == owner;
    return ours ? it->second.blocks.size() : 0;
}

void StoreCore::FinishWrite(EntryId id, std::uint64_t checksum, bool ok) {
    Entry &entry = index_[id];
    KV_CHECK(entry.cpu == CpuState::kWriting);
    if (entry.detached) {
        TakeSlot(id);
        FreeDetached(id);
        return;
    }
    if (!ok) {
        TakeSlot(id);
        if (!entry.on_ssd()) Drop(id);
        return;
    }
    SlotHeader &header = HeaderOf(entry);
    header.checksum = entry.checksum = checksum;
    header.sequence.store(header.sequence.load(std::memory_order_relaxed) + 1,
                          std::memory_order_release);
    entry.cpu = CpuState::kDone;
    const bool reachable = entry.depth <= 1 || index_[entry.parent].rooted;
    if (reachable) MakeReady(id);
}

void StoreCore::MakeReady(EntryId id) {
    std::vector<EntryId> ready{id};
    while (!ready.empty()) {
        const EntryId next = ready.back();
        ready.pop_back();
        Entry &entry = index_[next];
        entry.cpu = CpuState::kReady;
        entry.rooted = entry.depth > 0;
        ++stats_.cpu_blocks;
        ++stats_.committed;
        fresh_.push_back(next);
        Emit(EventKind::kStored, TierKind::kCpu, entry);
        for (EntryId child = entry.first_child; child != kNoEntry;
             child = index_[child].next_sibling) {
            if (index_[child].cpu == CpuState::kDone) ready.push_back(child);
        }
    }
}

// --- reading

std::size_t StoreCore::Acquire(OwnerId owner, NamespaceId ns, const BlockHash *hashes,
                               std::size_t n, std::int64_t expires_ns, bool use, LeaseId *lease,
                               Grant *grants) {
    *lease = 0;
    std::vector<EntryId> found(n);
    WriteLock lock(mutex_);
    EndOverdueLeases();
    index_.FindMany(ns, hashes, n, found.data());
    std::size_t held = 0;
    while (held < n && found[held] != kNoEntry && index_[found[held]].cpu == CpuState::kReady) {
        Entry &entry = index_[found[held]];
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
    *lease = next_id_++;
    leases_.emplace(*lease, Lease{owner, expires_ns, std::move(found)});
    next_expiry_ns_ = std::min(next_expiry_ns_, expires_ns);
    return held;
}

bool StoreCore::Release(OwnerId owner, LeaseId lease) {
    WriteLock lock(mutex_);
    const auto it = leases_.find(lease);
    if (it == leases_.end() || it->second.owner != owner) return false;
    EndLease(it->second);
    leases_.erase(it);
    return true;
}

std::size_t StoreCore::ExpireLeases() {
    WriteLock lock(mutex_);
    return EndOverdueLeases();
}

std::size_t StoreCore::EndOverdueLeases() {
    if (next_expiry_ns_ == kNever) return 0;
    const std::int64_t now = SteadyNowNs();
    if (now < next_expiry_ns_) return 0;
    std::size_t ended = 0;
    next_expiry_ns_ = kNever;
    for (auto it = leases_.begin(); it != leases_.end();) {
        if (it->second.expires_ns <= now) {
            EndLease(it->second);
            it = leases_.erase(it);
            ++ended;
        } else {
            next_expiry_ns_ = std::min(next_expiry_ns_, it->second.expires_ns);
            ++it;
        }
    }
    stats_.leases_expired += ended;
    return ended;
}

void StoreCore::EndLease(const Lease &lease) {
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
        if (has_writer || entry.leases > 0) continue;
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
}

// --- watching

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
    stats.cpu_capacity_bytes = arena_->bytes();
    stats.index_bytes = index_.memory_bytes();
    stats.leases = leases_.size();
    stats.reservations = reservations_.size();
    return stats;
}

}  // namespace kvstore
