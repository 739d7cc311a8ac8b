#include "core/index.h"

#include <algorithm>
#include <new>

#include "core/check.h"

namespace kvstore {

BlockIndex::Place BlockIndex::PlaceOf(NamespaceId ns, const BlockHash &hash) {
    std::uint64_t x = hash.Prefix64() ^ (ns * 0x9E3779B97F4A7C15ull);
    x ^= x >> 32;
    x *= 0xD6E8FEB86659FD93ull;
    x ^= x >> 32;
    return {static_cast<std::uint32_t>(x >> 58), static_cast<std::uint32_t>(x)};
}

EntryId BlockIndex::FindAt(const Place &place, NamespaceId ns, const BlockHash &hash) const {
    const Table &table = tables_[place.table];
    if (table.used == 0) return kNoEntry;
    const std::size_t mask = table.buckets.size() - 1;
    for (std::size_t i = place.tag & mask;; i = (i + 1) & mask) {
        const Bucket &bucket = table.buckets[i];
        if (bucket.entry_plus_one == 0) return kNoEntry;
        if (bucket.tag != place.tag) continue;
        const EntryId id = bucket.entry_plus_one - 1;
        const Entry &entry = (*this)[id];
        if (entry.namespace_id == ns && entry.hash == hash) return id;
    }
}

EntryId BlockIndex::Find(NamespaceId ns, const BlockHash &hash) const {
    return FindAt(PlaceOf(ns, hash), ns, hash);
}

void BlockIndex::FindMany(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                          EntryId *found) const {
    // Groups of 16: about as many memory reads as a core keeps in flight.
    constexpr std::size_t kGroup = 16;
    Place places[kGroup];
    for (std::size_t begin = 0; begin < n; begin += kGroup) {
        const std::size_t count = std::min(kGroup, n - begin);
        for (std::size_t i = 0; i < count; ++i) {
            places[i] = PlaceOf(ns, hashes[begin + i]);
            const Table &table = tables_[places[i].table];
            if (table.used == 0) continue;
            __builtin_prefetch(&table.buckets[places[i].tag & (table.buckets.size() - 1)]);
        }
        for (std::size_t i = 0; i < count; ++i) {
            const Table &table = tables_[places[i].table];
            if (table.used == 0) continue;
            const Bucket &bucket = table.buckets[places[i].tag & (table.buckets.size() - 1)];
            if (bucket.entry_plus_one != 0) {
                const Entry &entry = (*this)[bucket.entry_plus_one - 1];
                __builtin_prefetch(&entry);
                __builtin_prefetch(&entry.ssd_segment);  // an entry may begin anywhere in a line
            }
        }
        for (std::size_t i = 0; i < count; ++i) {
            found[begin + i] = FindAt(places[i], ns, hashes[begin + i]);
        }
    }
}

bool BlockIndex::IsRootedAt(NamespaceId ns, const BlockHash &hash, std::uint64_t depth,
                            bool *unlinked) const {
    const EntryId id = Find(ns, hash);
    if (id == kNoEntry) return false;
    const Entry &entry = (*this)[id];
    if (entry.rooted && entry.depth == depth) return true;
    if (entry.available()) *unlinked = true;
    return false;
}

std::size_t BlockIndex::MatchOneByOne(NamespaceId ns, const BlockHash *hashes,
                                      std::size_t n) const {
    constexpr std::size_t kStep = 64;
    EntryId found[kStep];
    for (std::size_t begin = 0; begin < n; begin += kStep) {
        const std::size_t count = std::min(kStep, n - begin);
        FindMany(ns, hashes + begin, count, found);
        for (std::size_t i = 0; i < count; ++i) {
            if (found[i] == kNoEntry || !(*this)[found[i]].available()) return begin + i;
        }
    }
    return n;
}

std::size_t BlockIndex::MatchPrefix(NamespaceId ns, const BlockHash *hashes, std::size_t n,
                                    std::int64_t start) const {
    if (n == 0) return 0;
    if (start < 0) return MatchOneByOne(ns, hashes, n);
    bool unlinked = false;
    const auto rooted = [&](std::size_t i) {
        return IsRootedAt(ns, hashes[i], static_cast<std::uint64_t>(start) + i + 1, &unlinked);
    };
    // The whole prompt is the common case of a warm cache, nothing at all that of a cold one.
    if (rooted(n - 1)) return n;
    std::size_t matched = 0;  // blocks [0, matched) are available
    std::size_t absent = n - 1;
    while (matched < absent && !unlinked) {
        const std::size_t middle = matched + (absent - matched) / 2;
        if (rooted(middle)) {
            matched = middle + 1;
        } else {
            absent = middle;
        }
    }
    // A block that is available but not rooted came without lineage: the search proves nothing.
    if (unlinked) return matched + MatchOneByOne(ns, hashes + matched, n - matched);
    return matched;
}

EntryId BlockIndex::Insert(NamespaceId ns, const BlockHash &hash) {
    EntryId id = free_;
    if (id != kNoEntry) {
        free_ = (*this)[id].parent;
    } else {
        id = next_++;
        KV_CHECK(id != kNoEntry);
        if ((id >> kChunkBits) == chunks_.size()) {
            chunks_.emplace_back(std::size_t{1} << kChunkBits);
        }
    }
    Entry &entry = *new (&(*this)[id]) Entry{};
    entry.hash = hash;
    entry.namespace_id = ns;

    const Place place = PlaceOf(ns, hash);
    Table &table = tables_[place.table];
    if ((table.used + 1) * 4 > table.buckets.size() * 3) Grow(&table);
    const std::size_t mask = table.buckets.size() - 1;
    std::size_t i = place.tag & mask;
    while (table.buckets[i].entry_plus_one != 0) i = (i + 1) & mask;
    table.buckets[i] = {place.tag, id + 1};
    ++table.used;
    ++size_;
    return id;
}

void BlockIndex::Grow(Table *table) {
    HugeArray<Bucket> bigger(std::max<std::size_t>(64, table->buckets.size() * 2));
    const std::size_t mask = bigger.size() - 1;
    for (std::size_t i = 0; i < table->buckets.size(); ++i) {
        const Bucket &bucket = table->buckets[i];
        if (bucket.entry_plus_one == 0) continue;
        std::size_t to = bucket.tag & mask;
        while (bigger[to].entry_plus_one != 0) to = (to + 1) & mask;
        bigger[to] = bucket;
    }
    table->buckets = std::move(bigger);
}

void BlockIndex::Unmap(EntryId id) {
    const Entry &entry = (*this)[id];
    const Place place = PlaceOf(entry.namespace_id, entry.hash);
    Table &table = tables_[place.table];
    const std::size_t mask = table.buckets.size() - 1;
    std::size_t hole = place.tag & mask;
    while (table.buckets[hole].entry_plus_one != id + 1) {
        KV_CHECK(table.buckets[hole].entry_plus_one != 0);
        hole = (hole + 1) & mask;
    }
    // Close the gap (Knuth vol. 3, 6.4, algorithm R): no tombstones, so look-ups never slow down.
    for (std::size_t i = (hole + 1) & mask; table.buckets[i].entry_plus_one != 0;
         i = (i + 1) & mask) {
        const std::size_t home = table.buckets[i].tag & mask;
        if (((i - home) & mask) >= ((i - hole) & mask)) {
            table.buckets[hole] = table.buckets[i];
            hole = i;
        }
    }
    table.buckets[hole] = Bucket{};
    --table.used;
    --size_;
}

void BlockIndex::Free(EntryId id) {
    Entry &entry = (*this)[id];
    KV_CHECK(entry.parent == kNoEntry && entry.first_child == kNoEntry && entry.leases == 0);
    entry.parent = free_;
    free_ = id;
}

void BlockIndex::LinkChild(EntryId parent, EntryId child) {
    Entry &above = (*this)[parent];
    Entry &below = (*this)[child];
    KV_CHECK(below.parent == kNoEntry && parent != child);
    below.parent = parent;
    below.prev_sibling = kNoEntry;
    below.next_sibling = above.first_child;
    if (above.first_child != kNoEntry) (*this)[above.first_child].prev_sibling = child;
    above.first_child = child;
    if (below.slot != kNoSlot) ++above.cpu_children;
}

void BlockIndex::UnlinkFromParent(EntryId child) {
    Entry &below = (*this)[child];
    if (below.parent == kNoEntry) return;
    Entry &above = (*this)[below.parent];
    if (below.prev_sibling != kNoEntry) {
        (*this)[below.prev_sibling].next_sibling = below.next_sibling;
    } else {
        above.first_child = below.next_sibling;
    }
    if (below.next_sibling != kNoEntry) {
        (*this)[below.next_sibling].prev_sibling = below.prev_sibling;
    }
    if (below.slot != kNoSlot) {
        KV_CHECK(above.cpu_children > 0);
        --above.cpu_children;
    }
    below.parent = below.next_sibling = below.prev_sibling = kNoEntry;
}

std::size_t BlockIndex::memory_bytes() const {
    std::size_t bytes = next_ * sizeof(Entry);  // what follows in the last chunk was never touched
    for (const auto &table : tables_) bytes += table.buckets.bytes();
    return bytes;
}

std::vector<EntryId> BlockIndex::Ids() const {
    std::vector<EntryId> ids;
    ids.reserve(size_);
    for (const auto &table : tables_) {
        for (std::size_t i = 0; i < table.buckets.size(); ++i) {
            if (table.buckets[i].entry_plus_one != 0) {
                ids.push_back(table.buckets[i].entry_plus_one - 1);
            }
        }
    }
    return ids;
}

}  // namespace kvstore
