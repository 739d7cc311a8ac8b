// One connection of the bulk server: greeting, then requests one after the other.
//
// Thread safety: Run belongs to one thread; Cut may be called from any other.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "net/bulk_frame.h"
#include "net/bulk_io.h"
#include "net/bulk_server.h"
#include "net/regions.h"

namespace kvstore {

class BulkSession final : public Regions::User {
public:
    // Owns the socket. `greeted`: for tests, the peer has proved itself already.
    BulkSession(BulkServices &services, int fd, bool greeted = false)
        : services_(services), greeted_(greeted), fd_(fd) {}
    ~BulkSession() { CloseFd(); }
    BulkSession(const BulkSession &) = delete;
    BulkSession &operator=(const BulkSession &) = delete;

    // Until the connection is closed.
    void Run();
    void Cut() override;
    // Whether the peer has proved itself.
    bool is_greeted() const { return greeted_.load(); }

private:
    enum class Frame { kCame, kEnd, kBad };

    void Serve();
    bool Greet();
    Frame ReceiveFrame(std::int64_t deadline_ns);
    bool ReceiveExactly(std::size_t bytes, std::int64_t deadline_ns, bool may_idle);
    bool Wait(short events, std::int64_t deadline_ns);
    template <typename Attempt>
    ssize_t Until(short events, std::int64_t deadline_ns, std::int64_t spin_ns, Attempt attempt);
    void Pace(ssize_t bytes);
    bool SendParts();
    bool Reply(BulkOp op, std::uint8_t status, const void *head, std::size_t bytes);
    bool Refuse(const char *message, std::uint8_t status);
    bool SendInfo();
    bool SendPieces(const BulkRequest &request);
    bool ReceivePieces(const BulkRequest &request);
    const std::uint8_t *head() const { return frame_.data() + kHeaderBytes; }
    std::size_t head_bytes() const { return header_.length - kBulkSumBytes; }

    void CloseFd();

    BulkServices &services_;
    std::atomic<bool> greeted_;
    std::mutex fd_mutex_;  // held to close the socket, and by others who use it
    int fd_;
    std::atomic<bool> cut_{false};
    FrameHeader header_;
    BulkBytes frame_;
    std::size_t received_ = 0;
    std::vector<std::uint8_t> statuses_;
    OutgoingParts outgoing_;
    IncomingPieces incoming_;
};

}  // namespace kvstore
