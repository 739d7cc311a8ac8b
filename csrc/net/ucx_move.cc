#include "net/ucx_move.h"

#include <algorithm>

#include "net/ucx_messages.h"

namespace kvstore {

UcxMove::UcxMove(const ucx::Functions &api, ucx::Ep ep, UcxMessages *messages,
                 const UcxRemote &remote, UcxOp op, const UcxBatch &batch, PieceStatus *statuses,
                 bool *done)
    : api_(api),
      ep_(ep),
      messages_(messages),
      remote_(remote),
      op_(op),
      batch_(batch),
      statuses_(statuses),
      done_(done),
      parts_left_(batch.n),
      is_flushed_(op == UcxOp::kRead || messages != nullptr) {
    for (std::size_t i = 0; i < kPartsMax; ++i) free_.push_back(&parts_[i]);
    for (Part &part : parts_) part.move = this;
    parts_[kPartsMax].is_flush = true;
    for (std::size_t i = 0; i < batch.n; ++i) {
        const std::uint64_t offset = batch.remote_offsets[i], bytes = batch.lengths[i];
        const bool fits = offset <= remote.bytes && bytes <= remote.bytes - offset;
        const bool may = messages != nullptr || (fits && (op == UcxOp::kRead || remote.writable));
        statuses_[i] = may ? PieceStatus::kLost : PieceStatus::kRefused;
    }
}

bool UcxMove::Issue() {
    while (next_ < batch_.n) {
        const std::uint64_t bytes = batch_.lengths[next_];
        if (statuses_[next_] == PieceStatus::kRefused) {
            next_byte_ = 0;
            ++next_;
            continue;
        }
        if (bytes == 0 && messages_ == nullptr) {
            arrived_.push_back(static_cast<std::uint32_t>(next_++));
            continue;
        }
        const std::uint64_t part_bytes = std::min(kPartBytes, bytes - next_byte_);
        if (free_.empty() || (flight_bytes_ > 0 && flight_bytes_ + part_bytes > kFlightBytes)) {
            return messages_ == nullptr || messages_->Pump(ep_);
        }
        Part *part = free_.back();
        free_.pop_back();
        part->piece = static_cast<std::uint32_t>(next_);
        part->bytes = part_bytes;
        const std::uint64_t offset = next_byte_;
        next_byte_ += part_bytes;
        if (next_byte_ == bytes) {
            next_byte_ = 0;
            ++next_;
        }
        if (!Begin(part, offset)) return false;
    }
    if (messages_ != nullptr) return messages_->Pump(ep_);
    return is_flushed_ || is_flushing_ || in_flight_ > 0 || Flush();
}

bool UcxMove::Begin(Part *part, std::uint64_t offset) {
    ++parts_left_[part->piece];
    ++in_flight_;
    flight_bytes_ += part->bytes;
    ucx::RequestParam param = {};
    param.op_attr_mask = ucx::kOpCallback | ucx::kOpUserData | ucx::kOpMemoryType;
    param.memory_type = ucx::kMemoryTypeHost;
    param.cb.send = &OnDone;
    param.user_data = part;
    void *local = reinterpret_cast<void *>(batch_.local_addresses[part->piece] + offset);
    if (messages_ != nullptr) {
        UcxPartHead head;
        head.region = remote_.id;
        head.offset = batch_.remote_offsets[part->piece];
        head.total = batch_.lengths[part->piece];
        head.at = offset;
        head.bytes = part->bytes;
        auto *at = static_cast<std::uint8_t *>(local);
        return op_ == UcxOp::kRead ? messages_->Read(ep_, head, at, part)
                                   : messages_->Write(ep_, head, at, part);
    }
    const std::uint64_t remote = remote_.base + batch_.remote_offsets[part->piece] + offset;
    return Made(part, op_ == UcxOp::kRead
                          ? api_.ucp_get_nbx(ep_, local, part->bytes, remote, remote_.key, &param)
                          : api_.ucp_put_nbx(ep_, local, part->bytes, remote, remote_.key, &param));
}

bool UcxMove::Flush() {
    Part *part = &parts_[kPartsMax];
    is_flushing_ = true;
    ++in_flight_;
    ucx::RequestParam param = {};
    param.op_attr_mask = ucx::kOpCallback | ucx::kOpUserData;
    param.cb.send = &OnDone;
    param.user_data = part;
    return Made(part, api_.ucp_ep_flush_nbx(ep_, &param));
}

bool UcxMove::Made(Part *part, ucx::StatusPtr result) {
    if (ucx::IsRequest(result)) return true;
    const bool is_done = result == nullptr;
    End(part, is_done ? PieceStatus::kOk : PieceStatus::kLost);
    return is_done;
}

void UcxMove::OnDone(void *request, ucx::Status status, void *user_data) {
    auto *part = static_cast<Part *>(user_data);
    part->move->api_.ucp_request_free(request);
    part->move->End(part, status == ucx::kOk ? PieceStatus::kOk : PieceStatus::kLost);
}

void UcxMove::End(Part *part, PieceStatus status) {
    --in_flight_;
    *done_ = true;
    if (part->is_flush) {
        is_flushed_ = status == PieceStatus::kOk && !is_abandoned_;
        // What was put counts only now.
        for (std::uint32_t i = 0; is_flushed_ && i < batch_.n; ++i) {
            if (statuses_[i] == PieceStatus::kLost && parts_left_[i] == 0) arrived_.push_back(i);
        }
        return;
    }
    flight_bytes_ -= part->bytes;
    free_.push_back(part);
    if (is_abandoned_) return;
    const std::uint32_t piece = part->piece;
    // A part that failed is never subtracted, so its piece does not become whole.
    if (status == PieceStatus::kRefused) statuses_[piece] = status;
    if (status != PieceStatus::kOk || --parts_left_[piece] > 0) return;
    const bool is_whole = piece < next_;
    if (is_whole && (op_ == UcxOp::kRead || messages_ != nullptr)) arrived_.push_back(piece);
}

void UcxMove::Abandon(PieceStatus status) {
    for (std::size_t i = 0; i < batch_.n; ++i) {
        if (statuses_[i] == PieceStatus::kLost) statuses_[i] = status;
    }
    is_abandoned_ = true;
}

}  // namespace kvstore
