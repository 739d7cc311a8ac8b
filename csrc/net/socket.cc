#include "net/socket.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace kvstore {

namespace {

// The kernel takes what its limits allow. The usual limit holds a frame of 8,192 hashes.
constexpr int kLocalBufferBytes = 1 << 20;

void SetOption(int fd, int level, int name, int value) {
    setsockopt(fd, level, name, &value, sizeof(value));  // all of them are improvements only
}

}  // namespace

SocketChannel::~SocketChannel() { close(fd_); }

ssize_t SocketChannel::Receive(const iovec *parts, std::size_t n) {
    if (n == 1) return recv(fd_, parts[0].iov_base, parts[0].iov_len, MSG_DONTWAIT);
    msghdr message{};
    message.msg_iov = const_cast<iovec *>(parts);
    message.msg_iovlen = n;
    return recvmsg(fd_, &message, MSG_DONTWAIT);
}

ssize_t SocketChannel::Send(const iovec *parts, std::size_t n, int fd) {
    if (fd >= 0) return SendWithFd(fd_, parts, n, fd);
    if (n == 1) return send(fd_, parts[0].iov_base, parts[0].iov_len, MSG_DONTWAIT | MSG_NOSIGNAL);
    msghdr message{};
    message.msg_iov = const_cast<iovec *>(parts);
    message.msg_iovlen = n;
    return sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

ssize_t SendWithFd(int socket, const iovec *parts, std::size_t n, int fd) {
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = const_cast<iovec *>(parts);
    message.msg_iovlen = n;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &fd, sizeof(fd));
    return sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

void ConfigureSocket(int fd, bool is_local) {
    if (is_local) {
        SetOption(fd, SOL_SOCKET, SO_SNDBUF, kLocalBufferBytes);
        SetOption(fd, SOL_SOCKET, SO_RCVBUF, kLocalBufferBytes);
        return;
    }
    SetOption(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    SetOption(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    SetOption(fd, IPPROTO_TCP, TCP_KEEPIDLE, 10);
    SetOption(fd, IPPROTO_TCP, TCP_KEEPINTVL, 5);
    SetOption(fd, IPPROTO_TCP, TCP_KEEPCNT, 4);
    SetOption(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 30'000);
}

timeval AsTimeval(std::int64_t ns) {
    timeval value{};
    ns = std::max<std::int64_t>(ns, 1000);  // 0 would be without end
    value.tv_sec = ns / 1'000'000'000;
    value.tv_usec = ns % 1'000'000'000 / 1000;
    return value;
}

void PeerCredentials(int fd, int *uid, int *pid) {
    ucred credentials{};
    socklen_t size = sizeof(credentials);
    *uid = *pid = -1;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return;
    *uid = static_cast<int>(credentials.uid);
    *pid = static_cast<int>(credentials.pid);
}

}  // namespace kvstore
