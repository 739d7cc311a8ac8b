// The decisions of the store about its blocks: who holds what, what may be read, what leaves.
//
// Joins the index (which blocks are where), the arena (their bytes in DRAM) and one eviction policy
// a size class. It never touches payload bytes: callers copy into reserved slots and out of leased
// ones, on any thread or in any process that maps the arena.
//
// A block's life in the cpu tier:
//
//   none --Reserve--> writing --Commit--> done --(parent available)--> ready --evict--> none
//                        \--Abort--> none                              ready <--> leased
//
// Rules that always hold:
//   - a block is findable from Reserve on, readable from ready on, immutable once ready.
//   - eviction takes a block only when it is ready, unleased, and no block that continues it holds
//     a slot: leaves first.
//   - the ssd copies are closed under ancestors: a linked block is on ssd only while its parent is.
//   - when a block goes (removed, corrupt), everything that continues it goes with it. Leased
//   blocks
//     among them are *detached*: no longer findable, readable by their lease holders, freed after.
//
// Thread safety: all public methods may be called from any thread. One reader-writer lock guards
// everything; Match and Residency only read. Nobody else's code runs under it.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/arena.h"
#include "core/eviction.h"
#include "core/index.h"
#include "core/types.h"

namespace kvstore {

using OwnerId = std::uint64_t;  // a client; its leases and reservations end with it

// A run of blocks of one chain. start: 0-based place of hashes[0], or < 0 when unknown.
// `parent` is the hash before hashes[0]. REQUIRES: start <= 0 or parent != nullptr.
struct Chain {
    const BlockHash *hashes = nullptr;
    std::size_t n = 0;
    std::int64_t start = -1;
    const BlockHash *parent = nullptr;
};

enum class ReserveStatus : std::uint8_t {
    kReserved = 0,  // a slot to write
    kPresent = 1,   // ready already
    kPending = 2,   // somebody else is writing it
    kNoSpace = 3,   // every slot is leased or being written
    kOrphan = 4,    // the block before it is not here, so no match could reach it
};

// A place in the arena granted to a writer or a reader.
struct Grant {
    std::uint64_t payload_offset = 0;
    std::uint64_t header_offset = 0;
    std::uint64_t sequence = 0;
    std::uint64_t checksum = 0;  // 0 for a writer
};

struct SsdPlace {
    std::uint32_t segment = kNotOnSsd;
    std::uint32_t page = 0;
    std::uint32_t stored_bytes = 0;
    std::uint8_t codec = 0;
    std::uint64_t checksum = 0;         // of the payload
    std::uint64_t stored_checksum = 0;  // of the stored bytes
};

struct SsdRecord {
    NamespaceId namespace_id = 0;
    BlockHash hash;
    BlockHash parent;
    std::uint32_t depth = 0;
    SsdPlace place;
};

enum class EventKind : std::uint8_t { kStored = 0, kRemoved = 1, kCleared = 2 };
enum class TierKind : std::uint8_t { kCpu = 0, kSsd = 1 };

struct Event {
    std::uint64_t sequence = 0;  // of its namespace: 1, 2, 3, ...
    EventKind kind = EventKind::kStored;
    TierKind tier = TierKind::kCpu;
    NamespaceId namespace_id = 0;
    BlockHash hash{};
    BlockHash parent{};  // zeros for the first of a chain and for unlinked blocks
    std::uint32_t depth = 0;
};

struct CoreStats {
    std::uint64_t blocks = 0;      // findable, any tier
    std::uint64_t cpu_blocks = 0;  // ready in the cpu tier
    std::uint64_t ssd_blocks = 0;
    std::uint64_t cpu_used_bytes = 0;  // slots in use
    std::uint64_t cpu_capacity_bytes = 0;
    std::uint64_t index_bytes = 0;
    std::uint64_t leases = 0;
    std::uint64_t reservations = 0;
    std::uint64_t committed = 0;  // totals since the start
    std::uint64_t evicted = 0;
    std::uint64_t refused_no_space = 0;
    std::uint64_t refused_orphan = 0;
    std::uint64_t leases_expired = 0;
};

class StoreCore {
public:
    static constexpr std::int64_t kNever = INT64_MAX;

    // REQUIRES: `policy` is one of EvictionPolicyNames().
    StoreCore(std::unique_ptr<Arena> arena, std::string policy);
    StoreCore(const StoreCore &) = delete;
    StoreCore &operator=(const StoreCore &) = delete;

    // A number for blocks of `block_bytes`. Returns false when such a block does not fit in a
    // chunk.
    bool AddNamespace(std::size_t block_bytes, NamespaceId *ns);
    std::size_t num_namespaces() const;
    std::size_t block_bytes(NamespaceId ns) const;

