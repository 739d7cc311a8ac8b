// What two endpoints say to each other over UCX as active messages: who they are, which keys the
// peer may use, and over transports without one-sided moves of their own, the bytes themselves.
//
//   HELLO      client    nonce, the epoch it expects; its worker's address
//   CHALLENGE  server    session, nonce, epoch, status; proof that it knows the secret
//   PROOF      client    session; proof that it knows the secret
//   WELCOME    server    status
//   OPEN       client    session, region         OPENED   server   status, base, bytes, flags; key
//   REVOKE     server    region                  REVOKED  client   session, region
//   PING       server    every quarter of the timeout: it lives
//   READ       client    session, region, part   DATA     server   part; bytes
//   WRITE      client    session, region, part; bytes
//                        ANSWERED  server  part, status: of a write, or of a read that is refused
//
// A peer gets a region's key only here. So the server knows who holds it, and asks for it back: who
// answered REVOKED, or whose endpoint is closed, will not use it again.
//
// Pure functions over bytes that somebody else holds; every length is checked before it is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvstore {

enum class UcxKind : std::uint16_t {
    kHello = 1,
    kChallenge,
    kProof,
    kWelcome,
    kOpen,
    kOpened,
    kRevoke,
    kRevoked,
    kPing,
    kAnswered,
};

enum class UcxAnswer : std::uint16_t { kOk = 0, kEpoch = 1, kSecret = 2, kNoRegion = 3 };

inline constexpr std::uint32_t kUcxMagic = 0x31585543;  // "CUX1": also the version
inline constexpr std::size_t kUcxNonceBytes = 32;
inline constexpr std::size_t kUcxProofBytes = 32;
inline constexpr std::size_t kUcxTailBytesMax = 16 << 10;  // addresses and keys have some hundred

// The fixed part of a message, as it travels: little endian, no padding.
struct UcxHead {
    std::uint32_t magic = kUcxMagic;
    UcxKind kind = UcxKind::kHello;
    UcxAnswer answer = UcxAnswer::kOk;
    std::uint64_t session = 0;
    std::uint64_t epoch = 0;
    std::uint64_t region = 0;
    std::uint64_t base = 0;
    std::uint64_t bytes = 0;
    std::uint64_t writable = 0;
    std::uint64_t part = 0;
    std::uint64_t one_sided = 0;  // of WELCOME: regions have keys
    std::uint8_t nonce[kUcxNonceBytes] = {};
    std::uint8_t proof[kUcxProofBytes] = {};
};
static_assert(sizeof(UcxHead) == 72 + kUcxNonceBytes + kUcxProofBytes);

struct UcxMessage {
    UcxHead head;
    std::vector<std::uint8_t> tail;  // an address, or a key
};

std::vector<std::uint8_t> EncodeUcx(const UcxHead &head, const void *tail = nullptr,
                                    std::size_t tail_bytes = 0);
// The head of a message with bytes of a piece. A piece goes in parts, asked for one by one, and a
// part in messages of at most kUcxFragmentBytes.
enum class UcxPartKind : std::uint32_t { kRead = 1, kData, kWrite };
inline constexpr std::uint64_t kUcxFragmentBytes = 256 << 10;
struct UcxPartHead {
    std::uint32_t magic = kUcxMagic;
    UcxPartKind kind = UcxPartKind::kRead;
    std::uint64_t session = 0;
    std::uint64_t part = 0;    // a number that the client gave it
    std::uint64_t region = 0;  // of the piece
    std::uint64_t offset = 0;  // of the piece in the region
    std::uint64_t total = 0;   // of the piece
    std::uint64_t at = 0;      // in the piece: of the part; of DATA and WRITE, of what is in here
    std::uint64_t bytes = 0;   // of the part
};
static_assert(sizeof(UcxPartHead) == 64);
// Whether the piece lies in a region of so many bytes, and `here_bytes` at `at` in the piece.
bool IsInside(const UcxPartHead &head, std::uint64_t region_bytes, std::uint64_t here_bytes);

// False when these bytes are no message of this version.
bool ParseUcx(const void *data, std::size_t bytes, UcxMessage *message);

// Random bytes, of the kernel's.
void FillRandom(void *data, std::size_t bytes);

// A proof covers both nonces and the epoch, so none can be used again.
enum class UcxSide : std::uint8_t { kServer = 1, kClient = 2 };
void MakeUcxProof(UcxSide side, const std::string &secret, const std::uint8_t *client_nonce,
                  const std::uint8_t *server_nonce, std::uint64_t epoch,
                  std::uint8_t out[kUcxProofBytes]);
bool IsSameProof(const std::uint8_t *a, const std::uint8_t *b);

}  // namespace kvstore
