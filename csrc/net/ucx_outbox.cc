#include "net/ucx_outbox.h"

#include <algorithm>
#include <utility>

namespace kvstore {

UcxOutbox::UcxOutbox(UcxWorker &worker, std::function<void(const UcxPartHead &)> on_sent)
    : worker_(worker), on_sent_(std::move(on_sent)) {
    for (Slot &slot : slots_) {
        slot.outbox = this;
        free_.push_back(&slot);
    }
}

void UcxOutbox::Push(const UcxPartHead &head, const std::uint8_t *data) {
    Part part;
    part.head = head;
    part.data = data;
    parts_.push_back(part);
}

bool UcxOutbox::Pump(ucx::Ep ep) {
    for (auto part = parts_.begin(); part != parts_.end() && !free_.empty();) {
        const auto next = std::next(part);
        while (!free_.empty() && !part->is_dropped && part->begun < part->head.bytes) {
            Slot *slot = free_.back();
            free_.pop_back();
            const std::uint64_t bytes = std::min(kUcxFragmentBytes, part->head.bytes - part->begun);
            slot->part = part;
            slot->head = part->head;
            slot->head.at += part->begun;
            const std::uint8_t *data = part->data + part->begun;
            part->begun += bytes;
            ++part->in_flight;
            const ucx::StatusPtr sent =
                worker_.SendPart(ep, slot->head, data, bytes, &OnDone, slot);
            if (ucx::IsRequest(sent)) continue;
            const bool is_last = part->begun == part->head.bytes;
            End(slot);
            if (sent != nullptr) return false;
            if (is_last) break;  // the part may be gone
        }
        part = next;
    }
    return true;
}

bool UcxOutbox::has_region(std::uint64_t region) const {
    return std::any_of(parts_.begin(), parts_.end(),
                       [region](const Part &part) { return part.head.region == region; });
}

void UcxOutbox::OnDone(void *request, ucx::Status, void *user_data) {
    auto *slot = static_cast<Slot *>(user_data);
    slot->outbox->worker_.Free(request);
    slot->outbox->End(slot);
}

void UcxOutbox::End(Slot *slot) {
    const auto part = slot->part;
    free_.push_back(slot);
    --part->in_flight;
    Ended(part);
}

void UcxOutbox::Ended(std::list<Part>::iterator part) {
    if (part->in_flight > 0 || (!part->is_dropped && part->begun < part->head.bytes)) return;
    const UcxPartHead head = part->head;
    parts_.erase(part);
    on_sent_(head);
}

}  // namespace kvstore
