#include "net/bulk_frame.h"

#include <sys/random.h>

#include <cerrno>
#include <cstring>

#include "copy/copy.h"
#include "core/check.h"
#include "core/sha256.h"

namespace kvstore {

namespace {

constexpr std::size_t kHelloBytes = 48;
constexpr std::size_t kWelcomeBytes = 40;
constexpr std::size_t kPaddingBytes = 32;  // PROOF and INFO
constexpr std::size_t kRequestHeadBytes = 16;
constexpr std::size_t kRangeBytes = 16;
constexpr std::uint32_t kHasSums = 1;

static_assert(kHeaderBytes + kPaddingBytes + kBulkSumBytes == kBulkRequestBytesMin);
static_assert(kHeaderBytes + kRequestHeadBytes + kRangeBytes + kBulkSumBytes ==
              kBulkRequestBytesMin);

void Append(BulkBytes *out, const void *data, std::size_t bytes) {
    const std::size_t before = out->size();
    out->resize(before + bytes);
    std::memcpy(out->data() + before, data, bytes);
}

template <typename T>
void Put(BulkBytes *out, T value) {
    Append(out, &value, sizeof(value));
}

}  // namespace

BulkBytes SealBulkFrame(BulkOp op, std::uint8_t status, std::uint32_t id, const void *head,
                        std::size_t head_bytes) {
    BulkBytes frame;
    frame.reserve(kHeaderBytes + head_bytes + kBulkSumBytes);
    frame.resize(kHeaderBytes);
    EncodeHeader({static_cast<std::uint8_t>(op), status,
                  static_cast<std::uint32_t>(head_bytes + kBulkSumBytes), id},
                 frame.data());
    if (head_bytes > 0) Append(&frame, head, head_bytes);
    Put(&frame, Xxh3(frame.data(), frame.size()));
    return frame;
}

bool IsRequestLength(const FrameHeader &header) {
    const std::size_t length = header.length;
    switch (static_cast<BulkOp>(header.op)) {
        case BulkOp::kHello:
            return length == kHelloBytes + kBulkSumBytes;
        case BulkOp::kProof:
        case BulkOp::kInfo:
            return length == kPaddingBytes + kBulkSumBytes;
        case BulkOp::kRead:
        case BulkOp::kWrite:
            return length >= kRequestHeadBytes + kRangeBytes + kBulkSumBytes &&
                   length <= kBulkHeadBytesMax + kBulkSumBytes;
    }
    return false;
}

bool IsSound(const std::uint8_t *frame, std::size_t bytes) {
    const std::size_t covered = bytes - kBulkSumBytes;
    return U64At(frame + covered, 0) == Xxh3(frame, covered);
}

BulkBytes EncodeHead(const BulkHello &hello) {
    BulkBytes head;
    Put(&head, hello.version);
    Put(&head, hello.epoch);
    Append(&head, hello.nonce.data(), hello.nonce.size());
    return head;
}

BulkBytes EncodeHead(const BulkWelcome &welcome) {
    BulkBytes head;
    Put(&head, welcome.epoch);
    Append(&head, welcome.proof.data(), welcome.proof.size());
    return head;
}

BulkBytes EncodeHead(std::uint64_t region, const std::uint64_t *offsets,
                     const std::uint64_t *lengths, const std::uint64_t *sums, std::size_t n) {
    KV_CHECK(n > 0 && n <= kBulkPiecesMax);
    BulkBytes head;
    head.reserve(kRequestHeadBytes + n * (kRangeBytes + (sums != nullptr ? 8 : 0)));
    Put(&head, region);
    Put(&head, static_cast<std::uint32_t>(n));
    Put(&head, sums != nullptr ? kHasSums : std::uint32_t{0});
    for (std::size_t i = 0; i < n; ++i) {
        Put(&head, offsets[i]);
        Put(&head, lengths[i]);
    }
    if (sums != nullptr) Append(&head, sums, 8 * n);
    return head;
}

bool ParseHead(const std::uint8_t *head, std::size_t bytes, BulkHello *hello) {
    if (bytes != kHelloBytes) return false;
    hello->version = U64At(head, 0);
    hello->epoch = U64At(head, 1);
    std::memcpy(hello->nonce.data(), head + 16, hello->nonce.size());
    return true;
}

bool ParseHead(const std::uint8_t *head, std::size_t bytes, BulkWelcome *welcome) {
    if (bytes != kWelcomeBytes) return false;
    welcome->epoch = U64At(head, 0);
    std::memcpy(welcome->proof.data(), head + 8, welcome->proof.size());
    return true;
}

bool ParseHead(const std::uint8_t *head, std::size_t bytes, BulkOp op, BulkRequest *request) {
    Reader reader(head, bytes);
    std::uint32_t n;
    std::uint32_t flags;
    if (!reader.Take(&request->region) || !reader.Take(&n) || !reader.Take(&flags)) return false;
    if (n == 0 || n > kBulkPiecesMax || (flags & ~kHasSums) != 0) return false;
    if (flags != 0 && op != BulkOp::kWrite) return false;
    request->n = n;
    request->ranges = reader.TakeArray(n, kRangeBytes);
    if (request->ranges == nullptr) return false;
    request->sums = (flags & kHasSums) != 0 ? reader.TakeArray(n, 8) : nullptr;
    if (((flags & kHasSums) != 0) != (request->sums != nullptr) || reader.left() != 0) return false;
    for (std::size_t i = 0; i < n; ++i) {
        if (request->length(i) > kBulkPieceBytesMax) return false;
    }
    return true;
}

BulkProof ProofOf(BulkSide side, const std::string &secret, const BulkHello &hello,
                  const BulkNonce &challenge, std::uint64_t epoch) {
    BulkBytes said;
    const char *who = side == BulkSide::kClient ? "kvstore-bulk client" : "kvstore-bulk server";
    Append(&said, who, std::strlen(who));
    const BulkBytes head = EncodeHead(hello);
    Append(&said, head.data(), head.size());
    Append(&said, challenge.data(), challenge.size());
    Put(&said, epoch);
    BulkProof proof;
    HmacSha256(reinterpret_cast<const std::uint8_t *>(secret.data()), secret.size(), said.data(),
               said.size(), proof.data());
    return proof;
}

bool AreSame(const BulkProof &a, const BulkProof &b) {
    volatile std::uint8_t differing = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        differing = static_cast<std::uint8_t>(differing | (a[i] ^ b[i]));
    }
    return differing == 0;
}

BulkNonce MakeNonce() {
    BulkNonce nonce;
    ssize_t got;
    do {
        got = getrandom(nonce.data(), nonce.size(), 0);
    } while (got < 0 && errno == EINTR);
    KV_CHECK(got == static_cast<ssize_t>(nonce.size()));
    return nonce;
}

}  // namespace kvstore
