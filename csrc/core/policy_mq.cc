// MQ (Zhou, Philbin, Li, "The Multi-Queue Replacement Algorithm for Second Level Buffer Caches",
// USENIX ATC 2001).
//
// Eight LRU queues; a block used n times is in queue log2(n), and victims leave from the lowest
// queue that is not empty. A block that was not used for a lifetime, counted in uses of any block,
// moves one queue down; a block that comes back while it is remembered keeps its number of uses.
//
// Differences from the paper. It looks for expired blocks at every use; we look when a block
// enters and when one is to leave, one block a queue each time, so a hit costs no more than in
// LRU; victims leave at most that fast. Times are 32 bits and compared modulo 2^32.
#include <algorithm>
#include <bit>

#include "core/ghost_queue.h"
#include "core/parking_policy.h"

namespace kvstore {
namespace {

constexpr std::uint32_t kQueues = 8;
constexpr std::uint16_t kMostUses = UINT16_MAX;
constexpr std::size_t kGhostsPerSlot = 4;

struct MqNode : ParkingNode {
    std::uint8_t queue;
    std::uint16_t uses;
    std::uint32_t expires;
    std::uint64_t key;
};

class MqPolicy final : public ParkingPolicy<MqPolicy, MqNode> {
public:
    MqPolicy(SlotId num_slots, std::uint32_t lifetime, std::size_t num_ghosts)
        : ParkingPolicy(num_slots), lifetime_(lifetime), ghosts_(num_ghosts) {}

private:
    friend ParkingPolicy;

    void Enter(SlotId slot, std::uint64_t key) {
        node(slot).key = key;
        node(slot).uses = ghosts_.Take(key);
        Return(slot);
        Expire();
    }

    void Use(SlotId slot) {
        Unlink(slot);
        Return(slot);
    }

    void Return(SlotId slot) {
        MqNode &n = node(slot);
        if (n.uses < kMostUses) ++n.uses;
        ++now_;
        const auto log2 = static_cast<std::uint32_t>(std::bit_width(n.uses)) - 1;
        Link(slot, std::min(log2, kQueues - 1));
    }

    void Unlink(SlotId slot) { queues_[node(slot).queue].Erase(nodes(), slot); }

    SlotId Next() {
        Expire();
        for (SlotList<MqNode> &queue : queues_) {
            if (!queue.empty()) return queue.PopOldest(nodes());
        }
        return kNoSlot;
    }

    void Evicted(SlotId slot) { ghosts_.Push(node(slot).key, node(slot).uses); }

    void Link(SlotId slot, std::uint32_t queue) {
        node(slot).queue = static_cast<std::uint8_t>(queue);
        node(slot).expires = now_ + lifetime_;
        queues_[queue].PushNewest(nodes(), slot);
    }

    void Expire() {
        for (std::uint32_t queue = 1; queue < kQueues; ++queue) {
            const SlotId slot = queues_[queue].oldest();
            if (slot == kNoSlot || static_cast<std::int32_t>(node(slot).expires - now_) >= 0) {
                continue;
            }
            queues_[queue].Erase(nodes(), slot);
            Link(slot, queue - 1);
        }
    }

    const std::uint32_t lifetime_;
    std::uint32_t now_ = 0;
    SlotList<MqNode> queues_[kQueues];
    GhostQueue ghosts_;
};

const RegisterPolicy mq("mq", [](SlotId num_slots) -> std::unique_ptr<EvictionPolicy> {
    return std::make_unique<MqPolicy>(num_slots, 10'000, kGhostsPerSlot * num_slots);
});

}  // namespace
}  // namespace kvstore
