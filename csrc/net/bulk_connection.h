// One connection of a link, and the part of a move that it carries.
//
// Thread safety: one thread at a time.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "copy/move.h"
#include "core/cancel.h"
#include "net/bulk_frame.h"
#include "net/bulk_io.h"
#include "net/dial.h"

namespace kvstore {

// What a write waits for the peer to have taken in or dropped what it was sent, when it is given
// up.
inline constexpr std::int64_t kSettleNs = 100'000'000;

struct BulkBatch {
    bool is_write = false;
    std::uint64_t region = 0;
    std::size_t n = 0;
    const std::uint64_t *offsets = nullptr;    // within the region
    const std::uint64_t *addresses = nullptr;  // here
    const std::uint64_t *lengths = nullptr;
    const std::uint64_t *sums = nullptr;  // may be null
    PieceStatus *statuses = nullptr;
};

// A move and what of it nobody has begun yet.
//
// Thread safety: one mutex guards the place; several connections take from it.
class BulkMove {
public:
    struct Range {
        std::size_t first = 0;
        std::size_t n = 0;
    };
    BulkMove(const BulkBatch &of, std::int64_t deadline, const CancelFlag *cancel,
             const CancelFlag *closed)
        : batch(of), deadline_ns(deadline), cancelled(cancel), closed(closed) {}

    // False when all was taken. Pieces that are no memory are refused on the way.
    bool Take(Range *range);
    // The move ends as soon as its connections see it.
    void Stop() { stopped_.Set(); }
    bool is_stopped() const { return stopped_.is_set(); }

    const BulkBatch &batch;
    const std::int64_t deadline_ns;
    const CancelFlag *const cancelled;  // may be null
    const CancelFlag *const closed;     // the link is

private:
    bool IsMemory(std::size_t i) const;

    CancelFlag stopped_;
    std::mutex mutex_;
    std::size_t next_ = 0;
};

class BulkConnection {
public:
    // Connects and greets. Throws ClientFailure; kRemote with Status::kIncompatible for a peer of
    // another epoch. `silence_ns`: a peer of whom nothing comes for so long, when something should,
    // is gone.
    BulkConnection(const std::string &address, const std::string &secret, std::uint64_t epoch,
                   std::int64_t silence_ns, std::int64_t deadline_ns, InterruptedHook interrupted);
    // For tests: over a socket, which it owns, whose peer has greeted already.
    BulkConnection(int fd, std::int64_t silence_ns);
    ~BulkConnection();
    BulkConnection(const BulkConnection &) = delete;
    BulkConnection &operator=(const BulkConnection &) = delete;

    enum class End {
        kDone,         // of what it took
        kLost,         // the peer is gone, or sends what is none of ours
        kLate,         // the deadline
        kCancelled,    // or stopped
        kInterrupted,  // by a signal
        kRefused,      // never begun: the peer has another epoch
    };
    // Moves what it takes from the move, and sets the statuses of that, until nothing is left.
    // After another end than kDone the connection is of no more use.
    End Run(BulkMove &move);
    // Throws ClientFailure.
    BulkBytes Info(std::int64_t deadline_ns);
    // False when the peer has hung up.
    bool IsOpen() const;
    // Whether nothing came for so long that the peer has to be taken for gone.
    bool is_silent() const { return silent_; }
    // False when the peer may still be taking in what a write sent.
    bool is_settled() const { return settled_; }
    // Looks again, until the deadline.
    bool TrySettle(std::int64_t deadline_ns);

private:
    struct Flight {
        BulkMove::Range range;
        std::uint32_t id;
        BulkBytes frame;
        std::uint64_t sent_at = 0;  // bytes of `outgoing_`: it is sent whole
    };
    enum class Moved { kNone, kSome, kLost };

    void Greet(std::uint64_t epoch, const std::string &secret, std::int64_t deadline_ns);
    BulkBytes Call(BulkOp op, const BulkBytes &head, std::size_t bytes_max,
                   std::int64_t deadline_ns);
    void ReceiveExactly(std::uint8_t *to, std::size_t bytes, std::int64_t deadline_ns);
    void WaitFor(short events, std::int64_t deadline_ns);
    [[noreturn]] void Fail(ClientFailure::Kind kind, const std::string &what, int status = 0) const;

    End Drive(BulkMove &move);
    void Launch(BulkMove &move);
    Moved SendSome();
    Moved ReceiveSome(BulkMove &move);
    bool TakeReply(BulkMove &move);
    void Land(BulkMove &move);
    void GiveUp(BulkMove &move, End end);
    void Settle();

    const std::string address_;
    const InterruptedHook interrupted_;
    const std::int64_t silence_ns_;
    int fd_ = -1;
    std::uint32_t next_id_ = 1;
    bool silent_ = false;
    bool settled_ = true;

    std::deque<Flight> flights_;  // sent or being sent, in the order of their replies
    OutgoingParts outgoing_;
    BulkBytes reply_;
    std::size_t received_ = 0;  // of the reply's frame
    bool in_payload_ = false;
    std::vector<std::size_t> landing_;  // the pieces that make up the payload
    IncomingPieces incoming_;
};

// Of the pieces that a move which ended so left.
PieceStatus StatusOf(BulkConnection::End end);

}  // namespace kvstore
