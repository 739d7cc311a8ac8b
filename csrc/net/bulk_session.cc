#include "net/bulk_session.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "copy/move.h"
#include "core/store_core.h"

namespace kvstore {

namespace {

constexpr std::int64_t kGreetingNs = 10'000'000'000;
constexpr std::int64_t kStallNs = 10'000'000'000;
constexpr std::int64_t kNever = INT64_MAX;

void Count(std::atomic<std::uint64_t> &counter, std::uint64_t n = 1) {
    counter.fetch_add(n, std::memory_order_relaxed);
}

}  // namespace

void BulkSession::Run() {
    if (!greeted_.load()) greeted_.store(Greet());
    if (greeted_.load()) Serve();
    if (cut_.load()) Count(services_.counters.cut_connections);
    CloseFd();
}

void BulkSession::Cut() {
    cut_.store(true);
    const std::lock_guard lock(fd_mutex_);
    if (fd_ >= 0) shutdown(fd_, SHUT_RDWR);
}

void BulkSession::CloseFd() {
    const std::lock_guard lock(fd_mutex_);
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
}

// --- waiting

// False at the deadline. A shutdown by Cut, or a peer that is gone, is an event.
bool BulkSession::Wait(short events, std::int64_t deadline_ns) {
    while (!cut_.load(std::memory_order_relaxed)) {
        timespec left{};
        if (deadline_ns != kNever) {
            const std::int64_t ns = deadline_ns - SteadyNowNs();
            if (ns <= 0) return false;
            left = {ns / 1'000'000'000, ns % 1'000'000'000};
        }
        pollfd ready{fd_, events, 0};
        const int n = ppoll(&ready, 1, deadline_ns == kNever ? nullptr : &left, nullptr);
        if (n > 0) return true;
        if (n < 0 && errno != EINTR) return false;
    }
    return true;
}

// What `attempt` returned once it did not ask to try again: a count, 0 at the end of the stream,
// or -1, which also stands for a deadline that passed.
template <typename Attempt>
ssize_t BulkSession::Until(short events, std::int64_t deadline_ns, std::int64_t spin_ns,
                           Attempt attempt) {
    std::int64_t spin_until = 0;
    while (!cut_.load(std::memory_order_relaxed)) {
        const ssize_t moved = attempt();
        if (moved >= 0) return moved;
        if (errno == EINTR) continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK) return -1;
        const std::int64_t now = SteadyNowNs();
        if (spin_until == 0) spin_until = now + spin_ns;
        if (now < spin_until) {
            CpuPause();
            continue;
        }
        if (!Wait(events, deadline_ns)) {
            Count(services_.counters.stalled_connections);
            return -1;
        }
    }
    return -1;
}

// Bytes were moved: rests for as long as the limit asks for.
void BulkSession::Pace(ssize_t bytes) {
    const std::int64_t until =
        services_.throttle.Reserve(static_cast<std::size_t>(bytes), SteadyNowNs());
    if (until > 0) Wait(0, until);
}

// --- frames

// Until `bytes` of the frame are there. Before its first byte a connection may rest.
bool BulkSession::ReceiveExactly(std::size_t bytes, std::int64_t deadline_ns, bool may_idle) {
    if (frame_.size() < bytes) frame_.resize(bytes);
    while (received_ < bytes) {
        const bool idle = may_idle && received_ == 0;
        const std::int64_t stall = idle ? kNever : SteadyNowNs() + kStallNs;
        const ssize_t n = Until(POLLIN, std::min(stall, deadline_ns), idle ? 0 : kBulkSpinNs, [&] {
            return recv(fd_, frame_.data() + received_, bytes - received_, MSG_DONTWAIT);
        });
        if (n <= 0) return false;
        received_ += static_cast<std::size_t>(n);
    }
    return true;
}

BulkSession::Frame BulkSession::ReceiveFrame(std::int64_t deadline_ns) {
    received_ = 0;
    if (!ReceiveExactly(kBulkRequestBytesMin, deadline_ns, deadline_ns == kNever)) {
        return Frame::kEnd;
    }
    if (!DecodeHeader(frame_.data(), &header_) || header_.status != 0 ||
        !IsRequestLength(header_)) {
        return Frame::kBad;
    }
    const std::size_t whole = kHeaderBytes + header_.length;
    if (!ReceiveExactly(whole, deadline_ns, false)) return Frame::kEnd;
    return IsSound(frame_.data(), whole) ? Frame::kCame : Frame::kBad;
}

bool BulkSession::SendParts() {
    const std::size_t chunk = services_.throttle.chunk_bytes();
    while (!outgoing_.empty()) {
        const ssize_t n = Until(POLLOUT, SteadyNowNs() + kStallNs, 0,
                                [&] { return outgoing_.SendSome(fd_, chunk); });
        if (n <= 0) return false;
        Pace(n);
    }
    return true;
}

bool BulkSession::Reply(BulkOp op, std::uint8_t status, const void *head, std::size_t bytes) {
    const BulkBytes frame = SealBulkFrame(op, status, header_.id, head, bytes);
    outgoing_.Clear();
    outgoing_.Add(frame.data(), frame.size());
    return SendParts();
}

bool BulkSession::Refuse(const char *message, std::uint8_t status) {
    Count(services_.counters.refused_greetings);
    Reply(static_cast<BulkOp>(header_.op), status, message, std::strlen(message));
    return false;
}

// --- the greeting

