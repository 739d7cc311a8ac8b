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

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/arena.h"
#include "core/eviction.h"
#include "core/fair_mutex.h"
#include "core/ghost_queue.h"
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
    bool unverified = false;     // adopted, its bytes not checked yet (copy/verify.h)
    bool on_ssd = false;
};

// Why a block is not ready in the cpu tier.
enum class MissReason : std::uint8_t {
    kAbsent = 0,     // never seen, or forgotten
    kPending = 1,    // being written
    kEvicted = 2,    // was here, and left for others
    kAvailable = 3,  // none: it can be had, maybe from ssd only
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

using TenantId = std::uint32_t;

// What a tenant may hold, 0 for no limit, and what it holds.
struct TenantStats {
    std::uint64_t cpu_quota_bytes = 0;
    std::uint64_t ssd_quota_bytes = 0;
    std::uint64_t cpu_used_bytes = 0;  // slots, those of removed blocks still read included
    std::uint64_t cpu_blocks = 0;      // ready
    std::uint64_t ssd_blocks = 0;
    std::uint64_t ssd_used_bytes = 0;  // stored
    std::uint64_t evicted = 0;
    std::uint64_t refused_no_space = 0;
};

struct RecoverResult {
    std::uint64_t adopted = 0;
    std::uint64_t discarded = 0;  // slots that held no block that could be had again
    std::uint64_t quarantined = 0;
    std::uint64_t bytes = 0;  // payload adopted
};

// Slots that a writer of the process before, or one that we hung up on, may still be writing to.
struct Quarantined {
    SlotWriter writer;
    std::uint64_t num_slots = 0;
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
    std::uint64_t damaged = 0;      // adopted or scrubbed blocks that were removed
    std::uint64_t quarantined = 0;  // slots
    std::uint64_t unverified = 0;   // adopted blocks whose bytes were not checked yet
};

class StoreCore {
public:
    static constexpr std::int64_t kNever = INT64_MAX;
    // What one owner may have leased at a time: a lease counts as its blocks and kLeaseCost more.
    static constexpr std::size_t kLeasedMax = std::size_t{1} << 25;
    static constexpr std::size_t kLeaseCost = 32;

    // An arena that was adopted has no room until Recover().
    // REQUIRES: `policy` is one of EvictionPolicyNames().
    StoreCore(std::unique_ptr<Arena> arena, std::string policy);
    StoreCore(const StoreCore &) = delete;
    StoreCore &operator=(const StoreCore &) = delete;

    // A number for blocks of `block_bytes`. Returns false when such a block does not fit in a
    // chunk.
    // REQUIRES: `tenant` is 0 or was returned by AddTenant.
    bool AddNamespace(std::size_t block_bytes, NamespaceId *ns, TenantId tenant = 0);
    std::size_t num_namespaces() const;
    std::size_t block_bytes(NamespaceId ns) const;

    // A party that holds blocks of its own, next to tenant 0, which has no quota. Over its quota it
    // evicts its own blocks; when the arena is full, the tenant most over its share gives. A share
    // is the quota, or an equal part of what the quotas leave.
    TenantId AddTenant(std::uint64_t cpu_quota_bytes, std::uint64_t ssd_quota_bytes);
    std::size_t num_tenants() const;
    TenantStats StatsOf(TenantId tenant) const;

    // `writer` is who writes to the slots reserved by this owner, when not this process.
    OwnerId NewOwner(const SlotWriter &writer = {});
    // Ends all leases and reservations of a client that is gone.
    void ReleaseOwner(OwnerId owner);
    // The same for a client that may be at work still: the slots that its writer may be writing to
    // go into quarantine, here and in a process that adopts the arena.
    void AbandonOwner(OwnerId owner);

