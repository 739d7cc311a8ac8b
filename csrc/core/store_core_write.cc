// Reservations: from the slot that a writer gets to the block that is ready.
#include <algorithm>
#include <mutex>
#include <utility>

#include "core/check.h"
#include "core/store_core.h"

namespace kvstore {

namespace {

using ReadLock = std::shared_lock<FairMutex>;
using WriteLock = std::unique_lock<FairMutex>;

}  // namespace

std::uint64_t StoreCore::Reserve(OwnerId owner, NamespaceId ns, const Chain &chain,
                                 bool only_from_ssd, ReserveStatus *statuses, Grant *grants) {
    WriteLock lock(mutex_);
    EndOverdueLeases();  // or a store full of dead holders' blocks would refuse puts for ever
    SlotWriter writer;
    if (!writers_.empty()) {
        const auto known = writers_.find(owner);
        if (known != writers_.end()) writer = known->second;
    }
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
                ReserveOne(chain, i, ns, only_from_ssd, writer, &parent, &reserved);
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
            if (stopped == ReserveStatus::kNoSpace) {
                ++tenants_[namespaces_[ns].tenant].stats.refused_no_space;
            }
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
                                    bool only_from_ssd, const SlotWriter &writer, EntryId *parent,
                                    EntryId *reserved) {
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

    const SlotId slot = AllocateSlot(namespaces_[ns]);
    if (slot == kNoSlot) return ReserveStatus::kNoSpace;
    if (id == kNoEntry) {
        id = index_.Insert(ns, chain.hashes[i]);
        ++stats_.blocks;
        index_[id].depth = depth;
        if (depth > 1) index_.LinkChild(*parent, id);
    }
    GiveSlot(id, slot, writer);
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
    RewriteLineage(id);
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
    Changed();
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
    Changed();
    if (waiters_ > 0) became_ready_.notify_all();
}

std::size_t StoreCore::ReservationSize(OwnerId owner, std::uint64_t reservation) const {
    ReadLock lock(mutex_);
    const auto it = reservations_.find(reservation);
    const bool ours = it != reservations_.end() && it->second.owner == owner;
    return ours ? it->second.blocks.size() : 0;
}

bool StoreCore::ReservationGrants(OwnerId owner, std::uint64_t reservation,
                                  std::vector<Grant> *grants) const {
    ReadLock lock(mutex_);
    const auto it = reservations_.find(reservation);
    if (it == reservations_.end() || it->second.owner != owner) return false;
    grants->clear();
    for (const EntryId id : it->second.blocks) grants->push_back(GrantOf(index_[id]));
    return true;
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
    header.block.checksum = entry.checksum = checksum;
    header.sequence.store(header.sequence.load(std::memory_order_relaxed) + 1,
                          std::memory_order_release);
    SealSlot(header);
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
        ++TenantOf(entry).stats.cpu_blocks;
        ++stats_.committed;
        fresh_.push_back(next);
        Emit(EventKind::kStored, TierKind::kCpu, entry);
        for (EntryId child = entry.first_child; child != kNoEntry;
             child = index_[child].next_sibling) {
            if (index_[child].cpu == CpuState::kDone) ready.push_back(child);
        }
    }
}

}  // namespace kvstore
