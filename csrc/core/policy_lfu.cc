// LFU with aging and a memory: the slot used least often leaves first.
//
// Pure LFU keeps a block that was hot yesterday for ever. Here a slot's priority is its number of
// uses plus the age that the policy had at the slot's last use, and the age follows the priority of
// the latest candidate (dynamic aging: Arlitt et al., "Evaluating Content Management Techniques for
// Web Proxy Caches", SIGMETRICS PER 2000). So a hot block outlives a new one by as many steps of
// age as it has more uses, and no longer. A block that comes back while it is remembered, that is
// before num_slots others have left, keeps its number of uses. Equal priorities leave in order of
// last use.
//
// Invariant: the priority of every queued slot is in [age_, age_ + kMostUses]. So a ring of
// kBuckets lists, one a priority, keeps them all in order in O(1).
#include <algorithm>
#include <bit>

#include "core/ghost_queue.h"
#include "core/parking_policy.h"

namespace kvstore {
namespace {

constexpr std::uint32_t kBuckets = 256;
constexpr std::uint32_t kMostUses = kBuckets - 1;

struct LfuNode : ParkingNode {
    std::uint8_t uses;
    std::uint8_t bucket;  // priority modulo kBuckets
    std::uint64_t key;
};

class LfuPolicy final : public ParkingPolicy<LfuPolicy, LfuNode> {
public:
    explicit LfuPolicy(SlotId num_slots) : ParkingPolicy(num_slots), ghosts_(num_slots) {}

private:
    friend ParkingPolicy;

    void Enter(SlotId slot, std::uint64_t key) {
        node(slot).key = key;
        node(slot).uses = ghosts_.Take(key);
        Return(slot);
    }

    void Use(SlotId slot) {
        Unlink(slot);
        Return(slot);
    }

    void Return(SlotId slot) {
        LfuNode &n = node(slot);
        n.uses = static_cast<std::uint8_t>(std::min(n.uses + 1u, kMostUses));
        n.bucket = static_cast<std::uint8_t>((age_ + n.uses) % kBuckets);
        buckets_[n.bucket].PushNewest(nodes(), slot);
        occupied_[n.bucket / 64] |= std::uint64_t{1} << (n.bucket % 64);
    }

    void Unlink(SlotId slot) {
        const std::uint8_t bucket = node(slot).bucket;
        buckets_[bucket].Erase(nodes(), slot);
        if (buckets_[bucket].empty()) {
            occupied_[bucket / 64] &= ~(std::uint64_t{1} << (bucket % 64));
        }
    }

    SlotId Next() {
        // The lowest priority is the first occupied bucket from the age's own, round the ring; the
        // word that holds the age's bucket is looked at twice, the part behind it last.
        for (std::uint32_t i = 0; i <= kWords; ++i) {
            const std::uint32_t word = (age_ / 64 + i) % kWords;
            std::uint64_t bits = occupied_[word];
            if (i == 0) bits &= ~std::uint64_t{0} << (age_ % 64);
            if (bits == 0) continue;
            age_ = word * 64 + static_cast<std::uint32_t>(std::countr_zero(bits));
            const SlotId slot = buckets_[age_].oldest();
            Unlink(slot);
            return slot;
        }
        return kNoSlot;
    }

    void Evicted(SlotId slot) { ghosts_.Push(node(slot).key, node(slot).uses); }

    static constexpr std::uint32_t kWords = kBuckets / 64;
    SlotList<LfuNode> buckets_[kBuckets];
    std::uint64_t occupied_[kWords] = {};  // a bit for each bucket that is not empty
    std::uint32_t age_ = 0;                // modulo kBuckets
    GhostQueue<std::uint8_t> ghosts_;
};

const RegisterPolicy lfu("lfu", [](SlotId num_slots) -> std::unique_ptr<EvictionPolicy> {
    return std::make_unique<LfuPolicy>(num_slots);
});

}  // namespace
}  // namespace kvstore
