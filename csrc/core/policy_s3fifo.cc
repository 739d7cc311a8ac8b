// S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).
//
// New blocks enter a small queue, a tenth of the slots. Those used at least twice more while they
// are in it move on to the main queue; the others leave and are remembered. A block that comes back
// while it is remembered enters the main queue at once. The main queue gives each block as many
// further rounds as it was used, at most three. A scan thus passes through the small queue only.
//
// The ghost queue remembers as many blocks as the main queue has slots. Parked slots count for
// neither queue. A round costs a use, so PopVictim stays amortised O(1).
#include <algorithm>

#include "core/ghost_queue.h"
#include "core/parking_policy.h"

namespace kvstore {
namespace {

constexpr std::uint8_t kMostUses = 3;
constexpr std::uint8_t kUsesToPromote = 2;

struct S3FifoNode : ParkingNode {
    std::uint8_t uses;
    bool in_main;
    std::uint64_t key;
};

class S3FifoPolicy final : public ParkingPolicy<S3FifoPolicy, S3FifoNode> {
public:
    explicit S3FifoPolicy(SlotId num_slots)
        : ParkingPolicy(num_slots),
          small_target_(std::max<SlotId>(1, num_slots / 10)),
          ghosts_(std::max<SlotId>(1, num_slots - num_slots / 10)) {}

private:
    friend ParkingPolicy;

    void Enter(SlotId slot, std::uint64_t key) {
        S3FifoNode &n = node(slot);
        n.key = key;
        n.uses = 0;
        n.in_main = ghosts_.Take(key) != 0;
        QueueOf(slot).PushNewest(nodes(), slot);
    }

    void Use(SlotId slot) {
        S3FifoNode &n = node(slot);
        if (n.uses < kMostUses) ++n.uses;
    }

    void Return(SlotId slot) {
        Use(slot);
        QueueOf(slot).PushNewest(nodes(), slot);
    }

    void Unlink(SlotId slot) { QueueOf(slot).Erase(nodes(), slot); }

    SlotId Next() {
        for (;;) {
            const bool from_small =
                !small_.empty() && (small_.size() >= small_target_ || main_.empty());
            const SlotId slot = (from_small ? small_ : main_).PopOldest(nodes());
            if (slot == kNoSlot) return kNoSlot;
            S3FifoNode &n = node(slot);
            if (n.uses < (n.in_main ? 1 : kUsesToPromote)) return slot;
            n.uses = n.in_main ? n.uses - 1 : 0;
            n.in_main = true;
            main_.PushNewest(nodes(), slot);
        }
    }

    // Only what leaves the small queue is remembered: main blocks had their chance.
    void Evicted(SlotId slot) {
        if (!node(slot).in_main) ghosts_.Push(node(slot).key, 1);
    }

    SlotList<S3FifoNode> &QueueOf(SlotId slot) { return node(slot).in_main ? main_ : small_; }

    const std::size_t small_target_;
    SlotList<S3FifoNode> small_;
    SlotList<S3FifoNode> main_;
    GhostQueue<std::uint8_t> ghosts_;
};

const RegisterPolicy s3fifo("s3fifo", [](SlotId num_slots) -> std::unique_ptr<EvictionPolicy> {
    return std::make_unique<S3FifoPolicy>(num_slots);
});

}  // namespace
}  // namespace kvstore
