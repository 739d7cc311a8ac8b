// The codec of frames: what is encoded is parsed back, in place, and no body that is cut short,
// too long, or that lies about a length is taken. Bodies are copied to memory of their exact size,
// so that the address sanitizer sees a read past their end.
#include "net/frame.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "core/check.h"
#include "net/latency.h"
#include "net/sketch.h"

namespace {

using namespace kvstore;
using Bytes = std::vector<std::uint8_t>;

template <typename T>
void Put(Bytes *out, T value) {
    const auto *from = reinterpret_cast<const std::uint8_t *>(&value);
    out->insert(out->end(), from, from + sizeof(value));
}

BlockHash HashOf(int number) {
    BlockHash hash{};
    for (int i = 0; i < 32; ++i) hash.bytes[i] = static_cast<std::uint8_t>(number * 37 + i);
    return hash;
}

void PutChain(Bytes *out, const Chain &chain) {
    std::uint8_t head[kChainHeadBytes];
    EncodeChainHead(chain, head);
    out->insert(out->end(), head, head + sizeof(head));
    const auto *hashes = reinterpret_cast<const std::uint8_t *>(chain.hashes);
    if (chain.n > 0) out->insert(out->end(), hashes, hashes + chain.n * sizeof(BlockHash));
}

template <typename Request>
bool ParseExact(const Bytes &body, std::size_t bytes, Request *request) {
    const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[bytes]);
    if (bytes > 0) std::memcpy(exact.get(), body.data(), bytes);
    return Parse(exact.get(), bytes, request);
}

// Every shorter body and a longer one are refused.
template <typename Request>
void CheckLengths(Bytes body) {
    Request request;
    KV_CHECK(ParseExact(body, body.size(), &request));
    for (std::size_t bytes = 0; bytes < body.size(); ++bytes) {
        KV_CHECK(!ParseExact(body, bytes, &request));
    }
    body.push_back(0);
    KV_CHECK(!ParseExact(body, body.size(), &request));
}

void TestHeaders() {
    std::uint8_t bytes[kHeaderBytes];
    EncodeHeader({4, 7, 12345, 99}, bytes);
    KV_CHECK(std::memcmp(bytes, "KVS2", 4) == 0);
    FrameHeader header;
    KV_CHECK(DecodeHeader(bytes, &header));
    KV_CHECK(header.op == 4 && header.status == 7 && header.length == 12345 && header.id == 99);
    bytes[6] = 1;  // flags
    KV_CHECK(!DecodeHeader(bytes, &header));
    bytes[6] = 0;
    bytes[3] = '1';
    KV_CHECK(!DecodeHeader(bytes, &header));
    KV_CHECK(OpName(0) == nullptr && OpName(15) == nullptr && OpName(200) == nullptr);
}

void TestChains() {
    const BlockHash hashes[3] = {HashOf(1), HashOf(2), HashOf(3)};
    const BlockHash parent = HashOf(9);
    Bytes body;
    PutChain(&body, {hashes, 3, 7, &parent});
    ChainRequest request;
    KV_CHECK(Parse(body.data(), body.size(), &request));
    KV_CHECK(request.chain.n == 3 && request.chain.start == 7);
    KV_CHECK(*request.chain.parent == parent && request.chain.hashes[2] == hashes[2]);
    KV_CHECK(reinterpret_cast<const std::uint8_t *>(request.chain.hashes) ==
             body.data() + kChainHeadBytes);
    CheckLengths<ChainRequest>(body);

    const auto refused = [&](std::int64_t start, std::uint32_t flags, std::uint32_t n) {
        Bytes changed = body;
        std::memcpy(changed.data(), &start, 8);
        std::memcpy(changed.data() + 8, &flags, 4);
        std::memcpy(changed.data() + 12, &n, 4);
        return !Parse(changed.data(), changed.size(), &request);
    };
    KV_CHECK(!refused(7, 1, 3));
    KV_CHECK(refused(7, 0, 3));           // starts later, but has no parent
    KV_CHECK(refused(7, 2, 3));           // unknown flag
    KV_CHECK(refused(7, 1, UINT32_MAX));  // more hashes than there are
    KV_CHECK(refused(UINT32_MAX - 2, 1, 3));
    KV_CHECK(refused(INT64_MAX, 1, 3));
    KV_CHECK(!refused(INT64_MIN, 0, 3) && request.chain.start == -1);
    KV_CHECK(!refused(0, 0, 3) && request.chain.parent == nullptr);
}

