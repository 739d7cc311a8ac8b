// One batch of moves over an endpoint: what was asked of the peer, and what came. By one-sided
// requests of UCX, or where the transport has none of its own, by messages.
//
// A piece goes in parts of at most kPartBytes, so that little is under way when a move has to end.
// Requests that UCX still has outlive the call that began them: Abandon() cuts the move off from
// the caller's arrays, and it must live until in_flight() is 0.
//
// Thread safety: none; the lock of the link.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "copy/move.h"
#include "net/ucx_library.h"

namespace kvstore {

enum class UcxOp { kRead, kWrite };

// A batch, as the caller holds it. `sums` may be null.
struct UcxBatch {
    const std::uint64_t *local_addresses = nullptr;
    const std::uint64_t *remote_offsets = nullptr;
    const std::uint64_t *lengths = nullptr;
    const std::uint64_t *sums = nullptr;
    std::size_t n = 0;
};

// A peer's region whose key we have.
struct UcxRemote {
    std::uint64_t id = 0;
    std::uint64_t base = 0;
    std::uint64_t bytes = 0;
    bool writable = false;
    bool is_revoked = false;  // no new move may use it
    std::size_t users = 0;    // moves
    ucx::Rkey key = nullptr;
};

class UcxMessages;

class UcxMove {
public:
    // 64 requests of up to 4 MiB, and 64 MiB of them in all: what fills any link, and is over soon.
    static constexpr std::size_t kPartsMax = 64;
    static constexpr std::uint64_t kPartBytes = 4u << 20;
    static constexpr std::uint64_t kFlightBytes = 64u << 20;

    // `done` is set when a part ends. Pieces outside of the region are refused at once; by
    // messages, for which `messages` is not null, by the peer, who knows its bounds.
    UcxMove(const ucx::Functions &api, ucx::Ep ep, UcxMessages *messages, const UcxRemote &remote,
            UcxOp op, const UcxBatch &batch, PieceStatus *statuses, bool *done);
    UcxMove(const UcxMove &) = delete;
    UcxMove &operator=(const UcxMove &) = delete;

    // Begins as many requests as may be under way. False when the endpoint has failed.
    bool Issue();
    // Everything was asked and came; of a write, the peer has it.
    bool is_complete() const { return next_ == batch_.n && in_flight_ == 0 && is_flushed_; }
    UcxOp op() const { return op_; }
    std::size_t in_flight() const { return in_flight_; }
    // Pieces whose bytes all came since the last call.
    std::vector<std::uint32_t> TakeArrived() { return std::exchange(arrived_, {}); }
    bool has_arrived() const { return !arrived_.empty(); }
    // Writes `status` for all pieces that are not whole, and forgets the caller's arrays.
    void Abandon(PieceStatus status);

    struct Part {
        UcxMove *move = nullptr;
        std::uint32_t piece = 0;
        std::uint64_t bytes = 0;
        bool is_flush = false;
    };
    void End(Part *part, PieceStatus status);

private:
    static void OnDone(void *request, ucx::Status status, void *part);

    bool Begin(Part *part, std::uint64_t offset);
    bool Flush();
    // Takes the result of a request that was just made. False when it failed.
    bool Made(Part *part, ucx::StatusPtr result);

    const ucx::Functions &api_;
    const ucx::Ep ep_;
    UcxMessages *const messages_;
    const UcxRemote remote_;
    const UcxOp op_;
    const UcxBatch batch_;
    PieceStatus *const statuses_;
    bool *const done_;
    std::vector<std::uint32_t> parts_left_;  // of each piece, under way
    std::vector<std::uint32_t> arrived_;
    std::array<Part, kPartsMax + 1> parts_;
    std::vector<Part *> free_;
    std::size_t next_ = 0;         // piece
    std::uint64_t next_byte_ = 0;  // of it
    std::size_t in_flight_ = 0;
    std::uint64_t flight_bytes_ = 0;
    bool is_flushing_ = false;
    bool is_flushed_ = false;  // also of what needs none: reads, and messages, which are answered
    bool is_abandoned_ = false;
};

}  // namespace kvstore
