#include "core/policy_simulator.h"

#include <algorithm>

#include "core/check.h"

namespace kvstore {
namespace {

// Ids may be small numbers, policies expect parts of a hash (splitmix64's finalizer: Steele et al.,
// OOPSLA 2014).
std::uint64_t Mix(std::uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

}  // namespace

PolicySimulator::PolicySimulator(std::unique_ptr<EvictionPolicy> policy, SlotId capacity)
    : policy_(std::move(policy)), blocks_(capacity), free_(capacity) {
    for (SlotId i = 0; i < capacity; ++i) free_[i] = capacity - 1 - i;
    slots_.reserve(capacity);
}

bool PolicySimulator::IsChain(const std::uint64_t *ids, std::size_t count) const {
    SlotId parent = kNoSlot;
    for (std::size_t i = 0; i < count; ++i) {
        const auto found = slots_.find(ids[i]);
        // Behind a block that is not resident nothing may be resident: kNoSlot is nobody's parent
        // but that of heads.
        const bool leading = i == 0 || parent != kNoSlot;
        if (found == slots_.end()) {
            parent = kNoSlot;
            continue;
        }
        if (!leading || blocks_[found->second].parent != parent) return false;
        parent = found->second;
    }
    std::vector<std::uint64_t> sorted(ids, ids + count);
    std::sort(sorted.begin(), sorted.end());
    return std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
}

std::size_t PolicySimulator::Request(const std::uint64_t *ids, std::size_t count) {
    path_.clear();
    for (std::size_t i = 0; i < count; ++i) {
        const auto found = slots_.find(ids[i]);
        if (found == slots_.end()) break;
        path_.push_back(found->second);
    }
    const std::size_t hits = path_.size();
    const std::size_t kept = std::min(count, blocks_.size());
    pinned_ = hits == 0 ? kNoSlot : path_.back();  // its ancestors have children, so they stay too
    while (path_.size() < kept) path_.push_back(FreeSlot());
    pinned_ = kNoSlot;
    for (std::size_t i = hits; i < kept; ++i) {
        const SlotId parent = i == 0 ? kNoSlot : path_[i - 1];
        if (parent != kNoSlot) ++blocks_[parent].children;
        blocks_[path_[i]] = {ids[i], parent, 0};
        slots_.emplace(ids[i], path_[i]);
    }
    for (std::size_t i = kept; i > hits; --i) policy_->Add(path_[i - 1], Mix(ids[i - 1]));
    for (std::size_t i = hits; i > 0; --i) policy_->Touch(path_[i - 1]);
    return hits;
}

SlotId PolicySimulator::FreeSlot() {
    if (!free_.empty()) {
        const SlotId slot = free_.back();
        free_.pop_back();
        return slot;
    }
    const SlotId slot = policy_->PopVictim([this](SlotId candidate) {
        ++checks_;
        return blocks_[candidate].children == 0 && candidate != pinned_;
    });
    KV_CHECK(slot != kNoSlot);
    ++evictions_;
    slots_.erase(blocks_[slot].id);
    const SlotId parent = blocks_[slot].parent;
    if (parent != kNoSlot && --blocks_[parent].children == 0) policy_->Due(parent);
    return slot;
}

}  // namespace kvstore
