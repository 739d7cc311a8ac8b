// The last blocks that left: a bounded first-in-first-out memory of 64-bit keys, each with a small
// value. All memory is taken at construction: 13 bytes a key and the value.
//
// Keys are parts of cryptographic hashes, so they are used as hash values as they are. Two blocks
// with one key only cost a wrong guess about one of them.
//
// Invariants: index_ holds, by open addressing with linear probing, the positions of exactly those
// keys of the ring that are still remembered; a key is in it at most once.
// Thread safety: none.
#pragma once

#include <cstdint>
#include <vector>

#include "core/check.h"

namespace kvstore {

template <class Value>
class GhostQueue {
public:
    static constexpr std::size_t kMaxCapacity = (std::size_t{1} << 32) - 2;

    // Remembers the last `capacity` keys pushed. REQUIRES: 0 < capacity <= kMaxCapacity.
    explicit GhostQueue(std::size_t capacity)
        : keys_(capacity), values_(capacity), index_(capacity + capacity / 4 + 1, kEmpty) {
        KV_CHECK(capacity > 0 && capacity <= kMaxCapacity);
    }

    // Remembers the key as the latest; the oldest is forgotten when there is no room.
    void Push(std::uint64_t key, Value value) {
        Take(key);
        // A key that came back keeps its place in the ring until the ring comes round to it, so
        // whether a key is remembered depends only on how many have left since.
        const std::size_t stale = Find(keys_[head_]);
        if (stale != kNowhere && index_[stale] == head_) EraseAt(stale);
        keys_[head_] = key;
        values_[head_] = value;
        std::size_t at = Home(key);
        while (index_[at] != kEmpty) at = After(at);
        index_[at] = head_;
        head_ = head_ + 1 == keys_.size() ? 0 : head_ + 1;
    }

    bool Has(std::uint64_t key) const { return Find(key) != kNowhere; }

    // Forgets the key; returns its value, or Value{} when it was not remembered.
    Value Take(std::uint64_t key) {
        const std::size_t at = Find(key);
        if (at == kNowhere) return Value{};
        const Value value = values_[index_[at]];
        EraseAt(at);
        return value;
    }

private:
    static constexpr std::uint32_t kEmpty = UINT32_MAX;
    static constexpr std::size_t kNowhere = SIZE_MAX;

    std::size_t Home(std::uint64_t key) const {
        return static_cast<std::size_t>((static_cast<unsigned __int128>(key) * index_.size()) >>
                                        64);
    }
    std::size_t After(std::size_t at) const { return at + 1 == index_.size() ? 0 : at + 1; }

    std::size_t Find(std::uint64_t key) const {
        for (std::size_t at = Home(key); index_[at] != kEmpty; at = After(at)) {
            if (keys_[index_[at]] == key) return at;
        }
        return kNowhere;
    }

    // Closes the gap by moving back those entries behind it whose home is not behind it.
    void EraseAt(std::size_t gap) {
        for (std::size_t at = After(gap); index_[at] != kEmpty; at = After(at)) {
            const std::size_t home = Home(keys_[index_[at]]);
            const bool reachable =
                gap <= at ? (home <= gap || home > at) : (home <= gap && home > at);
            if (reachable) {
                index_[gap] = index_[at];
                gap = at;
            }
        }
        index_[gap] = kEmpty;
    }

    std::vector<std::uint64_t> keys_;
    std::vector<Value> values_;
    std::vector<std::uint32_t> index_;
    std::uint32_t head_ = 0;
};

}  // namespace kvstore
