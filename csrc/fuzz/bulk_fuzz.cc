// libFuzzer on both ends of the bulk protocol: a session that serves small regions, and a
// connection that moves a batch, are fed any bytes over a socket.
//
// An input is options and a stream; or records (op, status, length, head), of which frames with
// good sums are made, with a byte of payload for every byte that follows a record of length 0.
// Regions and the batch's memory have their exact size, so that the address sanitizer sees a byte
// too many.
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "copy/move.h"
#include "core/check.h"
#include "core/store_core.h"
#include "net/bulk_connection.h"
#include "net/bulk_frame.h"
#include "net/bulk_server.h"
#include "net/bulk_session.h"

namespace {

using namespace kvstore;

constexpr std::size_t kRegionBytes = 300;
constexpr std::size_t kPieces = 5;
constexpr int kBufferBytes = 1 << 20;  // more than any reply here has
constexpr std::int64_t kSoonNs = 50'000'000;

BulkBytes FramesOf(const std::uint8_t *data, std::size_t size) {
    BulkBytes stream;
    std::uint32_t id = 1;
    while (size >= 3) {
        const std::size_t length = std::min<std::size_t>(data[2], size - 3);
        if (length == 0) {
            stream.insert(stream.end(), data, data + 3);  // payload, or none of ours
        } else {
            const BulkBytes frame =
                SealBulkFrame(static_cast<BulkOp>(data[0]), data[1], id++, data + 3, length);
            stream.insert(stream.end(), frame.begin(), frame.end());
        }
        data += 3 + length;
        size -= 3 + length;
    }
    return stream;
}

// Two ends of a socket; the first has the stream to read, and its end after that.
struct Ends {
    explicit Ends(const BulkBytes &stream) {
        KV_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
        for (const int fd : fds) {
            setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kBufferBytes, sizeof(kBufferBytes));
        }
        if (!stream.empty()) {
            const ssize_t sent = send(fds[1], stream.data(), stream.size(), MSG_DONTWAIT);
            KV_CHECK(sent == static_cast<ssize_t>(stream.size()));
        }
        shutdown(fds[1], SHUT_WR);
    }
    int fds[2];
};

void Serve(const BulkBytes &stream, bool greeted) {
    Regions regions;
    const std::unique_ptr<std::uint8_t[]> memory(new std::uint8_t[2 * kRegionBytes]());
    const std::unique_ptr<std::uint8_t[]> fixed(new std::uint8_t[kRegionBytes]());
    KV_CHECK(regions.Add(1, memory.get(), 2 * kRegionBytes, true));
    KV_CHECK(regions.Add(2, fixed.get(), kRegionBytes, false));
    BulkServices services(regions, "a secret that is long enough", 7, 0);
    const Ends ends(stream);
    {
        BulkSession session(services, ends.fds[0], greeted);
        session.Run();
    }
    close(ends.fds[1]);
    // Whatever came, nobody holds a region, and what is read-only was not written to.
    KV_CHECK(regions.Remove(1, 0) && regions.Remove(2, 0));
    KV_CHECK(std::count(fixed.get(), fixed.get() + kRegionBytes, 0) == kRegionBytes);
}

void Move(const BulkBytes &stream, bool is_write, bool has_sums) {
    const std::uint64_t lengths[kPieces] = {1, 64, 0, 241, 300};
    std::uint64_t addresses[kPieces];
    std::uint64_t offsets[kPieces] = {};
    std::uint64_t sums[kPieces] = {};
    std::unique_ptr<std::uint8_t[]> memory[kPieces];
    PieceStatus statuses[kPieces];
    for (std::size_t i = 0; i < kPieces; ++i) {
        memory[i].reset(new std::uint8_t[lengths[i]]());
        addresses[i] = reinterpret_cast<std::uint64_t>(memory[i].get());
        statuses[i] = static_cast<PieceStatus>(99);
    }
    BulkBatch batch;
    batch.is_write = is_write;
    batch.region = 1;
    batch.n = kPieces;
    batch.offsets = offsets;
    batch.addresses = addresses;
    batch.lengths = lengths;
    batch.sums = has_sums ? sums : nullptr;
    batch.statuses = statuses;
    const Ends ends(stream);
    const CancelFlag open;
    BulkMove move(batch, SteadyNowNs() + kSoonNs, nullptr, &open);
    {
        BulkConnection connection(ends.fds[0], kSoonNs);
        connection.Run(move);
    }
    close(ends.fds[1]);
    for (const PieceStatus status : statuses) KV_CHECK(status <= PieceStatus::kCancelled);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    if (size < 1 || size > 8192) return 0;
    const std::uint8_t options = data[0];
    const BulkBytes stream =
        (options & 1) != 0 ? FramesOf(data + 1, size - 1) : BulkBytes(data + 1, data + size);
    if ((options & 2) != 0) {
        Move(stream, (options & 4) != 0, (options & 8) != 0);
    } else {
        Serve(stream, (options & 4) != 0);
    }
    return 0;
}
