// The ssd tier's side of StoreCore: which copies lie where, which survive a reclaim, which are
// garbage.
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

void StoreCore::SetSsd(NamespaceId ns, const BlockHash *hashes, const SsdPlace *places,
                       std::size_t n) {
    WriteLock lock(mutex_);
    for (std::size_t i = 0; i < n; ++i) {
        const EntryId id = index_.Find(ns, hashes[i]);
        const bool wanted = id != kNoEntry && index_[id].available() &&
                            index_[id].checksum == places[i].checksum &&
                            (index_[id].depth <= 1 || index_[index_[id].parent].on_ssd()) &&
                            FitsSsdQuota(index_[id], places[i].stored_bytes);
        if (!wanted) {
            SsdRecord record;
            record.namespace_id = ns;
            record.hash = hashes[i];
            record.place = places[i];
            garbage_.push_back(record);
            continue;
        }
        Entry &entry = index_[id];
        TenantStats &of_tenant = TenantOf(entry).stats;
        if (entry.on_ssd()) {
            garbage_.push_back(RecordOf(entry));
            of_tenant.ssd_used_bytes -= entry.ssd_bytes;
        } else {
            ++stats_.ssd_blocks;
            ++of_tenant.ssd_blocks;
        }
        of_tenant.ssd_used_bytes += places[i].stored_bytes;
        entry.ssd_segment = places[i].segment;
        entry.ssd_page = places[i].page;
        entry.ssd_bytes = places[i].stored_bytes;
        entry.ssd_codec = places[i].codec;
        entry.ssd_checksum = places[i].stored_checksum;
        entry.used = false;
        Emit(EventKind::kStored, TierKind::kSsd, entry);
    }
}

bool StoreCore::FitsSsdQuota(const Entry &entry, std::uint32_t stored_bytes) const {
    const TenantStats &stats = tenants_[namespaces_[entry.namespace_id].tenant].stats;
    const std::uint64_t freed = entry.on_ssd() ? entry.ssd_bytes : 0;
    return stats.ssd_quota_bytes == 0 ||
           stats.ssd_used_bytes - freed + stored_bytes <= stats.ssd_quota_bytes;
}

SsdRecord StoreCore::RecordOf(const Entry &entry) const {
    SsdRecord record;
    record.namespace_id = entry.namespace_id;
    record.hash = entry.hash;
    record.depth = entry.depth;
    record.parent = ParentHash(entry);
    record.place = {entry.ssd_segment, entry.ssd_page, entry.ssd_bytes,
                    entry.ssd_codec,   entry.checksum, entry.ssd_checksum};
    return record;
}

std::vector<SsdRecord> StoreCore::Describe(NamespaceId ns, const BlockHash *hashes,
                                           std::size_t n) const {
    std::vector<EntryId> found(n);
    std::vector<SsdRecord> records;
    ReadLock lock(mutex_);
    index_.FindMany(ns, hashes, n, found.data());
    for (std::size_t i = 0; i < n && found[i] != kNoEntry; ++i) {
        records.push_back(RecordOf(index_[found[i]]));
    }
    return records;
}

std::vector<BlockHash> StoreCore::SsdGap(NamespaceId ns, const BlockHash &hash) const {
    ReadLock lock(mutex_);
    std::vector<BlockHash> gap;
    for (EntryId id = index_.Find(ns, hash); id != kNoEntry && !index_[id].on_ssd();
         id = index_[id].parent) {
        gap.push_back(index_[id].hash);
    }
    std::reverse(gap.begin(), gap.end());
    return gap;
}

void StoreCore::ForgetSsd(EntryId id) {
    Entry &entry = index_[id];
    garbage_.push_back(RecordOf(entry));
    Emit(EventKind::kRemoved, TierKind::kSsd, entry);
    entry.ssd_segment = kNotOnSsd;
    --stats_.ssd_blocks;
    TenantStats &of_tenant = TenantOf(entry).stats;
    --of_tenant.ssd_blocks;
    of_tenant.ssd_used_bytes -= entry.ssd_bytes;
}

void StoreCore::DropSsd(NamespaceId ns, const BlockHash &hash, std::uint32_t segment,
                        std::uint32_t page) {
    WriteLock lock(mutex_);
    const EntryId id = index_.Find(ns, hash);
    if (id == kNoEntry || index_[id].ssd_segment != segment || index_[id].ssd_page != page) return;
    DropSsdCopies(id);
}

