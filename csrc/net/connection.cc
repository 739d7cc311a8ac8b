#include "net/connection.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "core/check.h"

namespace kvstore {

namespace {

// What is asked for while nothing is known of the next frame.
constexpr std::size_t kReceiveBytes = 64 << 10;
// Memory that a connection keeps between frames: 8,192 hashes fit.
constexpr std::size_t kKeptBytes = 288 << 10;
// More than this is not allocated before as much has arrived.
constexpr std::size_t kTrustedBytes = 512 << 10;
// So that a connection with much to move lets others have their turn.
constexpr std::size_t kTurnBytes = 1 << 20;
// A larger send walks out of the cache before the peer reads it.
constexpr std::size_t kSendBytes = 256 << 10;
constexpr std::size_t kSendParts = 64;
constexpr int kGreetingsMax = 4;

bool WouldBlock(int error) { return error == EAGAIN || error == EWOULDBLOCK; }

}  // namespace

Connection::Connection(Services &services, Channel &channel, const Peer &peer)
    : services_(services),
      core_(services.core),
      channel_(channel),
      peer_(peer),
      opened_ns_(SteadyNowNs()),
      moved_ns_(opened_ns_) {
    services_.roster.Add(peer_);
}

Connection::~Connection() { Cut(); }

void Connection::End(bool is_cut) {
    if (state_ == State::kClosed) return;
    state_ = State::kClosed;
    Unpark();
    DropIncoming();
    if (outgoing_.pin != 0) core_.Release(services_.reader, std::exchange(outgoing_.pin, 0));
    if (outgoing_.fd >= 0) close(std::exchange(outgoing_.fd, -1));
    const std::shared_ptr<Client> ended = services_.roster.Remove(peer_.connection);
    if (ended != nullptr) services_.EndClient(*ended, is_cut);
    client_.reset();
}

void Connection::HangUp() {
    hang_up_ = true;
    if (state_ != State::kSending) Cut();
}

std::int64_t Connection::deadline_ns() const {
    if (state_ == State::kClosed || state_ == State::kWaiting) return StoreCore::kNever;
    if (client_ == nullptr) return opened_ns_ + kGreetingNs;
    const bool idle = state_ == State::kReceiving && !has_header_ && buffered() == 0;
    return idle ? StoreCore::kNever : moved_ns_ + kStallNs;
}

void Connection::CloseOverdue() {
    AddTo(services_.counters.timed_out_connections, 1);
    Cut();
}

// --- taking frames

bool Connection::has_buffered_frame() const {
    return state_ == State::kReceiving && !has_header_ && buffered() >= kHeaderBytes;
}

void Connection::Turn() {
    if (has_buffered_frame()) Advance();
}

void Connection::OnReadable() {
    if (has_buffered_frame()) {
        Advance();
        return;
    }
    std::size_t taken = 0;
    while (state_ == State::kReceiving && taken < kTurnBytes) {
        if (incoming_.active) {
            ReceivePayload();
            return;
        }
        const std::size_t before = buffered();
        const bool was_inside = has_header_;
        const bool may_be_more = ReceiveSome(has_header_ ? needed_ : kReceiveBytes);
        if (state_ != State::kReceiving || buffered() == before) return;
        taken += buffered() - before;
        Advance();
        // Goes on only within a frame: the next one is for the next turn.
        if (!has_header_ || (was_inside && !may_be_more)) return;
    }
}

// Receives until `want` bytes are buffered, or as many as memory was made for. True when it got
// all that it asked for, so that there may be more.
bool Connection::ReceiveSome(std::size_t want) {
    KV_CHECK(want > buffered());
    if (in_begin_ > 0 && in_begin_ + want > in_.capacity()) {
        std::memmove(in_.data(), at(), buffered());
        in_end_ -= in_begin_;
        in_begin_ = 0;
    }
    const std::size_t trusted = std::max(2 * buffered(), kTrustedBytes);
    in_.Grow(in_begin_ + std::max(std::min(want, trusted), kReceiveBytes), in_end_);
    const std::size_t room = std::min(want - buffered(), in_.capacity() - in_end_);
    const iovec part{in_.data() + in_end_, room};
    ssize_t received;
    do {
        received = channel_.Receive(&part, 1);
    } while (received < 0 && errno == EINTR);
    if (received < 0 && WouldBlock(errno)) return false;
    if (received <= 0) {
        Close();
        return false;
    }
    in_end_ += static_cast<std::size_t>(received);
    moved_ns_ = SteadyNowNs();
    return static_cast<std::size_t>(received) == room;
}

void Connection::Advance() {
    if (!has_header_) {
        if (buffered() < kHeaderBytes) return;
        if (!DecodeHeader(at(), &header_)) {
            AddTo(services_.counters.protocol_errors, 1);
            Cut();  // it does not speak our protocol: there is no telling what it would understand
            return;
        }
        has_header_ = true;
        if (!AdmitHeader()) return;
    }
    if (header_.op == static_cast<std::uint8_t>(Op::kWrite)) {
        const WritePrefix prefix = MeasureWrite(body(), buffered() - kHeaderBytes, header_.length);
        if (prefix.kind == WritePrefix::Kind::kBad) {
            BreakProtocol("write: the lengths in its body do not fit together");
        } else if (prefix.kind == WritePrefix::Kind::kMore) {
            needed_ = kHeaderBytes + prefix.bytes;
        } else {
            BeginWrite(prefix.bytes);
        }
        return;
    }
    needed_ = kHeaderBytes + header_.length;
    if (buffered() < needed_) return;
    frame_buffered_ = needed_;
    started_ns_ = SteadyNowNs();
    if (client_ != nullptr) {
        client_->requests.fetch_add(1, std::memory_order_relaxed);
        client_->bytes_in.fetch_add(needed_, std::memory_order_relaxed);
    }
    AddTo(services_.counters.requests, 1);
    Dispatch();
}

// False when the frame was refused by its header.
bool Connection::AdmitHeader() {
    const auto op = static_cast<Op>(header_.op);
    const char *name = OpName(header_.op);
    if (name == nullptr || header_.status != 0) {
        BreakProtocol("operation " + std::to_string(header_.op) + " is not known");
        return false;
    }
    const bool is_greeting = op == Op::kHello || op == Op::kAuth;
    if (is_greeting != (client_ == nullptr)) {
        BreakProtocol(std::string(name) + (is_greeting ? ": the connection is admitted already"
                                                       : ": the connection is not admitted yet"));
        return false;
    }
    if (is_greeting && ++greetings_ > kGreetingsMax) {
        BreakProtocol("too many greetings");
        return false;
    }
    std::size_t limit = client_ == nullptr ? kGreetingBytesMax : kBodyBytesMax;
    if (op == Op::kWrite) limit = UINT32_MAX;
    if (op == Op::kPing) limit = kPingBytesMax;
    if (header_.length > limit) {
        BreakProtocol(std::string(name) + ": a body of " + std::to_string(header_.length) +
                      " bytes; at most " + std::to_string(limit) + " are allowed");
        return false;
    }
    if (op == Op::kWrite && client_->terms.block_bytes == 0) {
        BreakProtocol("write: this client has no namespace");
        return false;
    }
    return true;
}

void Connection::Consume() {
    in_begin_ += frame_buffered_;
    frame_buffered_ = 0;
    has_header_ = false;
    if (buffered() > 0) return;
    in_begin_ = in_end_ = 0;
    if (in_.capacity() > kKeptBytes) in_.Free();
}

// --- answering

void Connection::Refuse(Status status, const std::string &message) {
    std::memcpy(StartReply(message.size()), message.data(), message.size());
    FinishReply(status);
}

void Connection::BreakProtocol(const std::string &message) {
    AddTo(services_.counters.protocol_errors, 1);
    started_ns_ = SteadyNowNs();
    hang_up_ = true;
    Refuse(Status::kIncompatible, message);
}

std::uint8_t *Connection::StartReply(std::size_t body_bytes) {
    outgoing_.size = kHeaderBytes + body_bytes;
    outgoing_.sent = 0;
    outgoing_.bytes.Grow(outgoing_.size, 0);
    return outgoing_.bytes.data() + kHeaderBytes;
}

void Connection::FinishReply(Status status) { SendReply(static_cast<std::uint8_t>(status), 0); }

void Connection::SendReply(std::uint8_t status, std::uint64_t payload_bytes) {
    Unpark();
    outgoing_.payload_bytes = payload_bytes;
    outgoing_.payload_sent = 0;
    const std::uint64_t length = outgoing_.size - kHeaderBytes + payload_bytes;
    KV_CHECK(length <= UINT32_MAX);
    EncodeHeader({header_.op, status, static_cast<std::uint32_t>(length), header_.id},
                 outgoing_.bytes.data());
    if (header_.op < Services::kOps) {
        services_.latencies[header_.op].Add(SteadyNowNs() - started_ns_);
    }
    state_ = State::kSending;
    SendSome();
}

void Connection::OnWritable() {
    if (state_ == State::kSending) SendSome();
}

void Connection::SendSome() {
    std::size_t turn = 0;
    iovec parts[kSendParts];
    while (turn < kTurnBytes) {
        std::size_t n = 0;
        std::size_t asked = 0;
        if (outgoing_.sent < outgoing_.size) {
            parts[n++] = {outgoing_.bytes.data() + outgoing_.sent, outgoing_.size - outgoing_.sent};
            asked += parts[0].iov_len;
        }
        std::uint64_t at = outgoing_.payload_sent;
        while (at < outgoing_.payload_bytes && n < kSendParts && asked < kSendBytes) {
            const std::size_t block = at / outgoing_.block_bytes;
            const std::size_t offset = at % outgoing_.block_bytes;
            const std::size_t bytes = std::min(outgoing_.block_bytes - offset, kSendBytes - asked);
            parts[n++] = {const_cast<std::uint8_t *>(outgoing_.blocks[block]) + offset, bytes};
            asked += bytes;
            at += bytes;
        }
        if (n == 0) {
            ReplySent();
            return;
        }
        const ssize_t sent = channel_.Send(parts, n, outgoing_.fd);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0 && WouldBlock(errno)) return;
        if (sent < 0) {
            Close();
            return;
        }
        if (outgoing_.fd >= 0) close(std::exchange(outgoing_.fd, -1));
        moved_ns_ = SteadyNowNs();
        const std::size_t taken = static_cast<std::size_t>(sent);
        turn += taken;
        const std::size_t of_bytes = std::min(taken, outgoing_.size - outgoing_.sent);
        outgoing_.sent += of_bytes;
        outgoing_.payload_sent += taken - of_bytes;
        if (client_ != nullptr) client_->bytes_out.fetch_add(taken, std::memory_order_relaxed);
        if (taken == asked && outgoing_.sent == outgoing_.size &&
            outgoing_.payload_sent == outgoing_.payload_bytes) {
            ReplySent();
            return;
        }
    }
}

