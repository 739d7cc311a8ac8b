// LRU: the slot that was not used for the longest time leaves first.
//
// When a prefix is touched from its tail to its head, a block is never more recent than its
// ancestors, so blocks leave leaves-first without a single slot being parked.
#include "core/parking_policy.h"

namespace kvstore {
namespace {

class LruPolicy final : public ParkingPolicy<LruPolicy, ParkingNode> {
public:
    explicit LruPolicy(SlotId num_slots) : ParkingPolicy(num_slots) {}

private:
    friend ParkingPolicy;

    void Enter(SlotId slot, std::uint64_t) { queue_.PushNewest(nodes(), slot); }
    void Use(SlotId slot) {
        queue_.Erase(nodes(), slot);
        queue_.PushNewest(nodes(), slot);
    }
    void Return(SlotId slot) { queue_.PushNewest(nodes(), slot); }
    void Unlink(SlotId slot) { queue_.Erase(nodes(), slot); }
    SlotId Next() { return queue_.PopOldest(nodes()); }
    void Evicted(SlotId) {}

    SlotList<ParkingNode> queue_;
};

// Policies register while the library loads. A linker leaves out only archive members that nothing
// refers to; every file of csrc is linked into the extension as an object, so none is lost.
const RegisterPolicy lru("lru", [](SlotId num_slots) -> std::unique_ptr<EvictionPolicy> {
    return std::make_unique<LruPolicy>(num_slots);
});

}  // namespace
}  // namespace kvstore
