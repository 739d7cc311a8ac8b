#include "net/frame.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace kvstore {

static_assert(std::endian::native == std::endian::little);

namespace {

struct PackedHeader {
    std::uint32_t magic;
    std::uint8_t op;
    std::uint8_t status;
    std::uint16_t flags;
    std::uint32_t length;
    std::uint32_t id;
};
static_assert(sizeof(PackedHeader) == kHeaderBytes);

struct PackedChainHead {
    std::int64_t start;
    std::uint32_t flags;
    std::uint32_t n;
    BlockHash parent;
};
static_assert(sizeof(PackedChainHead) == kChainHeadBytes);

constexpr std::uint32_t kHasParent = 1;

}  // namespace

const char *OpName(std::uint8_t op) {
    switch (static_cast<Op>(op)) {
        case Op::kMatch:
            return "match";
        case Op::kLookup:
            return "lookup";
        case Op::kResidency:
            return "residency";
        case Op::kAcquire:
            return "acquire";
        case Op::kRelease:
            return "release";
        case Op::kReserve:
            return "reserve";
        case Op::kCommit:
            return "commit";
        case Op::kAbort:
            return "abort";
        case Op::kWaitFor:
            return "wait_for";
        case Op::kRead:
            return "read";
        case Op::kWrite:
            return "write";
        case Op::kMap:
            return "map";
        case Op::kPing:
            return "ping";
        case Op::kQuiesced:
            return "quiesced";
        case Op::kHello:
            return "hello";
        case Op::kAuth:
            return "auth";
        case Op::kCall:
            return "call";
    }
    return nullptr;
}

void EncodeHeader(const FrameHeader &header, std::uint8_t *out) {
    const PackedHeader packed{kFrameMagic, header.op, header.status, 0, header.length, header.id};
    std::memcpy(out, &packed, sizeof(packed));
}

bool DecodeHeader(const std::uint8_t *in, FrameHeader *header) {
    PackedHeader packed;
    std::memcpy(&packed, in, sizeof(packed));
    if (packed.magic != kFrameMagic || packed.flags != 0) return false;
    *header = {packed.op, packed.status, packed.length, packed.id};
    return true;
}

bool Reader::TakeChain(Chain *chain) {
    if (left_ < kChainHeadBytes) return false;
    const std::uint8_t *at = at_;
    PackedChainHead head;
    Take(&head);
    if ((head.flags & ~kHasParent) != 0) return false;
    const bool has_parent = (head.flags & kHasParent) != 0;
    if (head.start > 0 && !has_parent) return false;
    // A block's place in its chain is 32 bits wide.
    if (head.start > static_cast<std::int64_t>(UINT32_MAX) - static_cast<std::int64_t>(head.n)) {
        return false;
    }
    const std::uint8_t *hashes = TakeArray(head.n, sizeof(BlockHash));
    if (hashes == nullptr) return false;
    chain->hashes = reinterpret_cast<const BlockHash *>(hashes);
    chain->n = head.n;
    chain->start = head.start < 0 ? -1 : head.start;
    chain->parent =
        has_parent ? reinterpret_cast<const BlockHash *>(at + offsetof(PackedChainHead, parent))
                   : nullptr;
    return true;
}

void EncodeChainHead(const Chain &chain, std::uint8_t *out) {
    PackedChainHead head{chain.start, chain.parent != nullptr ? kHasParent : 0,
                         static_cast<std::uint32_t>(chain.n),
                         chain.parent != nullptr ? *chain.parent : BlockHash{}};
    std::memcpy(out, &head, sizeof(head));
}

bool Parse(const std::uint8_t *body, std::size_t bytes, ChainRequest *request) {
    Reader reader(body, bytes);
    return reader.TakeChain(&request->chain) && reader.left() == 0;
}

bool Parse(const std::uint8_t *body, std::size_t bytes, LookupRequest *request) {
    Reader reader(body, bytes);
    return reader.Take(&request->flags) && reader.TakeChain(&request->chain) && reader.left() == 0;
}

