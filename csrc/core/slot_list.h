// A doubly linked list whose links lie in an array indexed by slot, so that linking never allocates
// and several lists can share one array (a slot is in at most one of them).
//
// A Node has two fields, `newer` and `older`, which only the list that holds the slot may touch.
// The newest end is where used slots enter; the oldest end is where victims leave.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace kvstore {

template <class Node>
class SlotList {
public:
    bool empty() const { return oldest_ == kNoSlot; }
    std::size_t size() const { return size_; }
    SlotId oldest() const { return oldest_; }

    // REQUIRES for both pushes: the slot is in no list.
    void PushNewest(Node *nodes, SlotId slot) {
        nodes[slot].newer = kNoSlot;
        nodes[slot].older = newest_;
        (newest_ == kNoSlot ? oldest_ : nodes[newest_].newer) = slot;
        newest_ = slot;
        ++size_;
    }

    void PushOldest(Node *nodes, SlotId slot) {
        nodes[slot].older = kNoSlot;
        nodes[slot].newer = oldest_;
        (oldest_ == kNoSlot ? newest_ : nodes[oldest_].older) = slot;
        oldest_ = slot;
        ++size_;
    }

    // REQUIRES: the slot is in this list.
    void Erase(Node *nodes, SlotId slot) {
        const SlotId newer = nodes[slot].newer;
        const SlotId older = nodes[slot].older;
        (newer == kNoSlot ? newest_ : nodes[newer].older) = older;
        (older == kNoSlot ? oldest_ : nodes[older].newer) = newer;
        --size_;
    }

    // Returns kNoSlot when the list is empty.
    SlotId PopOldest(Node *nodes) {
        const SlotId slot = oldest_;
        if (slot != kNoSlot) Erase(nodes, slot);
        return slot;
    }

private:
    SlotId newest_ = kNoSlot;
    SlotId oldest_ = kNoSlot;
    std::size_t size_ = 0;
};

}  // namespace kvstore
