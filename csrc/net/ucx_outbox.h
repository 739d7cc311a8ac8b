// Parts of memory that go to one peer as messages, in order, a few at a time.
//
// What UCX has of it must stay: an outbox lives until in_flight() is 0.
//
// Thread safety: none; the lock of the worker's owner.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <list>
#include <vector>

#include "net/ucx_worker.h"

namespace kvstore {

class UcxOutbox {
public:
    // So many messages are under way: what keeps a socket busy.
    static constexpr std::size_t kSlots = 8;

    // `on_sent`: this part's memory is not read any more. Called within Progress, Pump and Drop...
    UcxOutbox(UcxWorker &worker, std::function<void(const UcxPartHead &)> on_sent);
    UcxOutbox(const UcxOutbox &) = delete;
    UcxOutbox &operator=(const UcxOutbox &) = delete;

    // `head.bytes` bytes, whose first is `head.at` in its piece.
    void Push(const UcxPartHead &head, const std::uint8_t *data);
    // Begins as many messages as may be under way. False when the endpoint has failed.
    bool Pump(ucx::Ep ep);
    // Begins no more of a part, of a region's parts, of any.
    void Drop(std::uint64_t part) {
        DropIf([part](const UcxPartHead &head) { return head.part == part; });
    }
    void DropRegion(std::uint64_t region) {
        DropIf([region](const UcxPartHead &head) { return head.region == region; });
    }
    void DropAll() {
        DropIf([](const UcxPartHead &) { return true; });
    }

    bool has_region(std::uint64_t region) const;
    bool is_empty() const { return parts_.empty(); }
    std::size_t in_flight() const { return kSlots - free_.size(); }

private:
    struct Part {
        UcxPartHead head;
        const std::uint8_t *data = nullptr;
        std::uint64_t begun = 0;  // bytes
        std::size_t in_flight = 0;
        bool is_dropped = false;
    };
    struct Slot {
        UcxOutbox *outbox = nullptr;
        std::list<Part>::iterator part;
        UcxPartHead head;
    };
    static void OnDone(void *request, ucx::Status status, void *slot);

    template <typename Test>
    void DropIf(Test test) {
        for (auto part = parts_.begin(); part != parts_.end();) {
            const auto next = std::next(part);
            if (test(part->head)) {
                part->is_dropped = true;
                Ended(part);
            }
            part = next;
        }
    }
    void End(Slot *slot);
    void Ended(std::list<Part>::iterator part);

    UcxWorker &worker_;
    const std::function<void(const UcxPartHead &)> on_sent_;
    std::list<Part> parts_;
    std::array<Slot, kSlots> slots_;
    std::vector<Slot *> free_;
};

}  // namespace kvstore