    // --- taking over an arena (store_core_recover.cc)
    // True between the adoption of an arena and Recover.
    bool is_recovering() const;
    // Takes in the blocks that lie in an adopted arena: after its namespaces were added and the ssd
    // tier was restored, before anything else. namespace_ids: the numbers that namespaces had when
    // the metadata was last set -> their numbers now; the blocks of others are freed. What no match
    // could reach is freed as well. Blocks keep the order in which they were written, not that in
    // which they were used. REQUIRES: is_recovering(); no two numbers become one.
    RecoverResult Recover(const std::unordered_map<NamespaceId, NamespaceId> &namespace_ids);
    // Blocks of a namespace that are ready in the cpu tier and not on ssd, parents first.
    std::vector<BlockHash> ReadyNotOnSsd(NamespaceId ns) const;
    std::vector<Quarantined> Quarantine() const;
    // The writer has ended, or said that it writes no more. Returns how many slots that frees.
    std::size_t ReleaseQuarantine(std::uint64_t writer_id);
    // The caller's own words for the next process. Set them again whenever a namespace was added
    // that should be found again: blocks of namespaces added later are not recovered.
    std::string Metadata() const;
    // Returns false and sets `error` when there are too many bytes or no memory.
    bool SetMetadata(const std::string &bytes, std::string *error);

    // --- looking
    // Leading blocks that are available in any tier.
    std::size_t Match(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                      std::int64_t start) const;
    // residency[i]: bit 0 ready in cpu, bit 1 on ssd, bit 2 being written. Of one moment for a few
    // thousand blocks at a time.
    void Residency(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                   std::uint8_t *residency) const;
    // Waits until `want` leading blocks are available or `deadline_ns` (steady clock) has come;
    // returns how many are.
    std::size_t WaitFor(NamespaceId ns, const BlockHash *hashes, std::size_t n, std::int64_t start,
                        std::size_t want, std::int64_t deadline_ns) const;
    // A number that changes whenever a block became ready or room was made.
    std::uint64_t ChangeCount() const { return change_count_.load(std::memory_order_acquire); }
    // Waits until it is no longer `seen`, or until the deadline; returns it.
    std::uint64_t WaitForChange(std::uint64_t seen, std::int64_t deadline_ns) const;
    // Which blocks were evicted is remembered from the first call on, for the last kGhosts of them.
    MissReason Why(NamespaceId ns, const BlockHash &hash);

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
    // The same blocks' places, in order. False when unknown or another owner's.
    bool ReservationGrants(OwnerId owner, std::uint64_t reservation,
                           std::vector<Grant> *grants) const;

    // --- reading
    // Pins the leading blocks that are ready in the cpu tier, as far as the owner may lease more.
    // Returns how many; the lease is 0 when none. `expires_ns` on the steady clock, or kNever. With
    // `use` it counts as a use of the blocks; the store's own reads (write-behind, promotion) are
    // none.
    std::size_t Acquire(OwnerId owner, NamespaceId ns, const BlockHash *hashes, std::size_t n,
                        std::int64_t expires_ns, bool use, LeaseId *lease, Grant *grants);
    // False when the lease is unknown or another owner's: it had expired, and what was read may be
    // another block's.
    bool Release(OwnerId owner, LeaseId lease);
    // A second lease, without end, on blocks [first, first + n) of a lease, for `reader`, who reads
    // them for longer than a call. 0 when the lease has ended, is not `owner`'s, or has no such
    // blocks.
    LeaseId ShareLease(OwnerId owner, LeaseId lease, std::uint64_t first, std::uint64_t n,
                       OwnerId reader, std::vector<Grant> *grants);
    // The bytes of these blocks have their checksums. sequences[i] is that of the slot that was
    // read: another one by now is left alone.
    void MarkVerified(NamespaceId ns, const BlockHash *hashes, const std::uint64_t *sequences,
                      std::size_t n);
    // The bytes in this slot are not those of the block. Its copy in DRAM goes; so does the block
    // with all that continue it, where there is no copy on ssd or somebody reads it. False when the
    // slot changed hands meanwhile. REQUIRES: the caller itself holds no lease on it.
    bool RemoveDamaged(NamespaceId ns, const BlockHash &hash, std::uint64_t sequence);

