// Sockets of the server: what differs between Unix and TCP ones, and a Channel over one.
#pragma once

#include <sys/time.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

#include "net/connection.h"

namespace kvstore {

// A non-blocking stream socket. Owns it.
class SocketChannel final : public Channel {
public:
    explicit SocketChannel(int fd) : fd_(fd) {}
    ~SocketChannel() override;
    SocketChannel(const SocketChannel &) = delete;
    SocketChannel &operator=(const SocketChannel &) = delete;

    ssize_t Receive(const iovec *parts, std::size_t n) override;
    ssize_t Send(const iovec *parts, std::size_t n, int fd) override;
    int fd() const { return fd_; }

private:
    const int fd_;
};

// Sets what a new connection needs, of either side: large buffers, no delay, and over TCP an end
// to connections whose host is gone.
void ConfigureSocket(int fd, bool is_local);

// For SO_SNDTIMEO and SO_RCVTIMEO: never without end.
timeval AsTimeval(std::int64_t ns);

// Sends a descriptor with the first byte of `parts`.
ssize_t SendWithFd(int socket, const iovec *parts, std::size_t n, int fd);

// uid and pid of a Unix socket's peer; -1 each where the kernel does not say.
void PeerCredentials(int fd, int *uid, int *pid);

}  // namespace kvstore
