// Frames of the daemon's protocol: headers, and the bodies of what native code answers.
//
// Pure functions over bytes that somebody else holds: no I/O, no allocation. docs/design/0003 has
// the table of operations. Parsed requests point into the body they were parsed from.
//
// Every length is checked before it is used; a body must be used up exactly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/store_core.h"
#include "core/types.h"

namespace kvstore {

inline constexpr std::uint32_t kFrameMagic = 0x3253564B;  // "KVS2"
inline constexpr std::size_t kHeaderBytes = 16;
inline constexpr std::size_t kChainHeadBytes = 48;
inline constexpr std::size_t kCommitHeadBytes = 24;
inline constexpr std::size_t kBodyBytesMax = 64u << 20;
// Before a connection is admitted nobody needs more.
inline constexpr std::size_t kGreetingBytesMax = 64u << 10;
inline constexpr std::size_t kPingBytesMax = 64u << 10;

enum class Op : std::uint8_t {
    kMatch = 1,
    kLookup = 2,
    kResidency = 3,
    kAcquire = 4,
    kRelease = 5,
    kReserve = 6,
    kCommit = 7,
    kAbort = 8,
    kWaitFor = 9,
    kRead = 10,
    kWrite = 11,
    kMap = 12,
    kPing = 13,
    kQuiesced = 14,
    kHello = 32,
    kAuth = 33,
    kCall = 34,
};

// "match" and so on; null for what is no operation.
const char *OpName(std::uint8_t op);

// Index + 1 of the error's name in kvstore.wire.ERRORS.
enum class Status : std::uint8_t {
    kOk = 0,
    kConfig = 2,
    kIncompatible = 3,
    kInUse = 4,
    kStoreClosed = 5,
    kStorage = 8,
    kPeerUnavailable = 9,
};

struct FrameHeader {
    std::uint8_t op = 0;
    std::uint8_t status = 0;
    std::uint32_t length = 0;
    std::uint32_t id = 0;
};

void EncodeHeader(const FrameHeader &header, std::uint8_t *out);
// False when the bytes are no header of ours.
bool DecodeHeader(const std::uint8_t *in, FrameHeader *header);

// Takes values off the front of a body.
class Reader {
public:
    Reader(const std::uint8_t *data, std::size_t bytes) : at_(data), left_(bytes) {}

    template <typename T>
    bool Take(T *value) {
        if (left_ < sizeof(T)) return false;
        std::memcpy(value, at_, sizeof(T));
        Skip(sizeof(T));
        return true;
    }
    // Null when fewer than n x size bytes are left.
    const std::uint8_t *TakeArray(std::uint64_t n, std::size_t size) {
        if (n > left_ / size) return nullptr;
        const std::uint8_t *start = at_;
        Skip(static_cast<std::size_t>(n) * size);
        return start;
    }
    // The chain's hashes stay where they are. False also where its flags or its start are none.
    bool TakeChain(Chain *chain);
    std::size_t left() const { return left_; }

private:
    void Skip(std::size_t bytes) {
        at_ += bytes;
        left_ -= bytes;
    }

    const std::uint8_t *at_;
    std::size_t left_;
};

void EncodeChainHead(const Chain &chain, std::uint8_t *out);

// u64 arrays within bodies lie anywhere: they are read with U64At.
inline std::uint64_t U64At(const std::uint8_t *array, std::size_t i) {
    std::uint64_t value;
    std::memcpy(&value, array + i * sizeof(value), sizeof(value));
    return value;
}

struct ChainRequest {  // MATCH, RESIDENCY
    Chain chain;
};
struct LookupRequest {
    static constexpr std::uint64_t kPrefetch = 1;
    std::uint64_t flags = 0;
    Chain chain;
};
struct AcquireRequest {
    static constexpr std::uint64_t kPin = 1;
    double ttl_seconds = -1;  // < 0: no end
    double wait_seconds = 0;
    std::uint64_t flags = 0;
    Chain chain;
};
struct ReleaseRequest {
    std::uint64_t n = 0;
    const std::uint8_t *leases = nullptr;
};
struct ReserveRequest {
    double wait_seconds = 0;
    Chain chain;
};
struct CommitRequest {  // COMMIT, and WRITE less its payload
    std::uint64_t reservation = 0;
    std::uint64_t ack = 0;
    std::uint64_t m = 0;
    const std::uint8_t *checksums = nullptr;
    Chain chain;
};
struct WaitForRequest {
    double wait_seconds = 0;
    std::uint64_t want = 0;
    Chain chain;
};
struct ReadRequest {
    std::uint64_t lease = 0;
    std::uint64_t first = 0;
    std::uint64_t n = 0;
};

// False when the body is not one of that operation.
bool Parse(const std::uint8_t *body, std::size_t bytes, ChainRequest *request);
bool Parse(const std::uint8_t *body, std::size_t bytes, LookupRequest *request);
bool Parse(const std::uint8_t *body, std::size_t bytes, AcquireRequest *request);
bool Parse(const std::uint8_t *body, std::size_t bytes, ReleaseRequest *request);
bool Parse(const std::uint8_t *body, std::size_t bytes, ReserveRequest *request);
bool Parse(const std::uint8_t *body, std::size_t bytes, CommitRequest *request);
bool Parse(const std::uint8_t *body, std::size_t bytes, WaitForRequest *request);
bool Parse(const std::uint8_t *body, std::size_t bytes, ReadRequest *request);
bool Parse(const std::uint8_t *body, std::size_t bytes, std::uint64_t *request);  // ABORT, MAP

// How many bytes a WRITE's body has before its payload, told from its first `have` bytes.
struct WritePrefix {
    enum class Kind { kMore, kWhole, kBad };
    Kind kind = Kind::kMore;
    std::size_t bytes = 0;  // kMore: at least these are needed; kWhole: exactly these
};
// `body_bytes`: the whole body's length, by the frame's header.
WritePrefix MeasureWrite(const std::uint8_t *body, std::size_t have, std::size_t body_bytes);

// Seconds of a request as a deadline; nothing is waited for longer than an hour.
std::int64_t DeadlineAfter(std::int64_t now_ns, double seconds, double seconds_max = 3600.0);

}  // namespace kvstore