    // --- checking at leisure (copy/scrub.h)
    struct ScrubBlock {
        NamespaceId namespace_id;
        BlockHash hash;
        std::size_t payload_bytes;
        Grant grant;
    };
    // Pins ready blocks from slot number *cursor on, at most `max_bytes` of them, or one; looks at
    // a bounded number of slots. *cursor moves on, to 0 at the end. Returns the lease or 0.
    LeaseId AcquireForScrub(OwnerId owner, std::uint64_t *cursor, std::size_t max_bytes,
                            std::vector<ScrubBlock> *blocks);
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

    Arena &arena() { return *arena_; }

private:
    struct NamespaceInfo {
        std::size_t block_bytes;
        SizeClass size_class;
        TenantId tenant;
        // Its number in slot headers: stays the same from process to process, so that adopting
        // an arena rewrites no header.
        std::uint32_t stored_id;
        EvictionPolicy *policy;  // the tenant's of this class
        std::uint64_t event_sequence = 0;
        std::deque<Event> events{};
    };
    struct ClassState {
        std::vector<EntryId> owner_of;  // slot -> entry, kNoEntry, or kQuarantined
    };
    struct Tenant {
        TenantStats stats;
        std::vector<std::unique_ptr<EvictionPolicy>> policies;  // by class; null until needed
    };
    struct QuarantinedSlot {
        std::uint32_t chunk;
        SizeClass size_class;  // kNoClass: the chunk as a whole is held
        SlotId slot;
    };
    struct QuarantineOf {
        SlotWriter writer;
        std::vector<QuarantinedSlot> slots;
    };
    struct Candidate;  // a slot that may hold a block, while recovering
    using StoredIds = std::unordered_map<std::uint32_t, NamespaceId>;

    static constexpr EntryId kQuarantined = kNoEntry - 1;
    static constexpr SizeClass kNoClass = UINT32_MAX;
    static constexpr std::uint32_t kLeasesMax = UINT32_MAX / 2;  // of a block, by Acquire
    static constexpr std::size_t kGhosts = 1 << 16;              // 13 B each
    static constexpr std::uint64_t kSequenceStep = std::uint64_t{1} << 32;
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
    EvictionPolicy &PolicyOf(const Entry &entry) { return *namespaces_[entry.namespace_id].policy; }
    Tenant &TenantOf(const Entry &entry) {
        return tenants_[namespaces_[entry.namespace_id].tenant];
    }
    Grant GrantOf(const Entry &entry) const;

    bool MayLeave(const Entry &entry) const;
    SlotId AllocateSlot(const NamespaceInfo &space);
    bool EvictOne(TenantId tenant, SizeClass size_class);
    bool EvictForOthers(const NamespaceInfo &space);
    bool MakeRoomInQuota(const NamespaceInfo &space);
    std::int64_t OverShare(const Tenant &tenant) const;
    bool MayTakeFrom(TenantId giver, TenantId taker) const;
    bool MayTakeAll(const std::vector<EntryId> &leaving, TenantId taker) const;
    bool StealChunk(const NamespaceInfo &space);
    bool EmptyChunk(SizeClass donor, std::uint32_t chunk, TenantId taker);
    void CollectSubtree(EntryId root, std::vector<EntryId> *subtree) const;

