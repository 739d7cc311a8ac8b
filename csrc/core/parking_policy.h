// What every eviction policy has in common: which slots are known, parked and due (eviction.h), so
// that a policy itself only keeps an order of the slots that are queued.
//
//   absent --Add--> queued --taken as candidate, may leave--------> absent
//                     ^  \---taken as candidate, may not leave--> parked --Due--> due
//                     \-------------------Touch---------------------/------------/
//
// Candidates are taken from the due slots first (the latest first), then from the policy.
//
// A policy derives from ParkingPolicy<itself, its node> and has, all private to it and a friend:
//   void Enter(slot, key)  a new block: link it
//   void Use(slot)         a linked slot was used: move it
//   void Return(slot)      a slot that was parked or due was used: link it
//   void Unlink(slot)      a linked slot leaves for another reason
//   SlotId Next()          unlink and return the next candidate; kNoSlot when none is linked
//   void Evicted(slot)     the slot, not linked, was chosen as victim
// They are called by name, not virtually: Touch of a long prefix is one virtual call a slot.
#pragma once

#include <vector>

#include "core/check.h"
#include "core/eviction.h"
#include "core/slot_list.h"

namespace kvstore {

enum class Place : std::uint8_t { kAbsent, kQueued, kParked, kDue };

// `newer` and `older` belong to the list that holds the slot: the policy's own, or the due slots'.
struct ParkingNode {
    SlotId newer;
    SlotId older;
    Place place = Place::kAbsent;
};

template <class Policy, class Node>
class ParkingPolicy : public EvictionPolicy {
public:
    void Add(SlotId slot, std::uint64_t key) final {
        KV_CHECK(slot < nodes_.size() && nodes_[slot].place == Place::kAbsent);
        nodes_[slot].place = Place::kQueued;
        ++known_;
        self().Enter(slot, key);
    }

    void Touch(SlotId slot) final {
        KV_CHECK(slot < nodes_.size());
        if (nodes_[slot].place == Place::kQueued) {
            self().Use(slot);
        } else if (nodes_[slot].place != Place::kAbsent) {
            if (nodes_[slot].place == Place::kDue) due_.Erase(nodes(), slot);
            nodes_[slot].place = Place::kQueued;
            self().Return(slot);
        }
    }

    void Remove(SlotId slot) final {
        KV_CHECK(slot < nodes_.size());
        const Place place = nodes_[slot].place;
        if (place == Place::kAbsent) return;
        if (place == Place::kQueued) self().Unlink(slot);
        if (place == Place::kDue) due_.Erase(nodes(), slot);
        nodes_[slot].place = Place::kAbsent;
        --known_;
    }

    void Due(SlotId slot) final {
        KV_CHECK(slot < nodes_.size());
        if (nodes_[slot].place != Place::kParked) return;
        nodes_[slot].place = Place::kDue;
        due_.PushOldest(nodes(), slot);
    }

    SlotId PopVictim(const Evictable &evictable) final {
        for (;;) {
            SlotId slot = due_.PopOldest(nodes());
            if (slot == kNoSlot) slot = self().Next();
            if (slot == kNoSlot) return kNoSlot;
            if (evictable(slot)) {
                self().Evicted(slot);
                nodes_[slot].place = Place::kAbsent;
                --known_;
                return slot;
            }
            nodes_[slot].place = Place::kParked;
        }
    }

    std::size_t size() const final { return known_; }

protected:
    explicit ParkingPolicy(SlotId num_slots) : nodes_(num_slots) {}

    Node *nodes() { return nodes_.data(); }
    Node &node(SlotId slot) { return nodes_[slot]; }

private:
    Policy &self() { return static_cast<Policy &>(*this); }

    std::vector<Node> nodes_;
    SlotList<Node> due_;
    std::size_t known_ = 0;
};

}  // namespace kvstore
