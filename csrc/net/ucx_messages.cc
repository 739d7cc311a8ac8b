#include "net/ucx_messages.h"

#include <cstring>
#include <utility>
#include <vector>

namespace kvstore {

UcxMessages::UcxMessages(UcxWorker &worker)
    : worker_(worker), outbox_(worker, [this](const UcxPartHead &head) {
          const auto found = awaited_.find(head.part);
          if (found == awaited_.end()) return;
          found->second.is_sending = false;
          Settle(head.part, found->second);
      }) {}

bool UcxMessages::Read(ucx::Ep ep, UcxPartHead head, std::uint8_t *to, UcxMove::Part *part) {
    head.kind = UcxPartKind::kRead;
    head.session = session_;
    head.part = next_part_++;
    Awaited awaited;
    awaited.part = part;
    awaited.to = to;
    awaited.at = head.at;
    awaited.bytes = awaited.left = head.bytes;
    awaited_.emplace(head.part, awaited);
    return worker_.SendHead(ep, head);
}

bool UcxMessages::Write(ucx::Ep ep, UcxPartHead head, const std::uint8_t *from,
                        UcxMove::Part *part) {
    head.kind = UcxPartKind::kWrite;
    head.session = session_;
    head.part = next_part_++;
    Awaited awaited;
    awaited.part = part;
    awaited.is_sending = head.bytes > 0;
    awaited_.emplace(head.part, awaited);
    if (head.bytes == 0) return worker_.SendHead(ep, head);
    outbox_.Push(head, from);
    return true;
}

void UcxMessages::OnPart(const UcxPartHead &head, const void *data, std::size_t bytes) {
    const auto found = awaited_.find(head.part);
    if (head.kind != UcxPartKind::kData || found == awaited_.end()) return;
    Awaited &awaited = found->second;
    const std::uint64_t offset = head.at - awaited.at;
    if (awaited.to == nullptr || head.at < awaited.at || bytes > awaited.left ||
        offset > awaited.bytes - bytes) {
        return;  // no honest peer; the part stays open until the deadline
    }
    std::memcpy(awaited.to + offset, data, bytes);
    awaited.left -= bytes;
    if (awaited.left > 0) return;
    awaited.is_answered = true;
    awaited.status = PieceStatus::kOk;
    Settle(head.part, awaited);
}

void UcxMessages::OnAnswer(std::uint64_t part, UcxAnswer answer) {
    const auto found = awaited_.find(part);
    if (found == awaited_.end()) return;
    Awaited &awaited = found->second;
    const bool is_read = awaited.to != nullptr && awaited.left > 0;
    awaited.is_answered = true;
    awaited.status =
        answer == UcxAnswer::kOk && !is_read ? PieceStatus::kOk : PieceStatus::kRefused;
    Settle(part, awaited);
}

void UcxMessages::Settle(std::uint64_t part, Awaited &awaited) {
    if (awaited.is_sending || !awaited.is_answered) return;
    const Awaited settled = awaited;
    awaited_.erase(part);
    settled.part->move->End(settled.part, settled.status);
}

void UcxMessages::Forget(const UcxMove &move) {
    std::vector<std::uint64_t> parts;
    for (auto &[number, awaited] : awaited_) {
        if (awaited.part->move != &move) continue;
        awaited.is_answered = true;
        parts.push_back(number);
    }
    for (const std::uint64_t number : parts) outbox_.Drop(number);
    for (const std::uint64_t number : parts) {
        const auto found = awaited_.find(number);
        if (found != awaited_.end()) Settle(number, found->second);
    }
}

}  // namespace kvstore