    BlockHash ParentHash(const Entry &entry) const {
        return entry.parent != kNoEntry ? index_[entry.parent].hash : BlockHash{};
    }
    std::uint64_t NextSequence();
    void SealSlot(SlotHeader &header);
    static void UnsealSlot(SlotHeader &header);
    void RewriteLineage(EntryId id);
    void GiveSlot(EntryId id, SlotId slot, const SlotWriter &writer);
    void TakeSlot(EntryId id);
    void ForgetSlot(EntryId id);
    void EvictFromCpu(EntryId id);
    void AdoptLineage(EntryId id, EntryId parent, std::uint32_t depth);
    ReserveStatus ReserveOne(const Chain &chain, std::size_t i, NamespaceId ns, bool only_from_ssd,
                             const SlotWriter &writer, EntryId *parent, EntryId *reserved);
    void MakeReady(EntryId id);
    void FinishWrite(EntryId id, std::uint64_t checksum, bool ok);
    std::vector<std::uint64_t> EndLeasesOf(OwnerId owner);
    void QuarantineSlot(EntryId id, const SlotWriter &writer);
    void Drop(EntryId id);
    void DropSsdCopies(EntryId id);
    void ForgetSsd(EntryId id);
    void Unlease(EntryId id);
    void MaybeDue(EntryId id);
    void FreeDetached(EntryId id);
    LeaseId AddLease(OwnerId owner, std::int64_t expires_ns, std::vector<EntryId> blocks);
    void EndLease(const Lease &lease);
    std::size_t EndOverdueLeases();
    void Emit(EventKind kind, TierKind tier, const Entry &entry);
    void Changed();
    void RememberEvicted(const Entry &entry);

    StoredIds TakeStoredIds(const std::unordered_map<NamespaceId, NamespaceId> &namespace_ids,
                            bool *is_bare);
    std::string PackMetadata(const std::string &bytes) const;
    static bool UnpackMetadata(const std::string &packed, std::vector<std::uint32_t> *ids,
                               std::string *bytes);
    void ScanChunk(std::uint32_t chunk, const StoredIds &stored_ids, RecoverResult *result,
                   std::vector<Candidate> *candidates);
    void AdoptInOrder(const std::vector<Candidate> &candidates, RecoverResult *result);
    bool AdoptBlock(const Candidate &candidate, EntryId id, EntryId parent);
    void OrderAdopted(const std::vector<Candidate> &candidates);
    void ClaimChunks();
    SsdRecord RecordOf(const Entry &entry) const;
    bool FitsSsdQuota(const Entry &entry, std::uint32_t stored_bytes) const;

    mutable FairMutex mutex_;
    mutable std::condition_variable_any became_ready_;
    mutable std::uint64_t waiters_ = 0;

    const std::unique_ptr<Arena> arena_;
    const std::string policy_name_;
    bool recovering_;
    BlockIndex index_;
    std::vector<Tenant> tenants_;
    std::uint64_t cpu_quotas_ = 0;           // sum over tenants
    std::size_t tenants_without_quota_ = 1;  // of the cpu tier
    std::vector<NamespaceInfo> namespaces_;
    std::vector<ClassState> classes_;
    std::unordered_map<LeaseId, Lease> leases_;
    std::unordered_map<std::uint64_t, Reservation> reservations_;
    std::unordered_map<OwnerId, std::size_t> leased_;  // what kLeasedMax bounds
    // When leases end, a heap with the earliest on top; of those that were released too.
    std::vector<std::pair<std::int64_t, LeaseId>> expiries_;
    std::unordered_map<OwnerId, SlotWriter> writers_;   // of owners that are not this process
    std::map<std::uint64_t, QuarantineOf> quarantine_;  // by writer id
    std::uint32_t next_stored_id_ = 0;
    std::unique_ptr<GhostQueue<std::uint8_t>> ghosts_;  // evicted blocks; null until Why is asked
    std::uint64_t next_id_ = 1;                         // of owners, leases and reservations
    std::uint64_t next_sequence_ = 2;  // of slots: never repeats, so a stale grant never matches
    std::vector<EntryId> fresh_;       // became ready in this Commit, not yet known to the policy
    std::vector<SsdRecord> garbage_;
    std::size_t events_capacity_ = 0;
    bool muted_ = false;  // within Clear, which is one event
    CoreStats stats_;

    std::atomic<std::uint64_t> change_count_{0};
    mutable std::atomic<std::uint64_t> change_waiters_{0};
    mutable std::mutex change_mutex_;
    mutable std::condition_variable change_;
    mutable std::mutex metadata_mutex_;  // held while metadata is written, without the lock above
};

// Nanoseconds of the clock that deadlines are given in.
std::int64_t SteadyNowNs();

}  // namespace kvstore