void TestRequests() {
    const BlockHash hashes[2] = {HashOf(1), HashOf(2)};
    const Chain chain{hashes, 2, 0, nullptr};
    Bytes lookup;
    Put<std::uint64_t>(&lookup, 1);
    PutChain(&lookup, chain);
    CheckLengths<LookupRequest>(lookup);

    Bytes acquire;
    Put(&acquire, -1.0);
    Put(&acquire, 0.5);
    Put<std::uint64_t>(&acquire, 1);
    PutChain(&acquire, chain);
    CheckLengths<AcquireRequest>(acquire);
    const double nan = std::nan("");
    std::memcpy(acquire.data() + 8, &nan, 8);
    AcquireRequest parsed;
    KV_CHECK(!Parse(acquire.data(), acquire.size(), &parsed));

    Bytes release;
    Put<std::uint64_t>(&release, 2);
    Put<std::uint64_t>(&release, 11);
    Put<std::uint64_t>(&release, 12);
    CheckLengths<ReleaseRequest>(release);
    ReleaseRequest released;
    KV_CHECK(Parse(release.data(), release.size(), &released) && U64At(released.leases, 1) == 12);
    const std::uint64_t lie = UINT64_MAX / 8 + 2;  // times 8 it would fit
    std::memcpy(release.data(), &lie, 8);
    KV_CHECK(!Parse(release.data(), release.size(), &released));

    Bytes reserve;
    Put(&reserve, 0.0);
    PutChain(&reserve, chain);
    CheckLengths<ReserveRequest>(reserve);

    Bytes wait;
    Put(&wait, 1.0);
    Put<std::uint64_t>(&wait, 2);
    PutChain(&wait, chain);
    CheckLengths<WaitForRequest>(wait);

    Bytes read;
    for (int i = 0; i < 3; ++i) Put<std::uint64_t>(&read, 1);
    CheckLengths<ReadRequest>(read);
}

Bytes CommitBody(std::uint64_t m, const Chain &chain) {
    Bytes body;
    Put<std::uint64_t>(&body, 5);
    Put<std::uint64_t>(&body, 1);
    Put(&body, m);
    for (std::uint64_t i = 0; i < m; ++i) Put(&body, 100 + i);
    PutChain(&body, chain);
    return body;
}

void TestCommitsAndWrites() {
    const BlockHash hashes[3] = {HashOf(1), HashOf(2), HashOf(3)};
    const Chain chain{hashes, 3, 0, nullptr};
    const Bytes body = CommitBody(2, chain);
    CheckLengths<CommitRequest>(body);
    CommitRequest request;
    const Bytes too_many = CommitBody(4, chain);  // more checksums than blocks
    KV_CHECK(!Parse(too_many.data(), too_many.size(), &request));

    using Kind = WritePrefix::Kind;
    const std::size_t whole = body.size() + 2 * 4096;
    for (std::size_t have = 0; have < body.size(); ++have) {
        const Bytes exact(body.begin(), body.begin() + static_cast<std::ptrdiff_t>(have));
        const WritePrefix prefix = MeasureWrite(exact.data(), have, whole);
        KV_CHECK(prefix.kind == Kind::kMore && prefix.bytes > have && prefix.bytes <= body.size());
    }
    WritePrefix prefix = MeasureWrite(body.data(), body.size(), whole);
    KV_CHECK(prefix.kind == Kind::kWhole && prefix.bytes == body.size());
    prefix = MeasureWrite(body.data(), body.size(), body.size() - 1);
    KV_CHECK(prefix.kind == Kind::kBad);
    Bytes lying = body;
    const std::uint64_t m = UINT64_MAX / 8 + 1;
    std::memcpy(lying.data() + 16, &m, 8);
    KV_CHECK(MeasureWrite(lying.data(), lying.size(), UINT32_MAX).kind == Kind::kBad);
    lying = body;
    const std::uint32_t n = UINT32_MAX;
    std::memcpy(lying.data() + kCommitHeadBytes + 16 + 12, &n, 4);
    KV_CHECK(MeasureWrite(lying.data(), lying.size(), UINT32_MAX).kind == Kind::kBad);
}

void TestDeadlines() {
    KV_CHECK(DeadlineAfter(5, -1.0) == 5);
    KV_CHECK(DeadlineAfter(5, 1e300) == 5 + 3600'000'000'000);
    KV_CHECK(DeadlineAfter(5, INFINITY, 10.0) == 5 + 10'000'000'000);
}

void TestWatching() {
    LatencyHistogram histogram;
    histogram.Add(500);
    histogram.Add(1'500'000);
    histogram.Add(60'000'000'000);
    const auto counts = histogram.Counts();
    KV_CHECK(counts.front() == 1 && counts.back() == 1);
    std::uint64_t total = 0;
    for (const std::uint64_t count : counts) total += count;
    KV_CHECK(total == 3);

    PrefixSketch sketch;
    for (int round = 0; round < 100; ++round) {
        sketch.Add(1, HashOf(3), static_cast<std::uint64_t>(round));
        sketch.Add(2, HashOf(3), 1);
        for (int i = 0; i < 3; ++i) sketch.Add(0, HashOf(100 + round * 3 + i), 1);
    }
    const auto top = sketch.Top();
    KV_CHECK(top.size() == PrefixSketch::kPlaces);
    KV_CHECK(top[0].namespace_id + top[1].namespace_id == 3);
    KV_CHECK(top[0].uses >= 100 && top[1].uses >= 100 && top[0].first == HashOf(3));
}

}  // namespace

int main() {
    TestHeaders();
    TestChains();
    TestRequests();
    TestCommitsAndWrites();
    TestDeadlines();
    TestWatching();
    std::puts("frame_test: ok");
}
