// Slots of the cpu tier: who gets one, who leaves for it, and what their headers say meanwhile.
#include <algorithm>
#include <utility>

#include "core/check.h"
#include "core/store_core.h"

namespace kvstore {

bool StoreCore::MayLeave(const Entry &entry) const {
    return entry.cpu == CpuState::kReady && entry.leases == 0 && entry.cpu_children == 0;
}

SlotId StoreCore::AllocateSlot(const NamespaceInfo &space) {
    const SizeClass size_class = space.size_class;
    const bool alone = tenants_.size() == 1;
    if (!alone && !MakeRoomInQuota(space)) return kNoSlot;
    SlotId slot = arena_->Allocate(size_class);
    if (slot != kNoSlot) return slot;
    if (StealChunk(space)) return arena_->Allocate(size_class);
    if (!(alone ? EvictOne(0, size_class) : EvictForOthers(space))) return kNoSlot;
    return arena_->Allocate(size_class);
}

bool StoreCore::EvictOne(TenantId tenant, SizeClass size_class) {
    const auto &policies = tenants_[tenant].policies;
    if (size_class >= policies.size() || policies[size_class] == nullptr) return false;
    const ClassState &state = classes_[size_class];
    const SlotId victim = policies[size_class]->PopVictim(
        [&](SlotId candidate) { return MayLeave(index_[state.owner_of[candidate]]); });
    if (victim == kNoSlot) return false;
    EvictFromCpu(state.owner_of[victim]);
    return true;
}

// A class that holds less than its share of the chunks takes one from the class that holds most; so
// does one that holds none, also where there are more classes than chunks.
bool StoreCore::StealChunk(const NamespaceInfo &space) {
    const SizeClass size_class = space.size_class;
    const std::uint32_t share = arena_->num_chunks() / arena_->num_classes();
    const std::uint32_t ours = arena_->num_chunks_of(size_class);
    if (arena_->num_classes() == 1 || (ours > 0 && ours >= share)) return false;
    SizeClass donor = 0;
    for (SizeClass i = 1; i < arena_->num_classes(); ++i) {
        if (arena_->num_chunks_of(i) > arena_->num_chunks_of(donor)) donor = i;
    }
    if (donor == size_class || (ours > 0 && arena_->num_chunks_of(donor) <= share)) return false;
    for (std::uint32_t chunk = 0; chunk < arena_->num_chunks(); ++chunk) {
        if (arena_->chunk_belongs(chunk, donor) && EmptyChunk(donor, chunk, space.tenant))
            return true;
    }
    return false;
}

// Evicts every block of a chunk, with what continues them. False, and nothing done, when one of
// them is leased, being written, or of a tenant that need not give.
bool StoreCore::EmptyChunk(SizeClass donor, std::uint32_t chunk, TenantId taker) {
    const SlotId per_chunk = arena_->slots_per_chunk(donor);
    std::vector<EntryId> leaving;
    for (SlotId slot = chunk * per_chunk; slot < (chunk + 1) * per_chunk; ++slot) {
        const EntryId id = classes_[donor].owner_of[slot];
        if (id == kNoEntry) continue;
        if (id == kQuarantined || index_[id].detached) return false;
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
    if (tenants_.size() > 1 && !MayTakeAll(leaving, taker)) return false;
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

// --- slot headers; the order of stores is that of arena_format.h

std::uint64_t StoreCore::NextSequence() {
    next_sequence_ += 2;
    if (next_sequence_ + 2 > arena_->sequence_ceiling()) {
        arena_->RaiseSequenceCeiling(next_sequence_ + kSequenceStep);
    }
    return next_sequence_;
}

void StoreCore::SealSlot(SlotHeader &header) {
    CompilerFence();
    const std::uint64_t sequence = header.sequence.load(std::memory_order_relaxed);
    header.seal.store(SealOf(arena_->seal_seed(), sequence, header.block),
                      std::memory_order_release);
    CompilerFence();
}

void StoreCore::UnsealSlot(SlotHeader &header) {
    header.seal.store(0, std::memory_order_relaxed);
    CompilerFence();
}

// The block's place in its chain became known after its header was written.
void StoreCore::RewriteLineage(EntryId id) {
    const Entry &entry = index_[id];
    if (entry.slot == kNoSlot) return;
    SlotHeader &header = HeaderOf(entry);
    const bool sealed = header.seal.load(std::memory_order_relaxed) != 0;
    UnsealSlot(header);
    header.block.depth = entry.depth;
    header.block.parent = ParentHash(entry);
    if (sealed) SealSlot(header);
}

void StoreCore::GiveSlot(EntryId id, SlotId slot, const SlotWriter &writer) {
    Entry &entry = index_[id];
    KV_CHECK(entry.slot == kNoSlot && entry.cpu == CpuState::kNone);
    entry.slot = slot;
    entry.cpu = CpuState::kWriting;
    if (entry.parent != kNoEntry) ++index_[entry.parent].cpu_children;
    const NamespaceInfo &space = namespaces_[entry.namespace_id];
    classes_[space.size_class].owner_of[slot] = id;
    tenants_[space.tenant].stats.cpu_used_bytes += arena_->slot_bytes(space.size_class);
    SlotHeader &header = HeaderOf(entry);
    UnsealSlot(header);
    header.writer = writer;
    CompilerFence();
    header.sequence.store(NextSequence() + 1, std::memory_order_release);
    header.block = {space.block_bytes, 0,          space.stored_id,
                    entry.depth,       entry.hash, ParentHash(entry)};
}

void StoreCore::TakeSlot(EntryId id) {
    Entry &entry = index_[id];
    SlotHeader &header = HeaderOf(entry);
    UnsealSlot(header);
    header.sequence.store(NextSequence(), std::memory_order_release);
    const SizeClass size_class = ClassOf(entry);
    classes_[size_class].owner_of[entry.slot] = kNoEntry;
    arena_->Free(size_class, entry.slot);
    TenantStats &of_tenant = TenantOf(entry).stats;
    of_tenant.cpu_used_bytes -= arena_->slot_bytes(size_class);
    if (entry.cpu == CpuState::kReady) {
        --stats_.cpu_blocks;
        --of_tenant.cpu_blocks;
        stats_.unverified -= entry.unverified;
    }
    ForgetSlot(id);
}

void StoreCore::ForgetSlot(EntryId id) {
    Entry &entry = index_[id];
    entry.unverified = false;
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
    ++TenantOf(index_[id]).stats.evicted;
    if (index_[id].on_ssd()) return;
    RememberEvicted(index_[id]);
    Drop(id);
}

void StoreCore::MaybeDue(EntryId id) {
    const Entry &entry = index_[id];
    if (!entry.detached && MayLeave(entry)) PolicyOf(entry).Due(entry.slot);
}

}  // namespace kvstore
