// Feeds arbitrary bytes to the server's side of a connection: no sockets and no threads, the same
// state machine, core and roster as in the daemon.
//
// Input: a byte of options, a byte that says in what pieces bytes come and go, then either the
// stream itself or, where the options say so, records (op u8, length u16, body) that become well
// formed frames, so that bodies are reached without guessing a header. Greetings are admitted.
//
// Checked beyond what the sanitizers see: every reply is a frame; at the end nothing of the client
// is leased, reserved, parked or listed.
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/check.h"
#include "net/connection.h"
#include "net/server.h"

namespace {

using namespace kvstore;

constexpr std::size_t kBlockBytes = 256;  // so that a WRITE's payload fits in an input
constexpr std::size_t kChunkBytes = 64 << 10;

// Gives the input in pieces, and takes replies in pieces.
class FuzzChannel final : public Channel {
public:
    FuzzChannel(std::vector<std::uint8_t> input, std::uint8_t pieces)
        : input_(std::move(input)), pieces_(pieces) {}

    ssize_t Receive(const iovec *parts, std::size_t n) override {
        if (Hesitates()) return -1;
        std::size_t left = std::min(input_.size() - at_, Piece());
        std::size_t given = 0;
        for (std::size_t i = 0; i < n && left > 0; ++i) {
            const std::size_t bytes = std::min(parts[i].iov_len, left);
            std::memcpy(parts[i].iov_base, input_.data() + at_, bytes);
            at_ += bytes;
            given += bytes;
            left -= bytes;
        }
        return static_cast<ssize_t>(given);
    }

    ssize_t Send(const iovec *parts, std::size_t n, int) override {
        if (Hesitates()) return -1;
        std::size_t left = Piece();
        std::size_t taken = 0;
        for (std::size_t i = 0; i < n && left > 0; ++i) {
            const std::size_t bytes = std::min(parts[i].iov_len, left);
            const auto *from = static_cast<const std::uint8_t *>(parts[i].iov_base);
            output_.insert(output_.end(), from, from + bytes);
            taken += bytes;
            left -= bytes;
        }
        return static_cast<ssize_t>(taken);
    }

    bool at_end() const { return at_ == input_.size(); }

    void CheckReplies() const {
        std::size_t at = 0;
        while (output_.size() - at >= kHeaderBytes) {
            FrameHeader header;
            KV_CHECK(DecodeHeader(output_.data() + at, &header));
            if (output_.size() - at - kHeaderBytes < header.length) return;  // closed within
            at += kHeaderBytes + header.length;
        }
    }

private:
    std::size_t Piece() const { return pieces_ % 16 == 0 ? SIZE_MAX : pieces_ % 16 * 7; }
    bool Hesitates() {
        if (pieces_ < 128 || (++calls_ & 1) != 0) return false;
        errno = EAGAIN;
        return true;
    }

    const std::vector<std::uint8_t> input_;
    const std::uint8_t pieces_;
    std::size_t at_ = 0;
    unsigned calls_ = 0;
    std::vector<std::uint8_t> output_;
};

std::vector<std::uint8_t> FramesOf(const std::uint8_t *data, std::size_t size) {
    std::vector<std::uint8_t> stream;
    std::uint32_t id = 0;
    while (size >= 3) {
        const std::size_t length = std::min<std::size_t>(data[1] | data[2] << 8, size - 3);
        std::uint8_t header[kHeaderBytes];
        EncodeHeader({data[0], 0, static_cast<std::uint32_t>(length), id++}, header);
        stream.insert(stream.end(), header, header + sizeof(header));
        stream.insert(stream.end(), data + 3, data + 3 + length);
        data += 3 + length;
        size -= 3 + length;
    }
    return stream;
}

// What Python would do with its tasks.
void AnswerTasks(Services &services, Connection &connection, bool has_namespace, bool refuses) {
    while (auto task = services.tasks.Pop(0)) {
        Peer peer;
        if (task->id == 0 || !services.roster.TakePending(task->id, &peer)) continue;
        if (task->kind == static_cast<std::uint8_t>(Op::kHello)) {
            ClientTerms terms;
            terms.client = 1;
            terms.owner = services.core.NewOwner();
            terms.namespace_id = has_namespace ? 0 : -1;
            terms.block_bytes = has_namespace ? kBlockBytes : 0;
            terms.may_map = terms.notices = terms.notice_used = true;
            if (!services.roster.AddClient(task->connection, terms)) {
                services.core.ReleaseOwner(terms.owner);
            }
        }
        connection.Answer(task->id, refuses ? 8 : 0, std::vector<std::uint8_t>(8));
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    if (size < 2) return 0;
    const std::uint8_t options = data[0];
    const std::uint8_t pieces = data[1];
    std::string error;
    auto arena = Arena::Create(kChunkBytes, kChunkBytes, false, &error);
    if (arena == nullptr) return 0;
    StoreCore core(std::move(arena), "lru");
    NamespaceId ns = 0;
    KV_CHECK(core.AddNamespace(kBlockBytes, &ns));
    Services services(core, 8);
    std::vector<std::uint8_t> stream((options & 1) != 0
                                         ? FramesOf(data + 2, size - 2)
                                         : std::vector<std::uint8_t>(data + 2, data + size));
    if ((options & 2) != 0) {  // greeted already
        std::vector<std::uint8_t> hello(kHeaderBytes);
        EncodeHeader({static_cast<std::uint8_t>(Op::kHello), 0, 0, 7}, hello.data());
        stream.insert(stream.begin(), hello.begin(), hello.end());
    }
    FuzzChannel channel(std::move(stream), pieces);
    Peer peer;
    peer.connection = services.roster.NextConnection();
    peer.is_local = true;
    {
        Connection connection(services, channel, peer);
        // Each turn moves a byte or changes the state, or the channel hesitates once.
        for (int idle = 0; idle < 8 && connection.state() != Connection::State::kClosed; ++idle) {
            const bool was_at_end = channel.at_end();
            switch (connection.state()) {
                case Connection::State::kReceiving:
                    if (connection.has_buffered_frame()) {
                        connection.Turn();
                    } else {
                        connection.OnReadable();
                    }
                    break;
                case Connection::State::kSending:
                    connection.OnWritable();
                    break;
                case Connection::State::kWaiting:
                    AnswerTasks(services, connection, (options & 4) == 0, (options & 8) != 0);
                    if (connection.is_parked()) {
                        connection.Retry();
                        if (connection.is_parked()) connection.Close();  // would wait for real
                    }
                    break;
                case Connection::State::kClosed:
                    break;
            }
            (void)connection.deadline_ns();
            if (!was_at_end || connection.has_buffered_frame() ||
                connection.state() != Connection::State::kReceiving) {
                idle = 0;
            }
        }
    }
    channel.CheckReplies();
    const CoreStats stats = core.Stats();
    KV_CHECK(stats.leases == 0 && stats.reservations == 0);
    KV_CHECK(services.num_parked() == 0);
    KV_CHECK(services.roster.num_connections() == 0 && services.roster.Clients().empty());
    return 0;
}
