#include "net/bulk_connection.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <utility>

#include "core/check.h"
#include "core/store_core.h"

namespace kvstore {

namespace {

using Kind = ClientFailure::Kind;

// So much is asked for at once: small enough to share a batch among connections and to end soon,
// large enough that heads cost nothing.
constexpr std::uint64_t kRangeBytes = 2 << 20;
// So many requests are under way, so that the peer never waits for the next.
constexpr std::size_t kFlightsMax = 4;
constexpr int kPatienceMs = 1000;
// How late a flag may be seen by who waits for the peer.
constexpr std::int64_t kFlagNs = 5'000'000;

// poll until the deadline: its result.
int PollUntil(int fd, short events, std::int64_t deadline_ns) {
    const std::int64_t left = std::max<std::int64_t>(deadline_ns - SteadyNowNs(), 0);
    const timespec timeout{left / 1'000'000'000, left % 1'000'000'000};
    pollfd ready{fd, events, 0};
    return ppoll(&ready, 1, &timeout, nullptr);
}

bool WouldBlock() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

}  // namespace

PieceStatus StatusOf(BulkConnection::End end) {
    switch (end) {
        case BulkConnection::End::kLate:
            return PieceStatus::kLate;
        case BulkConnection::End::kCancelled:
        case BulkConnection::End::kInterrupted:
            return PieceStatus::kCancelled;
        case BulkConnection::End::kRefused:
            return PieceStatus::kRefused;
        default:
            return PieceStatus::kLost;
    }
}

// Whether that piece could lie anywhere.
bool BulkMove::IsMemory(std::size_t i) const {
    const std::uint64_t bytes = batch.lengths[i];
    return bytes <= kBulkPieceBytesMax && bytes <= UINT64_MAX - batch.addresses[i];
}

bool BulkMove::Take(Range *range) {
    const std::lock_guard lock(mutex_);
    while (next_ < batch.n && !IsMemory(next_)) batch.statuses[next_++] = PieceStatus::kRefused;
    range->first = next_;
    std::uint64_t bytes = 0;
    while (next_ < batch.n && next_ - range->first < kBulkPiecesMax) {
        if (next_ > range->first && bytes + batch.lengths[next_] > kRangeBytes) break;
        if (!IsMemory(next_)) break;
        bytes += batch.lengths[next_++];
    }
    range->n = next_ - range->first;
    return range->n > 0;
}

// --- opening

BulkConnection::BulkConnection(const std::string &address, const std::string &secret,
                               std::uint64_t epoch, std::int64_t silence_ns,
                               std::int64_t deadline_ns, InterruptedHook interrupted)
    : address_(address), interrupted_(interrupted), silence_ns_(silence_ns) {
    const std::int64_t left = std::max<std::int64_t>(deadline_ns - SteadyNowNs(), 0);
    fd_ = Dial(address, deadline_ns, static_cast<double>(left) * 1e-9, interrupted);
    // Later than a move gives it up: the kernel drops also a peer that is frozen, which could still
    // take in what it has, and nobody would see when.
    const auto timeout = static_cast<int>(silence_ns / 1'000'000 + kPatienceMs);
    setsockopt(fd_, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout, sizeof(timeout));
    try {
        Greet(epoch, secret, deadline_ns);
    } catch (...) {
        close(fd_);
        throw;
    }
}

BulkConnection::BulkConnection(int fd, std::int64_t silence_ns)
    : address_("a socket"), interrupted_(nullptr), silence_ns_(silence_ns), fd_(fd) {}

BulkConnection::~BulkConnection() { close(fd_); }

void BulkConnection::Fail(Kind kind, const std::string &what, int status) const {
    throw ClientFailure(kind, address_ + ": " + what, status);
}

void BulkConnection::WaitFor(short events, std::int64_t deadline_ns) {
    const int n = PollUntil(fd_, events, deadline_ns);
    if (n < 0 && errno == EINTR && interrupted_ != nullptr && interrupted_()) {
        Fail(Kind::kInterrupted, "interrupted");
    }
    if (n <= 0 && SteadyNowNs() >= deadline_ns) Fail(Kind::kTimeout, "no answer in time");
}

void BulkConnection::ReceiveExactly(std::uint8_t *to, std::size_t bytes, std::int64_t deadline_ns) {
    while (bytes > 0) {
        const ssize_t n = recv(fd_, to, bytes, MSG_DONTWAIT);
        if (n == 0) Fail(Kind::kConnection, "the peer closed the connection");
        if (n < 0 && !WouldBlock()) Fail(Kind::kConnection, std::strerror(errno));
        if (n < 0) {
            WaitFor(POLLIN, deadline_ns);
            continue;
        }
        to += n;
        bytes -= static_cast<std::size_t>(n);
    }
}

// Sends a request and returns the head of its reply.
BulkBytes BulkConnection::Call(BulkOp op, const BulkBytes &head, std::size_t bytes_max,
                               std::int64_t deadline_ns) {
    const std::uint32_t id = next_id_++;
    const BulkBytes request = SealBulkFrame(op, 0, id, head.data(), head.size());
    outgoing_.Clear();
    outgoing_.Add(request.data(), request.size());
    while (!outgoing_.empty()) {
        if (outgoing_.SendSome(fd_) >= 0) continue;
        if (!WouldBlock()) Fail(Kind::kConnection, std::strerror(errno));
        WaitFor(POLLOUT, deadline_ns);
    }
    BulkBytes frame(kHeaderBytes);
    FrameHeader header;
    ReceiveExactly(frame.data(), frame.size(), deadline_ns);
    if (!DecodeHeader(frame.data(), &header) || header.op != static_cast<std::uint8_t>(op) ||
        header.id != id || header.length < kBulkSumBytes ||
        header.length - kBulkSumBytes > bytes_max) {
        Fail(Kind::kProtocol, "what came is no reply of ours");
    }
    frame.resize(kHeaderBytes + header.length);
    ReceiveExactly(frame.data() + kHeaderBytes, header.length, deadline_ns);
    if (!IsSound(frame.data(), frame.size())) Fail(Kind::kProtocol, "a damaged reply came");
    BulkBytes body(frame.begin() + kHeaderBytes, frame.end() - kBulkSumBytes);
    if (header.status != 0) {
        Fail(Kind::kRemote, "refused: " + std::string(body.begin(), body.end()), header.status);
    }
    return body;
}

void BulkConnection::Greet(std::uint64_t epoch, const std::string &secret,
                           std::int64_t deadline_ns) {
    BulkHello hello{kBulkVersion, epoch, MakeNonce()};
    const BulkBytes said = Call(BulkOp::kHello, EncodeHead(hello), kGreetingBytesMax, deadline_ns);
    BulkNonce challenge;
    if (said.size() != challenge.size()) Fail(Kind::kProtocol, "what came is no challenge");
    std::memcpy(challenge.data(), said.data(), challenge.size());
    const BulkProof proof = ProofOf(BulkSide::kClient, secret, hello, challenge, epoch);
    const BulkBytes answer =
        Call(BulkOp::kProof, BulkBytes(proof.begin(), proof.end()), kGreetingBytesMax, deadline_ns);
    BulkWelcome welcome;
    if (!ParseHead(answer.data(), answer.size(), &welcome)) {
        Fail(Kind::kProtocol, "what came is no welcome");
    }
    const BulkProof expected = ProofOf(BulkSide::kServer, secret, hello, challenge, welcome.epoch);
    if (!AreSame(welcome.proof, expected)) {
        Fail(Kind::kProtocol, "the peer did not prove that it knows the secret");
    }
    if (epoch != 0 && welcome.epoch != epoch) {
        Fail(Kind::kRemote,
             "the peer has epoch " + std::to_string(welcome.epoch) + ", not " +
                 std::to_string(epoch) + ": it was started anew",
             static_cast<int>(Status::kIncompatible));
    }
}

BulkBytes BulkConnection::Info(std::int64_t deadline_ns) {
    return Call(BulkOp::kInfo, BulkBytes(32), kBulkInfoBytesMax, deadline_ns);
}

bool BulkConnection::IsOpen() const {
    // Between moves nothing may come: bytes would be none of ours.
    std::uint8_t byte;
    return recv(fd_, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && WouldBlock();
}

// --- moving

BulkConnection::End BulkConnection::Run(BulkMove &move) {
    const End end = Drive(move);
    if (end != End::kDone) GiveUp(move, end);
    return end;
}

BulkConnection::End BulkConnection::Drive(BulkMove &move) {
    std::int64_t moved_ns = SteadyNowNs();
    while (true) {
        Launch(move);
        if (flights_.empty()) return End::kDone;
        const Moved sent = outgoing_.empty() ? Moved::kNone : SendSome();
        const Moved received = ReceiveSome(move);
        // What the peer said before it hung up was taken; what failed to be sent tells no more.
        if (received == Moved::kLost) return End::kLost;
        const bool moved = sent == Moved::kSome || received == Moved::kSome;
        if (sent == Moved::kLost && !moved) return End::kLost;
        if (flights_.empty()) continue;
        if (move.closed->is_set()) return End::kLost;
        if (move.is_stopped() || (move.cancelled != nullptr && move.cancelled->is_set())) {
            return End::kCancelled;
        }
        const std::int64_t now = SteadyNowNs();
        if (moved) moved_ns = now;
        const std::int64_t silent_from = moved_ns + silence_ns_;
        silent_ = now >= silent_from;
        if (now >= move.deadline_ns) return End::kLate;
        if (silent_) return End::kLost;
        if (moved) continue;
        if (outgoing_.empty() && now < moved_ns + kBulkSpinNs) {
            CpuPause();
            continue;
        }
        const short events = outgoing_.empty() ? POLLIN : POLLIN | POLLOUT;
        const int n =
            PollUntil(fd_, events, std::min({move.deadline_ns, silent_from, now + kFlagNs}));
        if (n < 0 && errno == EINTR && interrupted_ != nullptr && interrupted_()) {
            return End::kInterrupted;
        }
    }
}

void BulkConnection::Launch(BulkMove &move) {
    const BulkBatch &batch = move.batch;
    BulkMove::Range range;
    while (flights_.size() < kFlightsMax && move.Take(&range)) {
        const std::size_t first = range.first;
        const std::uint64_t *sums =
            batch.is_write && batch.sums != nullptr ? batch.sums + first : nullptr;
        const BulkBytes head =
            EncodeHead(batch.region, batch.offsets + first, batch.lengths + first, sums, range.n);
        flights_.push_back({range, next_id_++, {}, 0});
        Flight &flight = flights_.back();
        flight.frame = SealBulkFrame(batch.is_write ? BulkOp::kWrite : BulkOp::kRead, 0, flight.id,
                                     head.data(), head.size());
        outgoing_.Add(flight.frame.data(), flight.frame.size());
        for (std::size_t i = first; batch.is_write && i < first + range.n; ++i) {
            outgoing_.Add(reinterpret_cast<const void *>(batch.addresses[i]), batch.lengths[i]);
        }
        flight.sent_at = outgoing_.added_bytes();
    }
}

BulkConnection::Moved BulkConnection::SendSome() {
    const ssize_t n = outgoing_.SendSome(fd_);
    if (n >= 0) return Moved::kSome;
    return WouldBlock() ? Moved::kNone : Moved::kLost;
}

BulkConnection::Moved BulkConnection::ReceiveSome(BulkMove &move) {
    ssize_t n;
    if (in_payload_) {
        n = incoming_.ReceiveSome(fd_);
    } else {
        const std::size_t whole = kHeaderBytes + flights_.front().range.n + kBulkSumBytes;
        reply_.resize(whole);
        n = recv(fd_, reply_.data() + received_, whole - received_, MSG_DONTWAIT);
    }
    if (n < 0) return WouldBlock() ? Moved::kNone : Moved::kLost;
    if (n == 0) return Moved::kLost;
    if (!in_payload_) {
        received_ += static_cast<std::size_t>(n);
        if (received_ < reply_.size()) return Moved::kSome;
        received_ = 0;
        if (!TakeReply(move)) return Moved::kLost;
        in_payload_ = true;
    }
    if (incoming_.empty()) Land(move);
    return Moved::kSome;
}

// The whole frame of a reply came. False when it is none of ours.
bool BulkConnection::TakeReply(BulkMove &move) {
    const BulkBatch &batch = move.batch;
    const Flight &flight = flights_.front();
    const BulkOp op = batch.is_write ? BulkOp::kWrite : BulkOp::kRead;
    // Nobody answers what has not come; and its frame is still to be sent from.
    if (outgoing_.sent_bytes() < flight.sent_at) return false;
    FrameHeader header;
    if (!DecodeHeader(reply_.data(), &header) || header.op != static_cast<std::uint8_t>(op) ||
        header.status != 0 || header.id != flight.id ||
        header.length != flight.range.n + kBulkSumBytes || !IsSound(reply_.data(), reply_.size())) {
        return false;
    }
    incoming_.Clear();
    landing_.clear();
    for (std::size_t k = 0; k < flight.range.n; ++k) {
        const std::size_t i = flight.range.first + k;
        const auto status = static_cast<PieceStatus>(reply_[kHeaderBytes + k]);
        const bool known = status == PieceStatus::kOk || status == PieceStatus::kRefused ||
                           (batch.is_write && status == PieceStatus::kDamaged);
        if (!known) return false;
        if (batch.is_write || status != PieceStatus::kOk) {
            batch.statuses[i] = status;
            continue;
        }
        landing_.push_back(i);
        incoming_.Add(reinterpret_cast<std::uint8_t *>(batch.addresses[i]), batch.lengths[i],
                      batch.sums != nullptr ? &batch.sums[i] : nullptr);
    }
    return true;
}

// The first flight is complete.
void BulkConnection::Land(BulkMove &move) {
    for (std::size_t k = 0; k < landing_.size(); ++k) {
        move.batch.statuses[landing_[k]] =
            incoming_.is_damaged(k) ? PieceStatus::kDamaged : PieceStatus::kOk;
    }
    landing_.clear();
    in_payload_ = false;
    flights_.pop_front();
}

void BulkConnection::GiveUp(BulkMove &move, End end) {
    for (const Flight &flight : flights_) {
        for (std::size_t i = flight.range.first; i < flight.range.first + flight.range.n; ++i) {
            move.batch.statuses[i] = StatusOf(end);
        }
    }
    if (move.batch.is_write) Settle();
}

// Waits a little until the peer has hung up: it has then taken in, or will never take in, what was
// sent.
void BulkConnection::Settle() {
    settled_ = false;
    shutdown(fd_, SHUT_WR);
    // A peer that is frozen is waited for; when this is closed before, what is still to be sent
    // shall not be.
    const int forever = 0;
    setsockopt(fd_, IPPROTO_TCP, TCP_USER_TIMEOUT, &forever, sizeof(forever));
    const linger drop{1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &drop, sizeof(drop));
    TrySettle(SteadyNowNs() + kSettleNs);
}

bool BulkConnection::TrySettle(std::int64_t deadline_ns) {
    while (!settled_) {
        std::uint8_t bytes[4096];
        const ssize_t n = recv(fd_, bytes, sizeof(bytes), MSG_DONTWAIT);
        if (n > 0) continue;
        if (n == 0 || !WouldBlock()) {
            settled_ = true;
        } else if (SteadyNowNs() >= deadline_ns) {
            break;
        } else {
            PollUntil(fd_, POLLIN, deadline_ns);
        }
    }
    return settled_;
}

}  // namespace kvstore
