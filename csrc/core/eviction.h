// Which slot leaves when the cpu tier is full.
//
// A policy orders the resident slots; it does not decide whether a slot may leave. That is the
// caller's `Evictable`: a slot may leave when it is ready, not leased, and no resident block
// continues its prefix. So blocks always leave leaves-first, whatever the policy.
//
// Life of a slot as a policy sees it:
//
//   Add --> queued --PopVictim (may leave)--------------> gone
//             ^ |  --PopVictim (may not leave)--> parked
//   Touch ----/ \--Remove--> gone                   |
//             ^-------------Due / Touch-------------/
//
// A slot that reaches the eviction end while it may not leave is *parked*: it leaves the queue, so
// that no later PopVictim pays for it again. The caller says Due(slot) when the reason is gone
// (its last child left, its last lease ended); the slot is then the next candidate.
// So PopVictim costs amortised O(1): each slot is parked at most once between two Due or Touch.
//
// Thread safety: none. The owner holds a lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/types.h"

namespace kvstore {

class EvictionPolicy {
public:
    // True when the slot may leave now.
    using Evictable = std::function<bool(SlotId)>;

    virtual ~EvictionPolicy() = default;

    // The slot holds a new block. `key` is 64 bits of the block's hash, for policies that remember
    // blocks that have left (ghosts). REQUIRES: the slot is unknown to the policy.
    virtual void Add(SlotId slot, std::uint64_t key) = 0;

    // The slot's block was used. Unknown slots are ignored.
    virtual void Touch(SlotId slot) = 0;

    // The slot's block left for a reason other than PopVictim; forget it. Unknown slots are
    // ignored.
    virtual void Remove(SlotId slot) = 0;

    // A parked slot may leave again. Slots that are not parked are left where they are.
    virtual void Due(SlotId slot) = 0;

    // Takes out the slot that should leave first among those that may, or returns kNoSlot.
    virtual SlotId PopVictim(const Evictable &evictable) = 0;

    // Slots known to the policy, parked ones included.
    virtual std::size_t size() const = 0;
};

// Makes a policy for slots [0, num_slots). Returns null for an unknown name.
std::unique_ptr<EvictionPolicy> MakeEvictionPolicy(const std::string &name, SlotId num_slots);

// Sorted names of all policies.
std::vector<std::string> EvictionPolicyNames();

// Registers a policy at load time: `static RegisterPolicy lru("lru", [](SlotId n) {...});` in the
// policy's own .cc file is all that adding one takes.
struct RegisterPolicy {
    using Factory = std::unique_ptr<EvictionPolicy> (*)(SlotId num_slots);
    RegisterPolicy(const char *name, Factory factory);
};

}  // namespace kvstore
