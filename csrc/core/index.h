// Every known block: which tiers hold it, and which block it continues.
//
// Two structures over one set of entries:
//   - a hash map (namespace, BlockHash) -> entry. It is cut into 64 tables that grow one by one, so
//     that no insert waits for millions of entries to be moved.
//   - a tree: an entry's parent is the block before it in its chain. A *linked* entry knows its
//     place in the chain (depth >= 1); an unlinked one (depth 0) came without lineage.
//
// An entry is *available* when its bytes can be had: ready in the cpu tier or on ssd. It is
// *rooted* when it is linked, available, and its parent is rooted (or it is first in its chain).
//
// Invariants:
//   - a rooted entry at depth d proves that all d - 1 blocks before it are available: its hash
//     commits to theirs. So a longest-prefix match may jump: it is a binary search over "rooted".
//   - a linked entry is never available without being rooted: when a block stops being available,
//     the caller takes out all blocks that continue it (StoreCore::Drop).
//
// Memory: sizeof(Entry) + 8 bytes of table at a load of 0.375 to 0.75.
//
// Thread safety: const methods may run side by side; anything else needs exclusion by the owner.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/huge_array.h"
#include "core/types.h"

namespace kvstore {

enum class CpuState : std::uint8_t {
    kNone,     // no slot
    kWriting,  // a slot is reserved, its bytes are not complete
    kDone,     // bytes complete; waits for its parent to become available
    kReady,    // bytes complete and readable
};

inline constexpr std::uint32_t kNotOnSsd = UINT32_MAX;

// A lookup reads what lies before ssd_page.
struct Entry {
    BlockHash hash;
    NamespaceId namespace_id = 0;
    std::uint32_t depth = 0;  // 1-based place in its chain; 0: unlinked
    SlotId slot = kNoSlot;
    CpuState cpu = CpuState::kNone;
    bool rooted = false;
    bool detached = false;  // no longer findable; freed when its last lease or its writer is done
    bool used = false;      // read since it was written to ssd: a second chance at reclaim
    std::uint32_t ssd_segment = kNotOnSsd;
    std::uint32_t ssd_page = 0;
    std::uint32_t ssd_bytes = 0;  // stored, after the codec
    std::uint32_t leases = 0;
    EntryId parent = kNoEntry;
    EntryId first_child = kNoEntry;
    EntryId next_sibling = kNoEntry;
    EntryId prev_sibling = kNoEntry;
    std::uint32_t cpu_children = 0;  // children that hold a slot
    std::uint8_t ssd_codec = 0;
    bool unverified = false;         // its bytes in DRAM were not checked since they were adopted
    std::uint64_t checksum = 0;      // XXH3-64 of the payload
    std::uint64_t ssd_checksum = 0;  // XXH3-64 of the stored bytes

    bool on_ssd() const { return ssd_segment != kNotOnSsd; }
    bool available() const { return cpu == CpuState::kReady || on_ssd(); }
};

class BlockIndex {
public:
    BlockIndex() = default;
    BlockIndex(const BlockIndex &) = delete;
    BlockIndex &operator=(const BlockIndex &) = delete;

    // The entry of a block, or kNoEntry.
    EntryId Find(NamespaceId ns, const BlockHash &hash) const;

    // found[i] <- Find(hashes[i]): batched, so that the memory reads of many look-ups overlap.
    void FindMany(NamespaceId ns, const BlockHash *hashes, std::size_t n, EntryId *found) const;

    // How many leading blocks are available. O(log n) look-ups where the blocks are linked and
    // `start` is the 0-based place of hashes[0] in its chain; else one by one (start < 0).
    std::size_t MatchPrefix(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                            std::int64_t start) const;

    // REQUIRES: Find(ns, hash) == kNoEntry.
    EntryId Insert(NamespaceId ns, const BlockHash &hash);

    // Takes the entry out of the map: it is no longer findable. The entry itself stays.
    // REQUIRES: it is in the map.
    void Unmap(EntryId id);

    // Gives the entry back. REQUIRES: not in the map, no parent, no children.
    void Free(EntryId id);

    void LinkChild(EntryId parent, EntryId child);
    void UnlinkFromParent(EntryId child);

    Entry &operator[](EntryId id) { return chunks_[id >> kChunkBits][id & kChunkMask]; }
    const Entry &operator[](EntryId id) const { return chunks_[id >> kChunkBits][id & kChunkMask]; }

    std::size_t size() const { return size_; }  // entries in the map
    std::size_t memory_bytes() const;           // taken by entries and tables

    // All entries in the map, in no order.
    std::vector<EntryId> Ids() const;

private:
    static constexpr int kChunkBits = 18;  // 13 huge pages of entries: whole ones
    static constexpr EntryId kChunkMask = (EntryId{1} << kChunkBits) - 1;
    static constexpr std::size_t kNumTables = 64;

    struct Bucket {
        std::uint32_t tag = 0;
        std::uint32_t entry_plus_one = 0;  // 0: empty, so that fresh zero pages are an empty table
    };
    struct Table {
        HugeArray<Bucket> buckets;
        std::size_t used = 0;
    };
    struct Place {
        std::uint32_t table;
        std::uint32_t tag;
    };

    static Place PlaceOf(NamespaceId ns, const BlockHash &hash);
    EntryId FindAt(const Place &place, NamespaceId ns, const BlockHash &hash) const;
    bool IsRootedAt(NamespaceId ns, const BlockHash &hash, std::uint64_t depth,
                    bool *unlinked) const;
    std::size_t MatchOneByOne(NamespaceId ns, const BlockHash *hashes, std::size_t n) const;
    void Grow(Table *table);

    std::array<Table, kNumTables> tables_;
    std::vector<HugeArray<Entry>> chunks_;
    EntryId free_ = kNoEntry;  // freed entries, chained through `parent`
    EntryId next_ = 0;         // first entry never handed out
    std::size_t size_ = 0;
};

}  // namespace kvstore