// Drops the ssd copies of a block and of all that continue it. What is then not ready in the cpu
// tier cannot be had any more, and goes too; a read into its slot that is under way ends in
// nothing.
void StoreCore::DropSsdCopies(EntryId root) {
    std::vector<EntryId> subtree;
    CollectSubtree(root, &subtree);
    for (std::size_t i = subtree.size(); i-- > 0;) {
        const EntryId id = subtree[i];
        if (!index_[id].on_ssd()) continue;
        ForgetSsd(id);
        if (index_[id].cpu == CpuState::kReady) continue;
        RememberEvicted(index_[id]);
        Drop(id);
    }
}

void StoreCore::MoveSsd(const SsdRecord *records, const SsdPlace *places, std::size_t n) {
    WriteLock lock(mutex_);
    for (std::size_t i = 0; i < n; ++i) {
        const SsdRecord &record = records[i];
        const EntryId id = index_.Find(record.namespace_id, record.hash);
        if (id == kNoEntry || index_[id].ssd_segment != record.place.segment ||
            index_[id].ssd_page != record.place.page) {
            SsdRecord moved = record;
            moved.place = places[i];
            garbage_.push_back(moved);
            continue;
        }
        index_[id].ssd_segment = places[i].segment;
        index_[id].ssd_page = places[i].page;
        index_[id].used = false;
    }
}

void StoreCore::Survivors(const SsdRecord *records, std::size_t n, bool *keep) {
    WriteLock lock(mutex_);
    for (std::size_t i = 0; i < n; ++i) {
        const SsdRecord &record = records[i];
        const EntryId id = index_.Find(record.namespace_id, record.hash);
        keep[i] = id != kNoEntry && index_[id].ssd_segment == record.place.segment &&
                  index_[id].ssd_page == record.place.page &&
                  (index_[id].used || index_[id].leases > 0 || index_[id].first_child != kNoEntry);
    }
}

std::size_t StoreCore::Restore(const SsdRecord *records, std::size_t n) {
    WriteLock lock(mutex_);
    std::vector<EntryId> ids(n, kNoEntry);
    for (std::size_t i = 0; i < n; ++i) {
        const SsdRecord &record = records[i];
        if (record.place.segment == kNotOnSsd) continue;  // whoever wrote that record was not us
        if (index_.Find(record.namespace_id, record.hash) != kNoEntry) continue;
        ids[i] = index_.Insert(record.namespace_id, record.hash);
        ++stats_.blocks;
        ++stats_.ssd_blocks;
        Entry &entry = index_[ids[i]];
        entry.depth = record.depth;
        entry.checksum = record.place.checksum;
        entry.ssd_segment = record.place.segment;
        entry.ssd_page = record.place.page;
        entry.ssd_bytes = record.place.stored_bytes;
        entry.ssd_codec = record.place.codec;
        entry.ssd_checksum = record.place.stored_checksum;
        TenantStats &of_tenant = TenantOf(entry).stats;
        ++of_tenant.ssd_blocks;
        of_tenant.ssd_used_bytes += entry.ssd_bytes;
    }
    for (std::size_t i = 0; i < n; ++i) {
        if (ids[i] == kNoEntry || records[i].depth <= 1) continue;
        const EntryId parent = index_.Find(records[i].namespace_id, records[i].parent);
        if (parent != kNoEntry && index_[parent].depth + 1 == records[i].depth) {
            index_.LinkChild(parent, ids[i]);
        }
    }
    std::vector<std::size_t> roots;
    for (std::size_t i = 0; i < n; ++i) {
        if (ids[i] != kNoEntry && index_[ids[i]].parent == kNoEntry) roots.push_back(i);
    }
    std::size_t restored = 0;
    std::vector<EntryId> unreachable;
    for (const std::size_t i : roots) {
        std::vector<EntryId> subtree;
        CollectSubtree(ids[i], &subtree);
        if (index_[ids[i]].depth > 1) {
            const EntryId before = index_.Find(records[i].namespace_id, records[i].parent);
            if (before == kNoEntry || index_[before].depth != 0) {
                unreachable.push_back(ids[i]);
                continue;
            }
            // The block before was written without lineage and adopted one later, which its record
            // does not say. So these are without lineage too, until a put tells it again.
            for (const EntryId id : subtree) {
                index_.UnlinkFromParent(id);
                index_[id].depth = 0;
            }
        }
        restored += subtree.size();
        for (const EntryId id : subtree) {
            index_[id].rooted = index_[id].depth > 0;
            Emit(EventKind::kStored, TierKind::kSsd, index_[id]);
        }
    }
    for (const EntryId id : unreachable) Drop(id);
    return restored;
}

std::vector<SsdRecord> StoreCore::TakeGarbage() {
    WriteLock lock(mutex_);
    return std::exchange(garbage_, {});
}

}  // namespace kvstore