bool BulkSession::Greet() {
    const std::int64_t deadline = SteadyNowNs() + kGreetingNs;
    const auto receive = [&](BulkOp op) {
        const Frame frame = ReceiveFrame(deadline);
        const bool came = frame == Frame::kCame && header_.op == static_cast<std::uint8_t>(op);
        if (!came && frame != Frame::kEnd) Count(services_.counters.protocol_errors);
        return came;
    };
    BulkHello hello;
    if (!receive(BulkOp::kHello) || !ParseHead(head(), head_bytes(), &hello)) return false;
    if (hello.version != kBulkVersion) {
        return Refuse("another version of the bulk protocol",
                      static_cast<std::uint8_t>(Status::kIncompatible));
    }
    const BulkNonce challenge = MakeNonce();
    if (!Reply(BulkOp::kHello, 0, challenge.data(), challenge.size())) return false;
    if (!receive(BulkOp::kProof)) return false;
    BulkProof proof;
    std::memcpy(proof.data(), head(), proof.size());
    if (!AreSame(proof,
                 ProofOf(BulkSide::kClient, services_.secret, hello, challenge, hello.epoch))) {
        return Refuse("the secret is another one", static_cast<std::uint8_t>(Status::kConfig));
    }
    BulkWelcome welcome;
    welcome.epoch = services_.epoch;
    welcome.proof = ProofOf(BulkSide::kServer, services_.secret, hello, challenge, services_.epoch);
    const BulkBytes head = EncodeHead(welcome);
    // The client sees by the epoch why the connection ends.
    if (!Reply(BulkOp::kProof, 0, head.data(), head.size())) return false;
    if (hello.epoch == 0 || hello.epoch == services_.epoch) return true;
    Count(services_.counters.refused_greetings);
    return false;
}

// --- requests

void BulkSession::Serve() {
    while (true) {
        const Frame frame = ReceiveFrame(kNever);
        if (frame == Frame::kEnd) return;
        bool good = frame == Frame::kCame;
        if (good) {
            switch (static_cast<BulkOp>(header_.op)) {
                case BulkOp::kInfo:
                    if (!SendInfo()) return;
                    continue;
                case BulkOp::kRead:
                case BulkOp::kWrite: {
                    const bool reads = header_.op == static_cast<std::uint8_t>(BulkOp::kRead);
                    BulkRequest request;
                    good =
                        ParseHead(head(), head_bytes(), static_cast<BulkOp>(header_.op), &request);
                    if (!good) break;
                    if (!(reads ? SendPieces(request) : ReceivePieces(request))) return;
                    continue;
                }
                default:
                    good = false;
            }
        }
        Count(services_.counters.protocol_errors);
        return;
    }
}

bool BulkSession::SendInfo() {
    const auto info = services_.info();
    return Reply(BulkOp::kInfo, 0, info->data(), info->size());
}

bool BulkSession::SendPieces(const BulkRequest &request) {
    BulkCounters &counters = services_.counters;
    const Regions::Use use = services_.regions.Find(request.region, false, this);
    statuses_.assign(request.n, static_cast<std::uint8_t>(PieceStatus::kRefused));
    std::uint64_t num_ok = 0;
    for (std::size_t i = 0; i < request.n && use; ++i) {
        if (use.At(request.offset(i), request.length(i)) == nullptr) continue;
        statuses_[i] = static_cast<std::uint8_t>(PieceStatus::kOk);
        ++num_ok;
    }
    const BulkBytes head =
        SealBulkFrame(BulkOp::kRead, 0, header_.id, statuses_.data(), statuses_.size());
    outgoing_.Clear();
    outgoing_.Add(head.data(), head.size());
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < request.n; ++i) {
        if (statuses_[i] != static_cast<std::uint8_t>(PieceStatus::kOk)) continue;
        outgoing_.Add(use.At(request.offset(i), request.length(i)), request.length(i));
        bytes += request.length(i);
    }
    Count(counters.read_pieces, num_ok);
    Count(counters.refused_pieces, request.n - num_ok);
    if (!SendParts()) return false;
    Count(counters.read_bytes, bytes);
    return true;
}

bool BulkSession::ReceivePieces(const BulkRequest &request) {
    BulkCounters &counters = services_.counters;
    const Regions::Use use = services_.regions.Find(request.region, true, this);
    incoming_.Clear();
    statuses_.assign(request.n, static_cast<std::uint8_t>(PieceStatus::kRefused));
    std::uint64_t bytes = 0;
    std::uint64_t num_ok = 0;
    for (std::size_t i = 0; i < request.n; ++i) {
        std::uint8_t *to = use ? use.At(request.offset(i), request.length(i)) : nullptr;
        std::uint64_t sum = 0;
        if (request.sums != nullptr) sum = U64At(request.sums, i);
        incoming_.Add(to, request.length(i), request.sums != nullptr ? &sum : nullptr);
        if (to == nullptr) continue;
        statuses_[i] = static_cast<std::uint8_t>(PieceStatus::kOk);
        bytes += request.length(i);
        ++num_ok;
    }
    const std::size_t chunk = services_.throttle.chunk_bytes();
    while (!incoming_.empty()) {
        const ssize_t n = Until(POLLIN, SteadyNowNs() + kStallNs, kBulkSpinNs,
                                [&] { return incoming_.ReceiveSome(fd_, chunk); });
        if (n <= 0) return false;
        Pace(n);
    }
    std::uint64_t num_damaged = 0;
    for (std::size_t i = 0; i < request.n; ++i) {
        if (!incoming_.is_damaged(i)) continue;
        statuses_[i] = static_cast<std::uint8_t>(PieceStatus::kDamaged);
        ++num_damaged;
    }
    Count(counters.written_pieces, num_ok - num_damaged);
    Count(counters.written_bytes, bytes);
    Count(counters.refused_pieces, request.n - num_ok);
    Count(counters.damaged_pieces, num_damaged);
    return Reply(BulkOp::kWrite, 0, statuses_.data(), statuses_.size());
}

}  // namespace kvstore
