// The server's side of one connection: takes frames, answers them or has them answered.
//
//   receiving --frame--> (answered at once) ----------> sending --all sent--> receiving
//                \--task for Python, or parked--> waiting --/
//
// One frame is under way at a time: nothing more is read before the peer has taken the answer, so
// what is buffered for a peer is bounded by one request and one reply. Memory for a request grows
// with the bytes that came, not with the length that was promised.
//
// READ sends from the slots under a lease of its own; WRITE receives into the slots of a
// reservation, which is marked so that no other connection of the client ends it meanwhile.
//
// Thread safety: none: a connection belongs to one thread.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "net/buffer.h"
#include "net/frame.h"
#include "net/roster.h"
#include "net/services.h"

namespace kvstore {

// Bytes to and from the peer. Both return as recvmsg and sendmsg of a non-blocking socket do:
// -1 with errno set, 0 of Receive at the peer's end.
class Channel {
public:
    virtual ~Channel() = default;
    virtual ssize_t Receive(const iovec *parts, std::size_t n) = 0;
    // `fd` goes with the first byte where it is not negative.
    virtual ssize_t Send(const iovec *parts, std::size_t n, int fd) = 0;
};

class Connection {
public:
    enum class State { kReceiving, kWaiting, kSending, kClosed };
    static constexpr std::int64_t kGreetingNs = 10'000'000'000;
    // A peer that takes or sends nothing for so long in the middle of a frame is given up.
    static constexpr std::int64_t kStallNs = 60'000'000'000;

    Connection(Services &services, Channel &channel, const Peer &peer);
    ~Connection();
    Connection(const Connection &) = delete;
    Connection &operator=(const Connection &) = delete;

    // The channel has bytes: takes some of them and handles at most one frame.
    void OnReadable();
    // The channel takes bytes.
    void OnWritable();
    // Handles a frame that had arrived with the one before it.
    void Turn();
    bool has_buffered_frame() const;

    // Python's answer to the task `task`.
    void Answer(std::uint64_t task, std::uint8_t status, std::vector<std::uint8_t> body);
    // Closes once the answers that were given so far are sent.
    void HangUp();
    // Looks at a parked request again. No-op where none is.
    void Retry();
    bool is_parked() const { return parked_until_ns_ != 0; }
    std::int64_t parked_until_ns() const { return parked_until_ns_; }
    // When this connection is to be closed unless something moves; kNever where nothing is due.
    std::int64_t deadline_ns() const;
    void CloseOverdue();
    // The peer has gone.
    void Close() { End(false); }
    // We hang up on it, whatever it does.
    void Cut() { End(true); }

    State state() const { return state_; }
    const Peer &peer() const { return peer_; }

private:
    struct Outgoing {
        ByteBuffer bytes;  // header and body, less a payload
        std::size_t size = 0;
        std::size_t sent = 0;
        int fd = -1;
        // READ's payload:
        std::vector<const std::uint8_t *> blocks;
        std::size_t block_bytes = 0;
        std::uint64_t payload_sent = 0;
        std::uint64_t payload_bytes = 0;
        LeaseId pin = 0;
    };
    struct Incoming {  // WRITE's payload
        bool active = false;
        bool claimed = false;
        Status refused = Status::kOk;  // else the payload is thrown away
        std::string message;
        CommitRequest request;
        std::vector<std::uint8_t *> blocks;
        std::vector<std::uint8_t> matched;
        std::uint64_t payload_bytes = 0;
        std::uint64_t received = 0;
        std::size_t checked = 0;  // leading blocks whose checksum was looked at
    };

    std::size_t buffered() const { return in_end_ - in_begin_; }
    const std::uint8_t *body() const { return in_.data() + in_begin_ + kHeaderBytes; }
    std::uint8_t *at() { return in_.data() + in_begin_; }
    void End(bool is_cut);
    bool ReceiveSome(std::size_t want);
    void Advance();
    bool AdmitHeader();
    void Dispatch();
    void Consume();

    void Refuse(Status status, const std::string &message);
    void BreakProtocol(const std::string &message);
    std::uint8_t *StartReply(std::size_t body_bytes);
    void FinishReply(Status status = Status::kOk);
    void SendReply(std::uint8_t status, std::uint64_t payload_bytes);
    void SendSome();
    void ReplySent();

    // False when the queue is full; then the request is still to be answered.
    bool SubmitTask(const std::uint8_t *body, std::size_t bytes);
    void SubmitOrRefuse();
    void Notice(std::uint8_t kind, const Chain &chain, std::size_t n);
    // Parks the request until something changes; false once it has waited as long as it may.
    bool KeepWaiting(double wait_seconds);
    // Looks at the request again as soon as the others had their turn.
    void ParkForATurn();
    void Unpark();
    template <typename Request>
    bool ParseBody(Request *request);

    void HandleMatch();
    void HandleLookup();
    void HandleResidency();
    void HandleAcquire();
    void HandleRelease();
    void HandleReserve();
    void HandleCommit();
    void HandleAbort();
    void HandleWaitFor();
    void HandleRead();
    void HandleMap();
    void CountAcquire(const Chain &chain, std::size_t held, bool damaged);
    void Committed(const CommitRequest &request, std::size_t num_stored);

    void BeginWrite(std::size_t prefix_bytes);
    void RefuseWrite(Status status, std::string message);
    void ReceivePayload();
    void TakeBufferedPayload();
    void PayloadArrived(std::size_t bytes);
    void EndWrite();
    void DropClaim();
    void DropIncoming();

    NamespaceId ns() const { return static_cast<NamespaceId>(client_->terms.namespace_id); }
    OwnerId owner() const { return client_->terms.owner; }

    Services &services_;
    StoreCore &core_;
    Channel &channel_;
    const Peer peer_;
    std::shared_ptr<Client> client_;  // null until admitted
    State state_ = State::kReceiving;
    bool hang_up_ = false;
    int greetings_ = 0;
    std::int64_t opened_ns_;
    std::int64_t moved_ns_;  // when bytes last went either way

    ByteBuffer in_;
    std::size_t in_begin_ = 0;
    std::size_t in_end_ = 0;
    bool has_header_ = false;
    FrameHeader header_;
    std::size_t needed_ = 0;          // bytes of this frame that must be in in_ to go on
    std::size_t frame_buffered_ = 0;  // of the frame under way, in in_
    std::int64_t started_ns_ = 0;
    std::uint64_t task_ = 0;
    std::int64_t parked_until_ns_ = 0;
    std::uint64_t seen_change_ = 0;  // of the core, after which a parked request was looked at
    Incoming incoming_;
    Outgoing outgoing_;
};

}  // namespace kvstore
