// The client's side of one connection: a call sends a frame and waits for its reply.
//
// The deadline of a call is one point of the steady clock for all of it, however slowly bytes come.
// After any failure but a refusal by the peer the connection is closed.
//
// Thread safety: one call at a time, which a Lock sees to; another thread may Close(), which ends
// the call under way.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "net/buffer.h"
#include "net/dial.h"
#include "net/frame.h"

namespace kvstore {

class ClientConnection {
public:
    // `address`: "unix:/path", or "tcp:host:port" with [] around an IPv6 address.
    // Throws ClientFailure: kTimeout, kConnection; std::invalid_argument for another address.
    ClientConnection(const std::string &address, double timeout_seconds,
                     InterruptedHook interrupted);
    // Over a connected socket, which is now its own; errors call the peer `address`.
    ClientConnection(int fd, const std::string &address, InterruptedHook interrupted);
    ~ClientConnection();
    ClientConnection(const ClientConnection &) = delete;
    ClientConnection &operator=(const ClientConnection &) = delete;

    // One call and the use of its reply. Throws ClientFailure: kBusy.
    class Lock {
    public:
        explicit Lock(ClientConnection &connection);
        ~Lock();
        Lock(const Lock &) = delete;
        Lock &operator=(const Lock &) = delete;

    private:
        ClientConnection &connection_;
    };
    struct Body {
        const std::uint8_t *data = nullptr;
        std::size_t bytes = 0;
    };
    // The reply's body stays valid until the next call. All of these throw ClientFailure.
    // REQUIRES: the caller holds a Lock.
    Body Call(std::uint8_t op, std::vector<iovec> parts, double timeout_seconds);
    // As Call, where a descriptor comes with the reply; -1 where none did. The caller owns it.
    Body CallForFd(std::uint8_t op, std::vector<iovec> parts, double timeout_seconds, int *fd);
    // As Call; the body of a good reply goes into `into`, which it must fill exactly.
    void CallInto(std::uint8_t op, std::vector<iovec> parts, std::vector<iovec> into,
                  double timeout_seconds);

    // -1 once closed.
    int fd() const { return fd_.load(); }
    void Close();

private:
    void Begin(std::uint8_t op, std::vector<iovec> *parts, double timeout_seconds);
    void Send(std::vector<iovec> *parts);
    std::size_t Receive(iovec *parts, std::size_t n, int *fd);
    void ReceiveHeader(std::size_t bytes_max, std::size_t *received, int *fd);
    Body ReceiveBody(std::size_t received);
    void SetReceiveTimeout(std::int64_t left_ns);
    [[noreturn]] void Fail(ClientFailure::Kind kind, const std::string &what);

    const std::string address_;
    const InterruptedHook interrupted_;
    void CloseFd();

    // Closed, and shut down from other threads, under fd_mutex_: else its number might be another
    // file's by then.
    std::mutex fd_mutex_;
    std::atomic<int> fd_{-1};
    std::atomic<bool> busy_{false};
    std::atomic<bool> closing_{false};
    std::uint32_t next_id_ = 1;
    FrameHeader sent_;
    FrameHeader reply_;
    std::uint8_t head_[kHeaderBytes];
    std::int64_t deadline_ns_ = 0;
    std::int64_t receive_timeout_ns_ = 0;
    ByteBuffer buffer_;
};

}  // namespace kvstore
