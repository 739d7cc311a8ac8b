// MQ (Zhou, Philbin, Li, "The Multi-Queue Replacement Algorithm for Second Level Buffer Caches",
// USENIX ATC 2001).
//
// Eight LRU queues; a block used n times is in queue log2(n), and victims leave from the lowest
// queue that is not empty. A block that was not used for a lifetime, counted in uses of any block,
// moves one queue down; a block that comes back while it is remembered keeps its number of uses.
//
// The lifetime matters, and no constant fits: uses are counted in blocks, and a block is 16 tokens
// for one engine and 512 for another; a multiple of the capacity fits small or large caches only.
// So, as the paper proposes, it follows the time between two uses of a block, which is seen
// for resident and remembered blocks: here its 60th percentile, by stochastic approximation.
// bench/eviction.py measures what that gives.
//
// Other differences from the paper. It looks for expired blocks at every use; we look when a block
// enters and when one is to leave, one block a queue each time, so a hit costs hardly more than in
// LRU, while blocks still move down at least as fast as victims leave. Times are 32 bits wide and
// compared modulo 2^32.
//
// Memory: 24 bytes a slot and 21 for each of the four remembered blocks a slot.
#include <algorithm>
#include <bit>

#include "core/ghost_queue.h"
#include "core/parking_policy.h"

namespace kvstore {
namespace {

constexpr std::uint32_t kQueues = 8;
constexpr std::uint32_t kMostUses = 255;  // the last queue begins at 128
constexpr std::size_t kGhostsPerSlot = 4;

// A use that comes later than the lifetime raises it by 0.12%, one that comes sooner lowers it by
// 0.08%: at rest four in ten come later. A thousand uses change it by a factor of two or three.
constexpr double kLonger = 1.0012;
constexpr double kShorter = 0.9992;
constexpr double kLongestLifetime = 1 << 30;  // well below 2^32, where ages wrap

struct MqNode : ParkingNode {
    std::uint8_t queue;
    std::uint8_t uses;
    std::uint32_t used;  // when it was last used
    std::uint64_t key;
};

struct MqGhost {
    std::uint32_t used;
    std::uint8_t uses;
};

class MqPolicy final : public ParkingPolicy<MqPolicy, MqNode> {
public:
    explicit MqPolicy(SlotId num_slots)
        : ParkingPolicy(num_slots),
          lifetime_(num_slots),
          ghosts_(std::min(kGhostsPerSlot * num_slots, GhostQueue<MqGhost>::kMaxCapacity)) {}

private:
    friend ParkingPolicy;

    void Enter(SlotId slot, std::uint64_t key) {
        const MqGhost ghost = ghosts_.Take(key);
        MqNode &n = node(slot);
        n.key = key;
        n.uses = ghost.uses;
        n.used = ghost.used;
        Return(slot);
        Expire();
    }

    void Use(SlotId slot) {
        Unlink(slot);
        Return(slot);
    }

    void Return(SlotId slot) {
        MqNode &n = node(slot);
        ++now_;
        if (n.uses > 0) {
            lifetime_ *= now_ - n.used > lifetime_ ? kLonger : kShorter;
            lifetime_ = std::clamp(lifetime_, 1.0, kLongestLifetime);
        }
        n.uses = static_cast<std::uint8_t>(std::min(n.uses + 1u, kMostUses));
        n.used = now_;
        Link(slot, TopQueue(n));
    }

    void Unlink(SlotId slot) { queues_[node(slot).queue].Erase(nodes(), slot); }

    SlotId Next() {
        Expire();
        for (SlotList<MqNode> &queue : queues_) {
            if (!queue.empty()) return queue.PopOldest(nodes());
        }
        return kNoSlot;
    }

    void Evicted(SlotId slot) {
        ghosts_.Push(node(slot).key, {.used = node(slot).used, .uses = node(slot).uses});
    }

    void Link(SlotId slot, std::uint32_t queue) {
        node(slot).queue = static_cast<std::uint8_t>(queue);
        queues_[queue].PushNewest(nodes(), slot);
    }

    void Expire() {
        for (std::uint32_t queue = 1; queue < kQueues; ++queue) {
            const SlotId slot = queues_[queue].oldest();
            if (slot == kNoSlot) continue;
            const std::uint32_t lifetimes = TopQueue(node(slot)) - queue + 1;
            if (now_ - node(slot).used > lifetimes * lifetime_) {
                queues_[queue].Erase(nodes(), slot);
                Link(slot, queue - 1);
            }
        }
    }

    static std::uint32_t TopQueue(const MqNode &n) {
        return static_cast<std::uint32_t>(std::bit_width(n.uses)) - 1;
    }

    std::uint32_t now_ = 0;  // uses of any block so far
    double lifetime_;
    SlotList<MqNode> queues_[kQueues];
    GhostQueue<MqGhost> ghosts_;
};

const RegisterPolicy mq("mq", [](SlotId num_slots) -> std::unique_ptr<EvictionPolicy> {
    return std::make_unique<MqPolicy>(num_slots);
});

}  // namespace
}  // namespace kvstore
