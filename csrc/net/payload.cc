// WRITE: payload from the peer straight into the slots of a reservation; see connection.h.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "copy/copy.h"
#include "core/check.h"
#include "net/connection.h"

namespace kvstore {

namespace {

constexpr std::size_t kTurnBytes = 1 << 20;
constexpr std::size_t kParts = 16;
constexpr std::size_t kDiscardBytes = 64 << 10;

}  // namespace

void Connection::BeginWrite(std::size_t prefix_bytes) {
    CommitRequest &request = incoming_.request;
    const std::uint64_t payload_bytes = header_.length - prefix_bytes;
    if (!Parse(body(), prefix_bytes, &request) ||
        payload_bytes != request.m * client_->terms.block_bytes) {
        BreakProtocol("write: " + std::to_string(payload_bytes) + " bytes of payload are not " +
                      std::to_string(request.m) + " blocks");
        return;
    }
    started_ns_ = SteadyNowNs();
    client_->requests.fetch_add(1, std::memory_order_relaxed);
    client_->bytes_in.fetch_add(kHeaderBytes + prefix_bytes, std::memory_order_relaxed);
    AddTo(services_.counters.requests, 1);
    frame_buffered_ = kHeaderBytes + prefix_bytes;
    incoming_.active = true;
    incoming_.refused = Status::kOk;
    incoming_.payload_bytes = payload_bytes;
    incoming_.received = 0;
    incoming_.checked = 0;
    incoming_.blocks.clear();
    incoming_.matched.assign(static_cast<std::size_t>(request.m), 0);
    std::vector<Grant> grants;
    if (request.reservation == 0 && request.m == 0) {
        // Nothing was reserved; only the level that was asked for is of interest.
    } else if (!client_->Claim(request.reservation)) {
        RefuseWrite(Status::kInUse, "write: another connection writes to the reservation");
    } else {
        incoming_.claimed = true;
        if (request.m == 0 || !core_.ReservationGrants(owner(), request.reservation, &grants) ||
            grants.size() != request.m) {
            RefuseWrite(Status::kStoreClosed, "write: there is no reservation of " +
                                                  std::to_string(request.m) +
                                                  " blocks of that number");
        }
    }
    if (incoming_.refused == Status::kOk) {
        for (const Grant &grant : grants) {
            incoming_.blocks.push_back(core_.arena().base() + grant.payload_offset);
        }
    }
    TakeBufferedPayload();
}

// The payload is still to be taken off the connection, and is thrown away.
void Connection::RefuseWrite(Status status, std::string message) {
    incoming_.refused = status;
    incoming_.message = std::move(message);
    DropClaim();
}

void Connection::DropClaim() {
    if (std::exchange(incoming_.claimed, false)) client_->Unclaim(incoming_.request.reservation);
}

void Connection::DropIncoming() {
    DropClaim();
    incoming_.active = false;
}

// What came with the request's head lies in the buffer.
void Connection::TakeBufferedPayload() {
    const std::size_t there = static_cast<std::size_t>(
        std::min<std::uint64_t>(buffered() - frame_buffered_, incoming_.payload_bytes));
    const std::size_t block_bytes = client_->terms.block_bytes;
    if (incoming_.refused == Status::kOk) {
        for (std::size_t taken = 0; taken < there;) {
            const std::size_t offset = taken % block_bytes;
            const std::size_t bytes = std::min(there - taken, block_bytes - offset);
            std::memcpy(incoming_.blocks[taken / block_bytes] + offset,
                        at() + frame_buffered_ + taken, bytes);
            taken += bytes;
        }
    }
    frame_buffered_ += there;
    PayloadArrived(there);
}

void Connection::ReceivePayload() {
    const std::size_t block_bytes = client_->terms.block_bytes;
    std::size_t turn = 0;
    while (state_ == State::kReceiving && incoming_.active && turn < kTurnBytes) {
        thread_local std::vector<std::uint8_t> discarded(kDiscardBytes);
        iovec parts[kParts];
        std::size_t n = 0;
        std::size_t asked = 0;
        if (incoming_.refused != Status::kOk) {
            asked = static_cast<std::size_t>(std::min<std::uint64_t>(
                kDiscardBytes, incoming_.payload_bytes - incoming_.received));
            parts[n++] = {discarded.data(), asked};
        } else {
            std::uint64_t at = incoming_.received;
            while (at < incoming_.payload_bytes && n < kParts && asked < kTurnBytes) {
                const auto block = static_cast<std::size_t>(at / block_bytes);
                const auto offset = static_cast<std::size_t>(at % block_bytes);
                const std::size_t bytes = std::min(block_bytes - offset, kTurnBytes - asked);
                parts[n++] = {incoming_.blocks[block] + offset, bytes};
                asked += bytes;
                at += bytes;
            }
        }
        const ssize_t received = channel_.Receive(parts, n);
        if (received < 0 && errno == EINTR) continue;
        if (received < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
        if (received <= 0) {
            Close();
            return;
        }
        moved_ns_ = SteadyNowNs();
        turn += static_cast<std::size_t>(received);
        PayloadArrived(static_cast<std::size_t>(received));
        if (static_cast<std::size_t>(received) < asked) return;
    }
}

void Connection::PayloadArrived(std::size_t bytes) {
    const std::size_t block_bytes = client_->terms.block_bytes;
    incoming_.received += bytes;
    client_->bytes_in.fetch_add(bytes, std::memory_order_relaxed);
    if (incoming_.refused == Status::kOk) {
        AddTo(services_.counters.written_bytes, bytes);
        // While the block's bytes are in the cache.
        for (; (incoming_.checked + 1) * block_bytes <= incoming_.received; ++incoming_.checked) {
            const std::size_t i = incoming_.checked;
            incoming_.matched[i] =
                Xxh3(incoming_.blocks[i], block_bytes) == U64At(incoming_.request.checksums, i);
        }
    }
    if (incoming_.received == incoming_.payload_bytes) EndWrite();
}

void Connection::EndWrite() {
    incoming_.active = false;
    const CommitRequest &request = incoming_.request;
    const auto m = static_cast<std::size_t>(request.m);
    std::size_t num_stored = 0;
    if (incoming_.refused == Status::kOk && m > 0) {
        std::vector<std::uint64_t> sums(m);
        std::memcpy(sums.data(), request.checksums, 8 * m);
        const std::unique_ptr<bool[]> ok(new bool[m]);
        for (std::size_t i = 0; i < m; ++i) {
            ok[i] = incoming_.matched[i] != 0;
            num_stored += ok[i] ? 1 : 0;
        }
        AddTo(services_.counters.integrity_failures, m - num_stored);
        if (!core_.Commit(owner(), request.reservation, sums.data(), ok.get(), m)) {
            RefuseWrite(Status::kStoreClosed, "write: the reservation is gone");
        }
        DropClaim();
    }
    if (incoming_.refused != Status::kOk) {
        incoming_.matched.clear();
        Refuse(incoming_.refused, incoming_.message);
        return;
    }
    Committed(request, num_stored);
}

}  // namespace kvstore