bool Parse(const std::uint8_t *body, std::size_t bytes, AcquireRequest *request) {
    Reader reader(body, bytes);
    return reader.Take(&request->ttl_seconds) && reader.Take(&request->wait_seconds) &&
           reader.Take(&request->flags) && reader.TakeChain(&request->chain) &&
           reader.left() == 0 && !std::isnan(request->ttl_seconds) &&
           !std::isnan(request->wait_seconds);
}

bool Parse(const std::uint8_t *body, std::size_t bytes, ReleaseRequest *request) {
    Reader reader(body, bytes);
    if (!reader.Take(&request->n)) return false;
    request->leases = reader.TakeArray(request->n, sizeof(std::uint64_t));
    return request->leases != nullptr && reader.left() == 0;
}

bool Parse(const std::uint8_t *body, std::size_t bytes, ReserveRequest *request) {
    Reader reader(body, bytes);
    return reader.Take(&request->wait_seconds) && reader.TakeChain(&request->chain) &&
           reader.left() == 0 && !std::isnan(request->wait_seconds);
}

bool Parse(const std::uint8_t *body, std::size_t bytes, CommitRequest *request) {
    Reader reader(body, bytes);
    if (!reader.Take(&request->reservation) || !reader.Take(&request->ack) ||
        !reader.Take(&request->m)) {
        return false;
    }
    request->checksums = reader.TakeArray(request->m, sizeof(std::uint64_t));
    return request->checksums != nullptr && reader.TakeChain(&request->chain) &&
           reader.left() == 0 && request->m <= request->chain.n;
}

bool Parse(const std::uint8_t *body, std::size_t bytes, WaitForRequest *request) {
    Reader reader(body, bytes);
    return reader.Take(&request->wait_seconds) && reader.Take(&request->want) &&
           reader.TakeChain(&request->chain) && reader.left() == 0 &&
           !std::isnan(request->wait_seconds);
}

bool Parse(const std::uint8_t *body, std::size_t bytes, ReadRequest *request) {
    Reader reader(body, bytes);
    return reader.Take(&request->lease) && reader.Take(&request->first) &&
           reader.Take(&request->n) && reader.left() == 0;
}

bool Parse(const std::uint8_t *body, std::size_t bytes, std::uint64_t *request) {
    Reader reader(body, bytes);
    return reader.Take(request) && reader.left() == 0;
}

WritePrefix MeasureWrite(const std::uint8_t *body, std::size_t have, std::size_t body_bytes) {
    using Kind = WritePrefix::Kind;
    const std::size_t limit = std::min(body_bytes, kBodyBytesMax);
    std::size_t need = kCommitHeadBytes;
    if (need > limit) return {Kind::kBad, 0};
    if (have < need) return {Kind::kMore, need};
    const std::uint64_t m = U64At(body, 2);
    if (m > limit / sizeof(std::uint64_t)) return {Kind::kBad, 0};
    const std::size_t chain_at = need + static_cast<std::size_t>(m) * sizeof(std::uint64_t);
    need = chain_at + kChainHeadBytes;
    if (need > limit) return {Kind::kBad, 0};
    if (have < need) return {Kind::kMore, need};
    PackedChainHead head;
    std::memcpy(&head, body + chain_at, sizeof(head));
    if (head.n > limit / sizeof(BlockHash) || m > head.n) return {Kind::kBad, 0};
    need += head.n * sizeof(BlockHash);
    if (need > limit) return {Kind::kBad, 0};
    return {have < need ? Kind::kMore : Kind::kWhole, need};
}

std::int64_t DeadlineAfter(std::int64_t now_ns, double seconds, double seconds_max) {
    return now_ns + static_cast<std::int64_t>(std::clamp(seconds, 0.0, seconds_max) * 1e9);
}

}  // namespace kvstore
