// Taking over an arena: which slots hold blocks, which of them can be reached, whose turn it is to
// leave; and what waits because somebody may still write to it.
//
// Recovery reads every header once, then takes the blocks in by their place in the chain, so that a
// block's parent is always there before it. It may be cut off at any instruction and be done again
// by the next process: until the end it stores nothing but zeroed seals of slots that it frees.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "core/check.h"
#include "core/store_core.h"

namespace kvstore {

namespace {

using ReadLock = std::shared_lock<FairMutex>;
using WriteLock = std::unique_lock<FairMutex>;

constexpr std::uint32_t kNoStoredId = UINT32_MAX;  // of a namespace that is not set yet
constexpr std::size_t kStoredIdsMax =
    (kMetadataAreaBytes - kMetadataBytesMax - sizeof(MetadataHeader)) / sizeof(std::uint32_t) - 1;

}  // namespace

struct StoreCore::Candidate {
    const SlotHeader *header;
    std::uint64_t sequence;
    std::uint32_t depth;
    NamespaceId namespace_id;
    SlotId slot;
    mutable bool adopted = false;
};

bool StoreCore::is_recovering() const {
    ReadLock lock(mutex_);
    return recovering_;
}

RecoverResult StoreCore::Recover(
    const std::unordered_map<NamespaceId, NamespaceId> &namespace_ids) {
    const std::lock_guard<std::mutex> metadata_lock(metadata_mutex_);
    WriteLock lock(mutex_);
    KV_CHECK(recovering_);
    recovering_ = false;
    RecoverResult result;
    bool is_bare;
    const StoredIds stored_ids = TakeStoredIds(namespace_ids, &is_bare);
    std::vector<Candidate> candidates;
    for (std::uint32_t chunk = 0; chunk < arena_->num_chunks(); ++chunk) {
        ScanChunk(chunk, stored_ids, &result, &candidates);
    }
    // Parents first. The order within a depth is that of the memory, which is read fastest.
    std::uint32_t deepest = 0;
    for (const Candidate &found : candidates) deepest = std::max(deepest, found.depth);
    if (deepest < 2 * candidates.size() + 1024) {
        std::vector<std::size_t> begin(deepest + 2);
        for (const Candidate &found : candidates) ++begin[found.depth + 1];
        for (std::size_t i = 1; i < begin.size(); ++i) begin[i] += begin[i - 1];
        std::vector<Candidate> sorted(candidates.size());
        for (const Candidate &found : candidates) sorted[begin[found.depth]++] = found;
        candidates.swap(sorted);
    } else {
        std::stable_sort(candidates.begin(), candidates.end(),
                         [](const Candidate &a, const Candidate &b) { return a.depth < b.depth; });
    }
    AdoptInOrder(candidates, &result);
    OrderAdopted(candidates);
    ClaimChunks();
    std::string ignored;  // then blocks of namespaces that are new will not be found again
    if (is_bare) arena_->SetMetadata(PackMetadata(""), &ignored);
    Changed();
    return result;
}

// Which namespace the numbers in the headers mean. Namespaces that were not there before get
// numbers above all that may be in a header.
StoreCore::StoredIds StoreCore::TakeStoredIds(
    const std::unordered_map<NamespaceId, NamespaceId> &namespace_ids, bool *is_bare) {
    Arena::MetadataFound found;
    std::vector<std::uint32_t> ids;
    std::string ignored;
    UnpackMetadata(arena_->Metadata(&found), &ids, &ignored);
    *is_bare = found == Arena::MetadataFound::kNever;
    StoredIds known;
    for (const auto &[before, now] : namespace_ids) {
        // Without metadata nobody ever renumbered anything.
        std::uint32_t stored = before;
        if (!*is_bare) stored = before < ids.size() ? ids[before] : kNoStoredId;
        if (stored != kNoStoredId && known.emplace(stored, now).second) {
            namespaces_[now].stored_id = stored;
            next_stored_id_ = std::max(next_stored_id_, stored + 1);
        }
    }
    for (const std::uint32_t id : ids) {
        if (id != kNoStoredId) next_stored_id_ = std::max(next_stored_id_, id + 1);
    }
    // From here on numbers may differ from what was stored, which a later process has to know.
    if (*is_bare && !arena_->SetMetadata(PackMetadata(""), &ignored)) return {};
    return known;
}

// Sorts the slots of a chunk into candidates, quarantine, and those that are free.
void StoreCore::ScanChunk(std::uint32_t chunk, const StoredIds &stored_ids, RecoverResult *result,
                          std::vector<Candidate> *candidates) {
    std::size_t slot_bytes = 0;
    const Arena::ChunkRecord record = arena_->RecordedChunk(chunk, &slot_bytes);
    if (record == Arena::ChunkRecord::kDamaged) {
        // Somebody may be writing anywhere in it: nobody gets it until the arena ends.
        arena_->HoldChunk(chunk, 0);
        return;
    }
    if (record == Arena::ChunkRecord::kNone) return;
    SizeClass size_class = kNoClass;
    if (!arena_->FindClass(slot_bytes, &size_class)) size_class = kNoClass;
    const SlotId num_slots = arena_->slots_in_chunk(slot_bytes);
    SlotId held = 0;
    std::uint32_t last_stored = kNoStoredId;
    NamespaceId last_namespace = 0;
    for (SlotId i = 0; i < num_slots; ++i) {
        const SlotHeader &header = arena_->chunk_header(chunk, i);
        const std::uint64_t sequence = header.sequence.load(std::memory_order_relaxed);
        const std::uint64_t seal = header.seal.load(std::memory_order_relaxed);
        const SlotId slot = chunk * num_slots + i;
        if (seal == 0) {
            if (sequence % 2 == 0) continue;
            if (header.writer.id == 0) {
                ++result->discarded;
                continue;
            }
            QuarantineOf &of_writer = quarantine_[header.writer.id];
            of_writer.writer = header.writer;
            of_writer.slots.push_back({chunk, size_class, slot});
            if (size_class != kNoClass) classes_[size_class].owner_of[slot] = kQuarantined;
            ++held;
            ++result->quarantined;
            continue;
        }
        const bool whole = sequence % 2 == 0 && sequence < kSequenceLimit &&
                           seal == SealOf(arena_->seal_seed(), sequence, header.block);
        if (!whole) {
            ++result->discarded;
            continue;
        }
        const SlotBlock &block = header.block;
        next_sequence_ = std::max(next_sequence_, sequence);
        next_stored_id_ = std::max(next_stored_id_, block.namespace_id + 1);
        if (block.namespace_id != last_stored) {
            const auto known = stored_ids.find(block.namespace_id);
            last_stored = known == stored_ids.end() ? kNoStoredId : block.namespace_id;
            if (known != stored_ids.end()) last_namespace = known->second;
        }
        if (last_stored == kNoStoredId || size_class == kNoClass ||
            namespaces_[last_namespace].size_class != size_class ||
            namespaces_[last_namespace].block_bytes != block.payload_bytes) {
            ++result->discarded;
            continue;
        }
        candidates->push_back({&header, sequence, block.depth, last_namespace, slot});
    }
    if (size_class == kNoClass && held > 0) arena_->HoldChunk(chunk, held);
}

void StoreCore::AdoptInOrder(const std::vector<Candidate> &candidates, RecoverResult *result) {
    // New namespaces first: a number may be theirs only if no header has it.
    for (NamespaceInfo &space : namespaces_) {
        if (space.stored_id == kNoStoredId) space.stored_id = next_stored_id_++;
    }
    next_sequence_ += next_sequence_ % 2;
    if (next_sequence_ >= arena_->sequence_ceiling()) {
        arena_->RaiseSequenceCeiling(next_sequence_ + kSequenceStep);
    }
    constexpr std::size_t kGroup = 64;
    BlockHash hashes[kGroup];
    BlockHash parents[kGroup];
    EntryId found[kGroup];
    EntryId found_parents[kGroup];
    for (std::size_t begin = 0; begin < candidates.size();) {
        const Candidate &first = candidates[begin];
        std::size_t n = 0;
        while (n < kGroup && begin + n < candidates.size() &&
               candidates[begin + n].depth == first.depth &&
               candidates[begin + n].namespace_id == first.namespace_id) {
            hashes[n] = candidates[begin + n].header->block.hash;
            parents[n] = candidates[begin + n].header->block.parent;
            ++n;
        }
        index_.FindMany(first.namespace_id, hashes, n, found);
        std::fill_n(found_parents, n, kNoEntry);
        if (first.depth > 1) index_.FindMany(first.namespace_id, parents, n, found_parents);
        for (std::size_t i = 0; i < n; ++i) {
            const Candidate &candidate = candidates[begin + i];
            // Again when it was not there: damage can make two slots of one block.
            const EntryId id =
                found[i] != kNoEntry ? found[i] : index_.Find(candidate.namespace_id, hashes[i]);
            candidate.adopted = AdoptBlock(candidate, id, found_parents[i]);
            if (candidate.adopted) {
                ++result->adopted;
                result->bytes += namespaces_[candidate.namespace_id].block_bytes;
            } else {
                ++result->discarded;
            }
        }
        begin += n;
    }
}

bool StoreCore::AdoptBlock(const Candidate &candidate, EntryId id, EntryId parent) {
    const SlotBlock &block = candidate.header->block;
    std::uint32_t depth = candidate.depth;
    if (depth > 1) {
        if (parent == kNoEntry || !index_[parent].available()) return false;
        if (index_[parent].depth == 0) {
            depth = 0;  // as in Restore: the block before lost its lineage
        } else if (index_[parent].depth != depth - 1 || !index_[parent].rooted) {
            return false;
        }
    }
    if (id == kNoEntry) {
        id = index_.Insert(candidate.namespace_id, block.hash);
        ++stats_.blocks;
        index_[id].depth = depth;
        index_[id].checksum = block.checksum;
        if (depth > 1) index_.LinkChild(parent, id);
    } else {
        const Entry &there = index_[id];  // on ssd, or another slot's
        if (there.cpu != CpuState::kNone || there.checksum != block.checksum) return false;
        if (depth > 0 && there.depth > 0 && there.depth != depth) return false;
        if (depth > 0 && there.depth == 0) AdoptLineage(id, parent, depth);
    }
    Entry &entry = index_[id];
    const NamespaceInfo &space = namespaces_[entry.namespace_id];
    entry.slot = candidate.slot;
    entry.cpu = CpuState::kReady;
    entry.rooted = entry.depth > 0;
    entry.unverified = true;
    if (entry.parent != kNoEntry) ++index_[entry.parent].cpu_children;
    classes_[space.size_class].owner_of[entry.slot] = id;
    ++stats_.cpu_blocks;
    ++stats_.unverified;
    TenantStats &of_tenant = tenants_[space.tenant].stats;
    ++of_tenant.cpu_blocks;
    of_tenant.cpu_used_bytes += arena_->slot_bytes(space.size_class);
    Emit(EventKind::kStored, TierKind::kCpu, entry);
    return true;
}

// Tells the policies of the blocks, the oldest first. A block counts as recent as the latest that
// continues it, and comes after that one: so leaves are the first to leave.
void StoreCore::OrderAdopted(const std::vector<Candidate> &candidates) {
    struct Turn {
        std::uint64_t sequence;
        std::uint32_t backwards;  // how far from the last candidate: the deepest come first
        SlotId slot;
        EntryId id;
    };
    std::vector<std::vector<std::uint64_t>> latest(classes_.size());  // by class and slot
    for (std::size_t i = 0; i < classes_.size(); ++i) {
        latest[i].assign(candidates.empty() ? 0 : classes_[i].owner_of.size(), 0);
    }
    std::vector<Turn> turns;
    turns.reserve(candidates.size());
    for (std::size_t i = candidates.size(); i-- > 0;) {
        if (!candidates[i].adopted) continue;
        const SizeClass size_class = namespaces_[candidates[i].namespace_id].size_class;
        const SlotId slot = candidates[i].slot;
        const EntryId id = classes_[size_class].owner_of[slot];
        std::uint64_t &mine = latest[size_class][slot];
        mine = std::max(mine, candidates[i].sequence);
        const EntryId parent = index_[id].parent;
        if (parent != kNoEntry && index_[parent].slot != kNoSlot) {
            std::uint64_t &above = latest[size_class][index_[parent].slot];
            above = std::max(above, mine);
        }
        turns.push_back({mine, static_cast<std::uint32_t>(turns.size()), slot, id});
    }
    std::sort(turns.begin(), turns.end(), [](const Turn &a, const Turn &b) {
        return a.sequence != b.sequence ? a.sequence < b.sequence : a.backwards < b.backwards;
    });
    for (const Turn &turn : turns) {
        const Entry &entry = index_[turn.id];
        PolicyOf(entry).Add(turn.slot, entry.hash.Prefix64());
    }
}

// Gives each chunk to its class, or back, and makes the headers of free slots say so.
void StoreCore::ClaimChunks() {
    std::vector<bool> is_used;
    for (std::uint32_t chunk = arena_->num_chunks(); chunk-- > 0;) {
        std::size_t slot_bytes = 0;
        const Arena::ChunkRecord record = arena_->RecordedChunk(chunk, &slot_bytes);
        if (record == Arena::ChunkRecord::kDamaged || arena_->is_held(chunk)) continue;
        SizeClass size_class = kNoClass;
        bool wanted = false;
        if (record == Arena::ChunkRecord::kSlots && arena_->FindClass(slot_bytes, &size_class)) {
            const SlotId num_slots = arena_->slots_per_chunk(size_class);
            is_used.assign(num_slots, false);
            for (SlotId i = 0; i < num_slots; ++i) {
                is_used[i] = classes_[size_class].owner_of[chunk * num_slots + i] != kNoEntry;
                wanted = wanted || is_used[i];
            }
        }
        if (!wanted) {
            arena_->ReturnUnclaimed(chunk);
            continue;
        }
        for (SlotId i = 0; i < is_used.size(); ++i) {
            SlotHeader &header = arena_->chunk_header(chunk, i);
            if (is_used[i]) continue;
            if (header.seal.load(std::memory_order_relaxed) == 0 &&
                header.sequence.load(std::memory_order_relaxed) % 2 == 0) {
                continue;
            }
            UnsealSlot(header);
            header.sequence.store(NextSequence(), std::memory_order_release);
        }
        arena_->ClaimChunk(size_class, chunk, is_used);
    }
}

std::vector<BlockHash> StoreCore::ReadyNotOnSsd(NamespaceId ns) const {
    std::vector<std::pair<std::uint32_t, EntryId>> found;
    std::vector<BlockHash> hashes;
    ReadLock lock(mutex_);
    for (const EntryId id : index_.Ids()) {
        const Entry &entry = index_[id];
        if (entry.namespace_id == ns && entry.cpu == CpuState::kReady && !entry.on_ssd()) {
            found.emplace_back(entry.depth, id);
        }
    }
    std::sort(found.begin(), found.end());
    hashes.reserve(found.size());
    for (const auto &[depth, id] : found) hashes.push_back(index_[id].hash);
    return hashes;
}

std::vector<Quarantined> StoreCore::Quarantine() const {
    std::vector<Quarantined> held;
    ReadLock lock(mutex_);
    for (const auto &[id, of_writer] : quarantine_) {
        held.push_back({of_writer.writer, of_writer.slots.size()});
    }
    return held;
}

// Gives a block up whose slot is being written. Its header stays as it is: that of a slot being
// written by `writer`.
void StoreCore::QuarantineSlot(EntryId id, const SlotWriter &writer) {
    Entry &entry = index_[id];
    KV_CHECK(entry.cpu == CpuState::kWriting);
    const SizeClass size_class = ClassOf(entry);
    const SlotId slot = entry.slot;
    QuarantineOf &of_writer = quarantine_[writer.id];
    of_writer.writer = writer;
    of_writer.slots.push_back({slot / arena_->slots_per_chunk(size_class), size_class, slot});
    classes_[size_class].owner_of[slot] = kQuarantined;
    TenantOf(entry).stats.cpu_used_bytes -= arena_->slot_bytes(size_class);
    ForgetSlot(id);
    if (entry.detached) {
        FreeDetached(id);
    } else if (!entry.on_ssd()) {
        Drop(id);
    }
}

std::size_t StoreCore::ReleaseQuarantine(std::uint64_t writer_id) {
    WriteLock lock(mutex_);
    const auto it = quarantine_.find(writer_id);
    if (it == quarantine_.end()) return 0;
    const std::vector<QuarantinedSlot> slots = std::move(it->second.slots);
    quarantine_.erase(it);
    for (const QuarantinedSlot &held : slots) {
        if (held.size_class == kNoClass) {
            arena_->Unhold(held.chunk);
            continue;
        }
        arena_->header(held.size_class, held.slot)
            .sequence.store(NextSequence(), std::memory_order_release);
        classes_[held.size_class].owner_of[held.slot] = kNoEntry;
        arena_->Free(held.size_class, held.slot);
    }
    Changed();
    return slots.size();
}

// --- metadata: the namespaces' numbers in headers, then the caller's bytes

std::string StoreCore::PackMetadata(const std::string &bytes) const {
    std::string packed;
    const auto add = [&](std::uint32_t word) {
        packed.append(reinterpret_cast<const char *>(&word), sizeof(word));
    };
    add(static_cast<std::uint32_t>(namespaces_.size()));
    for (const NamespaceInfo &space : namespaces_) add(space.stored_id);
    return packed + bytes;
}

bool StoreCore::UnpackMetadata(const std::string &packed, std::vector<std::uint32_t> *ids,
                               std::string *bytes) {
    std::uint32_t count;
    if (packed.size() < sizeof(count)) return false;
    std::memcpy(&count, packed.data(), sizeof(count));
    if (count > (packed.size() - sizeof(count)) / sizeof(count)) return false;
    ids->resize(count);
    if (count > 0) std::memcpy(ids->data(), packed.data() + sizeof(count), count * sizeof(count));
    *bytes = packed.substr(sizeof(count) * (count + std::size_t{1}));
    return true;
}

std::string StoreCore::Metadata() const {
    const std::lock_guard<std::mutex> lock(metadata_mutex_);
    Arena::MetadataFound found;
    std::vector<std::uint32_t> ids;
    std::string bytes;
    UnpackMetadata(arena_->Metadata(&found), &ids, &bytes);
    return bytes;
}

bool StoreCore::SetMetadata(const std::string &bytes, std::string *error) {
    const std::lock_guard<std::mutex> lock(metadata_mutex_);
    if (bytes.size() > kMetadataBytesMax) {
        *error = "the metadata has " + std::to_string(bytes.size()) + " bytes, at most " +
                 std::to_string(kMetadataBytesMax) + " fit";
        return false;
    }
    std::string packed;
    {
        ReadLock lock(mutex_);
        if (namespaces_.size() > kStoredIdsMax) {
            *error = "there are too many namespaces for the arena's metadata";
            return false;
        }
        packed = PackMetadata(bytes);
    }
    return arena_->SetMetadata(packed, error);
}

}  // namespace kvstore