void Connection::ReplySent() {
    if (outgoing_.pin != 0) core_.Release(services_.reader, std::exchange(outgoing_.pin, 0));
    outgoing_.blocks.clear();
    if (outgoing_.bytes.capacity() > kKeptBytes) outgoing_.bytes.Free();
    if (hang_up_) {
        Cut();
        return;
    }
    state_ = State::kReceiving;
    Consume();
}

// --- having it answered

bool Connection::SubmitTask(const std::uint8_t *body, std::size_t bytes) {
    auto task = std::make_unique<Task>();
    task->id = services_.roster.AddPending(peer_.connection);
    task->kind = header_.op;
    task->connection = peer_.connection;
    if (client_ != nullptr) {
        task->client = client_->terms.client;
        task->owner = client_->terms.owner;
        task->namespace_id = client_->terms.namespace_id;
    }
    task->body.assign(body, body + bytes);
    task->received_ns = started_ns_;
    task->peer_uid = peer_.uid;
    task->peer_pid = peer_.pid;
    task->is_local = peer_.is_local;
    task_ = task->id;
    state_ = State::kWaiting;  // before somebody may answer it
    if (services_.tasks.Push(std::move(task), false)) return true;
    services_.roster.CancelPending(task_);
    task_ = 0;
    AddTo(services_.counters.refused_busy, 1);
    return false;
}

