// Payload on its way through a socket, in chunks that fit in the cache: bytes are hashed right
// after the kernel copied them, and sent in amounts that the peer takes before they have left the
// cache.
//
// Thread safety: none; each object belongs to one thread.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "copy/xxh3.h"

namespace kvstore {

inline constexpr std::size_t kBulkChunkBytes = 256 << 10;
// Before a thread blocks for a reply or the rest of a payload: a wake-up costs 20 to 80 us, and
// they come sooner. Nobody spins for a request, or for room to send: where both ends have one core
// the other end could not run meanwhile.
inline constexpr std::int64_t kBulkSpinNs = 50'000;
void CpuPause();

// Parts to send, in their order; the bytes stay where they are.
class OutgoingParts {
public:
    void Clear();
    void Add(const void *data, std::uint64_t bytes);
    bool empty() const { return first_ == parts_.size(); }
    // Of all that was ever added, and of that, sent.
    std::uint64_t added_bytes() const { return added_bytes_; }
    std::uint64_t sent_bytes() const { return sent_bytes_; }
    // One sendmsg of at most `bytes_max`: what it returned.
    ssize_t SendSome(int fd, std::size_t bytes_max = kBulkChunkBytes);

private:
    std::vector<iovec> parts_;
    std::size_t first_ = 0;
    std::uint64_t added_bytes_ = 0;
    std::uint64_t sent_bytes_ = 0;
};

// Pieces to receive, in their order, each checked against its checksum where it has one.
class IncomingPieces {
public:
    void Clear();
    // Null `to`: the bytes are thrown away.
    void Add(std::uint8_t *to, std::uint64_t bytes, const std::uint64_t *sum);
    bool empty() const { return at_ == pieces_.size(); }
    // One recvmsg, which does not block: what it returned. REQUIRES: !empty().
    ssize_t ReceiveSome(int fd, std::size_t bytes_max = kBulkChunkBytes);
    bool is_damaged(std::size_t i) const { return pieces_[i].damaged; }

private:
    struct Piece {
        std::uint8_t *to;
        std::uint64_t bytes;
        std::uint64_t sum;
        bool has_sum;
        bool damaged;
    };
    void Advance(std::size_t bytes);
    void Hash(std::uint64_t done);
    void EndPiece();
    void SkipEmpty();

    std::vector<Piece> pieces_;
    std::size_t at_ = 0;          // the piece that is being received
    std::uint64_t received_ = 0;  // bytes of it
    std::optional<Xxh3Stream> stream_;
};

}  // namespace kvstore