    OwnerId NewOwner();
    // Ends all leases and reservations of a client that is gone.
    void ReleaseOwner(OwnerId owner);

    // --- looking
    // Leading blocks that are available in any tier.
    std::size_t Match(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                      std::int64_t start) const;
    // residency[i]: bit 0 ready in cpu, bit 1 on ssd, bit 2 being written.
    void Residency(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                   std::uint8_t *residency) const;
    // Waits until `want` leading blocks are available or `deadline_ns` (steady clock) has come;
    // returns how many are.
    std::size_t WaitFor(NamespaceId ns, const BlockHash *hashes, std::size_t n, std::int64_t start,
                        std::size_t want, std::int64_t deadline_ns) const;

    // --- writing
    // Grants slots for the blocks of `chain` that need one. statuses[i] says what became of block
    // i; from the first kNoSpace or kOrphan on, all are. grants[i] is set where kReserved.
    // With `only_from_ssd`, blocks that are not on ssd are left alone (kOrphan).
    // Returns the reservation, 0 when nothing was reserved.
    std::uint64_t Reserve(OwnerId owner, NamespaceId ns, const Chain &chain, bool only_from_ssd,
                          ReserveStatus *statuses, Grant *grants);
    // Publishes the reserved blocks, in order, with their checksums; where ok is not null and
    // ok[i] is false, block i is given up. Counts only reserved blocks. Returns false for an
    // unknown reservation (its owner was released) and for another owner's.
    bool Commit(OwnerId owner, std::uint64_t reservation, const std::uint64_t *checksums,
                const bool *ok, std::size_t n);
    void Abort(OwnerId owner, std::uint64_t reservation);
    // Blocks reserved under it; 0 when unknown or another owner's.
    std::size_t ReservationSize(OwnerId owner, std::uint64_t reservation) const;
    // Where they lie, in order. False when unknown or another owner's.
    bool ReservationGrants(OwnerId owner, std::uint64_t reservation,
                           std::vector<Grant> *grants) const;

    // --- reading
    // Pins the leading blocks that are ready in the cpu tier. Returns how many; the lease is 0 when
    // none. `expires_ns` on the steady clock, or kNever. With `use` it counts as a use of the
    // blocks; the store's own reads (write-behind, promotion) are none.
    std::size_t Acquire(OwnerId owner, NamespaceId ns, const BlockHash *hashes, std::size_t n,
                        std::int64_t expires_ns, bool use, LeaseId *lease, Grant *grants);
    // False when the lease is unknown or another owner's: it had expired, and what was read may be
    // another block's.
    bool Release(OwnerId owner, LeaseId lease);
    // A second lease, without end, on blocks [first, first + n) of a lease, for whoever reads them
    // for longer than a call. 0 when the lease has ended, is another owner's, or has no such
    // blocks.
    LeaseId ShareLease(OwnerId owner, LeaseId lease, std::uint64_t first, std::uint64_t n,
                       std::vector<Grant> *grants);
    // Ends leases whose time has come; returns how many.
    std::size_t ExpireLeases();

    // --- removing
    std::size_t Remove(NamespaceId ns, const BlockHash *hashes, std::size_t n);
    void Clear(NamespaceId ns);

    // --- the ssd tier's side
    // Block hashes[i] now lies at places[i] as well. Where the block is gone or has other bytes by
    // now, or its parent is not on ssd, the place becomes garbage.
    void SetSsd(NamespaceId ns, const BlockHash *hashes, const SsdPlace *places, std::size_t n);
    // What is known of leading blocks; ends at the first unknown one. A block that is not on ssd
    // has place.segment == kNotOnSsd.
    std::vector<SsdRecord> Describe(NamespaceId ns, const BlockHash *hashes, std::size_t n) const;
    // The block and its ancestors that are ready in the cpu tier but not on ssd, first of the chain
    // first: what must be written before anything that continues the block may be.
    std::vector<BlockHash> SsdGap(NamespaceId ns, const BlockHash &hash) const;
    // The copy at this place cannot be read. Nothing happens when the block lies elsewhere by now.
    void DropSsd(NamespaceId ns, const BlockHash &hash, std::uint32_t segment, std::uint32_t page);
    // The tier moved the copies of records[i] to places[i].
    void MoveSsd(const SsdRecord *records, const SsdPlace *places, std::size_t n);
    // keep[i]: record i is current, and other blocks continue it or it was read since it was
    // written.
    void Survivors(const SsdRecord *records, std::size_t n, bool *keep);
    // Puts recovered records into an empty index; those that no match could reach become garbage.
    std::size_t Restore(const SsdRecord *records, std::size_t n);
    // ssd copies that are no longer wanted, since the last call.
    std::vector<SsdRecord> TakeGarbage();