void Connection::SubmitOrRefuse() {
    if (SubmitTask(body(), header_.length)) return;
    // The queue refuses while the server ends too: it was there, and is away.
    Refuse(Status::kPeerUnavailable, "the daemon is busy or ends: too many requests wait");
}

void Connection::Answer(std::uint64_t task, std::uint8_t status, std::vector<std::uint8_t> body) {
    if (state_ != State::kWaiting || task_ == 0 || task_ != task) return;
    task_ = 0;
    if (client_ == nullptr) client_ = services_.roster.ClientOf(peer_.connection);
    // A WRITE's answer goes on with which blocks arrived whole.
    const std::vector<std::uint8_t> matched = std::exchange(incoming_.matched, {});
    const std::size_t more = status == 0 ? matched.size() : 0;
    std::uint8_t *reply = StartReply(body.size() + more);
    if (!body.empty()) std::memcpy(reply, body.data(), body.size());
    if (more > 0) std::memcpy(reply + body.size(), matched.data(), more);
    SendReply(status, 0);
}

void Connection::Notice(std::uint8_t kind, const Chain &chain, std::size_t n) {
    auto task = std::make_unique<Task>();
    task->kind = kind;
    task->connection = peer_.connection;
    task->client = client_->terms.client;
    task->owner = client_->terms.owner;
    task->namespace_id = client_->terms.namespace_id;
    task->body.resize(kChainHeadBytes + n * sizeof(BlockHash));
    Chain part = chain;
    part.n = n;
    EncodeChainHead(part, task->body.data());
    if (n > 0) {
        std::memcpy(task->body.data() + kChainHeadBytes, chain.hashes, n * sizeof(BlockHash));
    }
    task->received_ns = started_ns_;
    task->peer_uid = peer_.uid;
    task->peer_pid = peer_.pid;
    task->is_local = peer_.is_local;
    if (!services_.tasks.Push(std::move(task), false)) {
        AddTo(services_.counters.notices_dropped, 1);
    }
}

bool Connection::KeepWaiting(double wait_seconds) {
    if (!(wait_seconds > 0)) return false;
    const std::int64_t until =
        is_parked() ? parked_until_ns_ : DeadlineAfter(started_ns_, wait_seconds);
    if (SteadyNowNs() >= until) return false;
    if (!is_parked()) services_.AddParked();
    parked_until_ns_ = until;
    seen_change_ = 0;
    state_ = State::kWaiting;
    return true;
}

void Connection::ParkForATurn() {
    if (!is_parked()) services_.AddParked();
    parked_until_ns_ = SteadyNowNs();
    state_ = State::kWaiting;
}

void Connection::Unpark() {
    if (!is_parked()) return;
    parked_until_ns_ = 0;
    services_.RemoveParked();
}

void Connection::Retry() {
    if (state_ != State::kWaiting || !is_parked()) return;
    const bool is_due = SteadyNowNs() >= parked_until_ns_;
    if (is_due || seen_change_ != core_.ChangeCount()) Dispatch();
}

}  // namespace kvstore
