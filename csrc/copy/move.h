// Moves pieces of memory that lie anywhere, checked against their checksums on the way: the pointer
// mover of the transports.
//
// Thread safety: as in copy.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cancel.h"

namespace kvstore {

// What became of one piece of a transfer; kvstore.transport.types.Status.
enum class PieceStatus : std::uint8_t {
    kOk = 0,
    kDamaged = 1,  // what arrived has another checksum
    kRefused = 2,  // no such region, outside of it, not writable, or of another epoch
    kLost = 3,     // the peer went before the piece was known to be whole
    kLate = 4,     // the deadline came first
    kCancelled = 5,
};

struct Piece {
    std::uint8_t *to;
    const std::uint8_t *from;
    std::uint64_t bytes;
};

// Copies all pieces; `sums`, where not null, are the XXH3-64 that they must have. A piece that was
// not begun when `cancelled` was set, or the steady clock passed `deadline_ns`, is left out.
// `threads` is an upper bound. REQUIRES: destinations do not overlap anything.
void MovePieces(const Piece *pieces, const std::uint64_t *sums, PieceStatus *statuses,
                std::size_t n, int threads, const CancelFlag *cancelled, std::int64_t deadline_ns);

// Writes the XXH3-64 of each `from`; `to` is not looked at.
void ChecksumPieces(const Piece *pieces, std::uint64_t *sums, std::size_t n, int threads);

}  // namespace kvstore