    // --- watching
    // Keep the last `capacity` events of each namespace from now on.
    void EnableEvents(std::size_t capacity);
    // The number of the namespace's last event, kept or not.
    std::uint64_t EventSequence(NamespaceId ns) const;
    // The kept events of a namespace after number `after`. Readers do not disturb each other; one
    // that fell behind sees that the first number it gets is not after + 1.
    std::vector<Event> EventsAfter(NamespaceId ns, std::uint64_t after) const;
    CoreStats Stats() const;
    // A number that changes whenever a block became ready or room was made.
    std::uint64_t ChangeCount() const;
    // Returns it once it is not `seen` any more, or at the deadline (steady clock).
    std::uint64_t WaitForChange(std::uint64_t seen, std::int64_t deadline_ns) const;

    Arena &arena() { return *arena_; }

private:
    struct NamespaceInfo {
        std::size_t block_bytes;
        SizeClass size_class;
        std::uint64_t event_sequence = 0;
        std::deque<Event> events{};
    };
    struct ClassState {
        std::unique_ptr<EvictionPolicy> policy;
        std::vector<EntryId> owner_of;  // slot -> entry
    };
    struct Lease {
        OwnerId owner;
        std::int64_t expires_ns;
        std::vector<EntryId> blocks;
    };
    struct Reservation {
        OwnerId owner;
        std::vector<EntryId> blocks;
    };

    SizeClass ClassOf(const Entry &entry) const {
        return namespaces_[entry.namespace_id].size_class;
    }
    SlotHeader &HeaderOf(const Entry &entry) { return arena_->header(ClassOf(entry), entry.slot); }
    EvictionPolicy &PolicyOf(const Entry &entry) { return *classes_[ClassOf(entry)].policy; }
    Grant GrantOf(const Entry &entry) const;

    bool MayLeave(const Entry &entry) const;
    SlotId AllocateSlot(SizeClass size_class);
    bool StealChunk(SizeClass size_class);
    bool EmptyChunk(SizeClass donor, std::uint32_t chunk);
    void CollectSubtree(EntryId root, std::vector<EntryId> *subtree) const;

    BlockHash ParentHash(const Entry &entry) const {
        return entry.parent != kNoEntry ? index_[entry.parent].hash : BlockHash{};
    }
    void GiveSlot(EntryId id, SlotId slot);
    void TakeSlot(EntryId id);
    void EvictFromCpu(EntryId id);
    void AdoptLineage(EntryId id, EntryId parent, std::uint32_t depth);
    ReserveStatus ReserveOne(const Chain &chain, std::size_t i, NamespaceId ns, bool only_from_ssd,
                             EntryId *parent, EntryId *reserved);
    void MakeReady(EntryId id);
    void FinishWrite(EntryId id, std::uint64_t checksum, bool ok);
    void Drop(EntryId id);
    void DropSsdCopies(EntryId id);
    void ForgetSsd(EntryId id);
    void Unlease(EntryId id);
    void MaybeDue(EntryId id);
    void FreeDetached(EntryId id);
    void EndLease(const Lease &lease);
    std::size_t EndOverdueLeases();
    void Emit(EventKind kind, TierKind tier, const Entry &entry);
    SsdRecord RecordOf(const Entry &entry) const;

    mutable std::shared_mutex mutex_;
    mutable std::condition_variable_any became_ready_;
    mutable std::uint64_t waiters_ = 0;

    const std::unique_ptr<Arena> arena_;
    const std::string policy_name_;
    BlockIndex index_;
    std::vector<NamespaceInfo> namespaces_;
    std::vector<ClassState> classes_;
    std::unordered_map<LeaseId, Lease> leases_;
    std::unordered_map<std::uint64_t, Reservation> reservations_;
    std::int64_t next_expiry_ns_ = kNever;
    std::uint64_t next_id_ = 1;        // of owners, leases and reservations
    std::uint64_t next_sequence_ = 2;  // of slots: never repeats, so a stale grant never matches
    std::vector<EntryId> fresh_;       // became ready in this Commit, not yet known to the policy
    std::vector<SsdRecord> garbage_;
    std::size_t events_capacity_ = 0;
    bool muted_ = false;  // within Clear, which is one event
    CoreStats stats_;
};

// Nanoseconds of the clock that deadlines are given in.
std::int64_t SteadyNowNs();

}  // namespace kvstore
