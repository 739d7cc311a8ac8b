// Replays requests, each a chain of prefix blocks, through an eviction policy, to count how many
// blocks would have been found. Holds ids only, no bytes.
//
// A request finds its leading run of resident blocks (all that an engine can use), keeps the last
// of them from leaving, makes room for the rest, adds them, and then counts as one use of each
// block. Both run from the tail to the head, so that a block is never more recent than its
// ancestors. Of a request longer than the capacity only the head is kept.
//
// Invariant: a resident block's parent is resident, since only blocks without children may leave.
// Thread safety: none.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "core/eviction.h"

namespace kvstore {

class PolicySimulator {
public:
    // REQUIRES: 0 < capacity < kNoSlot, and the policy is for `capacity` slots and empty.
    PolicySimulator(std::unique_ptr<EvictionPolicy> policy, SlotId capacity);

    // True when the ids can be prefixes of one request: none occurs twice, and each that is
    // resident follows the same id as before.
    bool IsChain(const std::uint64_t *ids, std::size_t count) const;

    // Returns how many leading blocks were resident. REQUIRES: IsChain(ids, count).
    std::size_t Request(const std::uint64_t *ids, std::size_t count);

    std::size_t resident() const { return slots_.size(); }
    std::uint64_t evictions() const { return evictions_; }
    // How often the policy asked whether a slot may leave.
    std::uint64_t checks() const { return checks_; }

private:
    struct Block {
        std::uint64_t id;
        SlotId parent;
        std::uint32_t children;
    };

    SlotId FreeSlot();

    std::unique_ptr<EvictionPolicy> policy_;
    std::unordered_map<std::uint64_t, SlotId> slots_;
    std::vector<Block> blocks_;  // by slot
    std::vector<SlotId> free_;
    std::vector<SlotId> path_;  // slots of the current request, head first
    SlotId pinned_ = kNoSlot;
    std::uint64_t evictions_ = 0;
    std::uint64_t checks_ = 0;
};

}  // namespace kvstore
