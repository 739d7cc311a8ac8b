// Frames of the bulk protocol: one-sided reads and writes of a peer's regions over TCP.
//
// A frame is a header (net/frame.h), a head, and a sum: the XXH3-64 of header and head, since a
// damaged offset would put good bytes into a wrong place. `length` counts head and sum. After the
// sum of a WRITE, and of a READ's reply, comes the payload; its length follows from the head.
//
//   HELLO  version u64, epoch u64, nonce[32]     reply: nonce[32]
//   PROOF  proof[32]                             reply: epoch u64, proof[32]
//   INFO   zeros[32]                             reply: the info
//   READ   region u64, n u32, flags u32, n x {offset u64, length u64}
//                                                reply: n statuses; payload of those that are OK
//   WRITE  as READ, then n x checksum u64 if flags say so; payload of all n
//                                                reply: n statuses
//
// A reply has its request's op and id. One with a status has a message as its head; the connection
// ends with it. Requests are answered in their order.
//
// Pure functions over bytes that somebody else holds; every length is checked before it is used.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "net/frame.h"

namespace kvstore {

enum class BulkOp : std::uint8_t { kHello = 64, kProof = 65, kInfo = 66, kRead = 67, kWrite = 68 };

inline constexpr std::uint64_t kBulkVersion = 1;
inline constexpr std::size_t kBulkSumBytes = 8;
// No request is shorter, so that much may be received before its header is known.
inline constexpr std::size_t kBulkRequestBytesMin = 56;
inline constexpr std::size_t kBulkPiecesMax = 1024;
inline constexpr std::size_t kBulkHeadBytesMax = 16 + 24 * kBulkPiecesMax;
inline constexpr std::size_t kBulkInfoBytesMax = 16u << 20;
// Larger than any memory: sums of a request's lengths do not overflow.
inline constexpr std::uint64_t kBulkPieceBytesMax = 1ull << 48;

using BulkBytes = std::vector<std::uint8_t>;
using BulkNonce = std::array<std::uint8_t, 32>;
using BulkProof = std::array<std::uint8_t, 32>;

// A whole frame less its payload.
BulkBytes SealBulkFrame(BulkOp op, std::uint8_t status, std::uint32_t id, const void *head,
                        std::size_t head_bytes);
// Whether the header's length is one of that op's, of a request or of a good reply. Of READ and
// WRITE replies the number of pieces decides, which is the caller's to know.
bool IsRequestLength(const FrameHeader &header);
// Whether a frame of header, head and sum came as it was sent. REQUIRES: bytes >= 24.
bool IsSound(const std::uint8_t *frame, std::size_t bytes);

struct BulkHello {
    std::uint64_t version = 0;
    std::uint64_t epoch = 0;  // that the peer must have; 0: any
    BulkNonce nonce{};
};
struct BulkWelcome {
    std::uint64_t epoch = 0;
    BulkProof proof{};
};
struct BulkRequest {
    std::uint64_t region = 0;
    std::size_t n = 0;
    const std::uint8_t *ranges = nullptr;
    const std::uint8_t *sums = nullptr;  // null: none were sent

    std::uint64_t offset(std::size_t i) const { return U64At(ranges, 2 * i); }
    std::uint64_t length(std::size_t i) const { return U64At(ranges, 2 * i + 1); }
};

BulkBytes EncodeHead(const BulkHello &hello);
BulkBytes EncodeHead(const BulkWelcome &welcome);
// `sums` may be null. REQUIRES: 0 < n <= kBulkPiecesMax.
BulkBytes EncodeHead(std::uint64_t region, const std::uint64_t *offsets,
                     const std::uint64_t *lengths, const std::uint64_t *sums, std::size_t n);

// False when the head is none of that kind. A request points into the head.
bool ParseHead(const std::uint8_t *head, std::size_t bytes, BulkHello *hello);
bool ParseHead(const std::uint8_t *head, std::size_t bytes, BulkWelcome *welcome);
bool ParseHead(const std::uint8_t *head, std::size_t bytes, BulkOp op, BulkRequest *request);

// What proves that its maker knows the secret: it covers both ends' nonces, what the hello asks
// for, the epoch, and who made it.
enum class BulkSide { kClient, kServer };
BulkProof ProofOf(BulkSide side, const std::string &secret, const BulkHello &hello,
                  const BulkNonce &challenge, std::uint64_t epoch);
// In a time that does not depend on where they differ.
bool AreSame(const BulkProof &a, const BulkProof &b);
BulkNonce MakeNonce();

}  // namespace kvstore
