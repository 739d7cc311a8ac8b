#include "net/ucx_wire.h"

#include <sys/random.h>

#include <bit>
#include <cstring>

#include "core/check.h"
#include "core/sha256.h"

namespace kvstore {

static_assert(std::endian::native == std::endian::little);

std::vector<std::uint8_t> EncodeUcx(const UcxHead &head, const void *tail, std::size_t tail_bytes) {
    KV_CHECK(tail_bytes <= kUcxTailBytesMax);
    std::vector<std::uint8_t> bytes(sizeof(head) + tail_bytes);
    std::memcpy(bytes.data(), &head, sizeof(head));
    if (tail_bytes > 0) std::memcpy(bytes.data() + sizeof(head), tail, tail_bytes);
    return bytes;
}

bool ParseUcx(const void *data, std::size_t bytes, UcxMessage *message) {
    if (bytes < sizeof(UcxHead) || bytes > sizeof(UcxHead) + kUcxTailBytesMax) return false;
    std::memcpy(&message->head, data, sizeof(UcxHead));
    if (message->head.magic != kUcxMagic) return false;
    const auto *tail = static_cast<const std::uint8_t *>(data) + sizeof(UcxHead);
    message->tail.assign(tail, tail + (bytes - sizeof(UcxHead)));
    return true;
}

bool IsInside(const UcxPartHead &head, std::uint64_t region_bytes, std::uint64_t here_bytes) {
    return head.total <= region_bytes && head.offset <= region_bytes - head.total &&
           here_bytes <= head.total && head.at <= head.total - here_bytes;
}

void FillRandom(void *data, std::size_t bytes) {
    KV_CHECK(bytes <= 256);  // never interrupted, never short
    KV_CHECK(getrandom(data, bytes, 0) == static_cast<ssize_t>(bytes));
}

void MakeUcxProof(UcxSide side, const std::string &secret, const std::uint8_t *client_nonce,
                  const std::uint8_t *server_nonce, std::uint64_t epoch,
                  std::uint8_t out[kUcxProofBytes]) {
    constexpr char kName[] = "kvstore ucx 1";
    std::uint8_t message[sizeof(kName) + 1 + 2 * kUcxNonceBytes + sizeof(epoch)];
    std::uint8_t *at = message;
    std::memcpy(at, kName, sizeof(kName));
    at += sizeof(kName);
    *at++ = static_cast<std::uint8_t>(side);
    std::memcpy(at, client_nonce, kUcxNonceBytes);
    std::memcpy(at + kUcxNonceBytes, server_nonce, kUcxNonceBytes);
    std::memcpy(at + 2 * kUcxNonceBytes, &epoch, sizeof(epoch));
    HmacSha256(reinterpret_cast<const std::uint8_t *>(secret.data()), secret.size(), message,
               sizeof(message), out);
}

bool IsSameProof(const std::uint8_t *a, const std::uint8_t *b) {
    unsigned difference = 0;
    for (std::size_t i = 0; i < kUcxProofBytes; ++i) difference |= a[i] ^ b[i];
    return difference == 0;
}

}  // namespace kvstore
