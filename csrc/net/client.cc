#include "net/client.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "core/store_core.h"
#include "net/socket.h"

namespace kvstore {

namespace {

constexpr std::size_t kReceiveBytes = 64 << 10;
constexpr std::size_t kKeptBytes = 1 << 20;
// An ACQUIRE's reply has as many bytes as its request, and a head.
constexpr std::size_t kReplyBytesMax = kBodyBytesMax + (64 << 10);
constexpr std::size_t kPartsMax = 512;  // below IOV_MAX
// A larger send walks out of the cache before the peer reads it.
constexpr std::size_t kSendBytes = 1 << 20;
constexpr std::int64_t kTimeoutToleranceNs = 1'000'000;

using Kind = ClientFailure::Kind;

std::size_t TotalBytes(const std::vector<iovec> &parts) {
    std::size_t total = 0;
    for (const iovec &part : parts) total += part.iov_len;
    return total;
}

// Drops the first `bytes` bytes of parts[*first..].
void Advance(std::vector<iovec> *parts, std::size_t *first, std::size_t bytes) {
    while (*first < parts->size()) {
        iovec &part = (*parts)[*first];
        const std::size_t taken = std::min(bytes, part.iov_len);
        part.iov_base = static_cast<std::uint8_t *>(part.iov_base) + taken;
        part.iov_len -= taken;
        bytes -= taken;
        if (part.iov_len > 0) return;
        ++*first;
    }
}

}  // namespace

ClientConnection::Lock::Lock(ClientConnection &connection) : connection_(connection) {
    if (connection_.busy_.exchange(true)) {
        throw ClientFailure(Kind::kBusy, "another thread is in a call on this connection");
    }
}

ClientConnection::Lock::~Lock() {
    connection_.busy_.store(false);
    if (connection_.closing_.load()) connection_.Close();
}

ClientConnection::ClientConnection(const std::string &address, double timeout_seconds,
                                   InterruptedHook interrupted)
    : address_(address), interrupted_(interrupted) {
    deadline_ns_ = DeadlineAfter(SteadyNowNs(), timeout_seconds);
    fd_.store(Dial(address, deadline_ns_, timeout_seconds, interrupted));
}

ClientConnection::ClientConnection(int fd, const std::string &address, InterruptedHook interrupted)
    : address_(address), interrupted_(interrupted) {
    fd_.store(fd);
}

ClientConnection::~ClientConnection() { Close(); }

void ClientConnection::Close() {
    closing_.store(true);
    // The descriptor's number must not go to another file while a call uses it.
    if (busy_.exchange(true)) {
        const std::lock_guard lock(fd_mutex_);
        const int fd = fd_.load();
        if (fd >= 0) shutdown(fd, SHUT_RDWR);
        return;
    }
    CloseFd();
    busy_.store(false);
}

void ClientConnection::CloseFd() {
    const std::lock_guard lock(fd_mutex_);
    const int fd = fd_.exchange(-1);
    if (fd >= 0) close(fd);
}

void ClientConnection::Fail(Kind kind, const std::string &what) {
    CloseFd();
    throw ClientFailure(kind, address_ + ": " + what);
}

// --- calls

void ClientConnection::Begin(std::uint8_t op, std::vector<iovec> *parts, double timeout_seconds) {
    if (fd_.load() < 0) throw ClientFailure(Kind::kConnection, address_ + ": closed");
    deadline_ns_ = DeadlineAfter(SteadyNowNs(), timeout_seconds, 1e7);
    const std::size_t bytes = TotalBytes(*parts);
    if (bytes > UINT32_MAX) throw std::invalid_argument("a request of 4 GiB or more");
    sent_ = {op, 0, static_cast<std::uint32_t>(bytes), next_id_++};
    EncodeHeader(sent_, head_);
    parts->insert(parts->begin(), {head_, kHeaderBytes});
    Send(parts);
    // Cached: most calls have the same timeout, and come back in a small part of it.
    const auto timeout_ns = std::max<std::int64_t>(deadline_ns_ - SteadyNowNs(), 0);
    const std::int64_t far_apart = std::max<std::int64_t>(timeout_ns / 64, kTimeoutToleranceNs);
    if (std::abs(receive_timeout_ns_ - timeout_ns) > far_apart) SetReceiveTimeout(timeout_ns);
}

void ClientConnection::SetReceiveTimeout(std::int64_t left_ns) {
    const timeval left = AsTimeval(left_ns);
    setsockopt(fd_.load(), SOL_SOCKET, SO_RCVTIMEO, &left, sizeof(left));
    receive_timeout_ns_ = left_ns;
}

void ClientConnection::Send(std::vector<iovec> *parts) {
    const int fd = fd_.load();
    std::size_t first = 0;
    Advance(parts, &first, 0);
    while (first < parts->size()) {
        msghdr message{};
        message.msg_iov = parts->data() + first;
        std::size_t asked = 0;
        std::size_t n = 0;
        while (first + n < parts->size() && n < kPartsMax && asked < kSendBytes) {
            asked += (*parts)[first + n++].iov_len;
        }
        message.msg_iovlen = n;
        const ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0) {
            Advance(parts, &first, static_cast<std::size_t>(sent));
            continue;
        }
        // The peer may have said why before it hung up.
        if (errno == EPIPE) return;
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
            Fail(Kind::kConnection, std::strerror(errno));
        }
        if (errno == EINTR && interrupted_ != nullptr && interrupted_()) {
            Fail(Kind::kInterrupted, "interrupted");
        }
        const std::int64_t left = deadline_ns_ - SteadyNowNs();
        if (left <= 0) Fail(Kind::kTimeout, "the request was not taken in time");
        pollfd ready{fd, POLLOUT, 0};
        const int polled = poll(&ready, 1, static_cast<int>(left / 1'000'000 + 1));
        if (polled < 0 && errno == EINTR && interrupted_ != nullptr && interrupted_()) {
            Fail(Kind::kInterrupted, "interrupted");
        }
    }
}

// At least one byte.
std::size_t ClientConnection::Receive(iovec *parts, std::size_t n, int *fd) {
    while (true) {
        msghdr message{};
        message.msg_iov = parts;
        message.msg_iovlen = n;
        alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 4)];
        if (fd != nullptr) {
            message.msg_control = control;
            message.msg_controllen = sizeof(control);
        }
        const ssize_t received = fd == nullptr && n == 1
                                     ? recv(fd_.load(), parts[0].iov_base, parts[0].iov_len, 0)
                                     : recvmsg(fd_.load(), &message, MSG_CMSG_CLOEXEC);
        if (received > 0) {
            for (cmsghdr *c = fd != nullptr ? CMSG_FIRSTHDR(&message) : nullptr; c != nullptr;
                 c = CMSG_NXTHDR(&message, c)) {
                if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
                const std::size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
                for (std::size_t i = 0; i < count; ++i) {
                    int came;
                    std::memcpy(&came, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
                    if (*fd >= 0) close(*fd);
                    *fd = came;
                }
            }
            return static_cast<std::size_t>(received);
        }
        if (received == 0) Fail(Kind::kConnection, "the peer closed the connection");
        if (errno == EINTR) {
            if (interrupted_ != nullptr && interrupted_()) Fail(Kind::kInterrupted, "interrupted");
        } else if (errno != EAGAIN && errno != EWOULDBLOCK) {
            Fail(Kind::kConnection, std::strerror(errno));
        }
        const std::int64_t left = deadline_ns_ - SteadyNowNs();
        if (left <= 0) Fail(Kind::kTimeout, "no reply in time");
        SetReceiveTimeout(left);
    }
}

// Leaves header and the bytes that came with it in buffer_: never more than `bytes_max`.
void ClientConnection::ReceiveHeader(std::size_t bytes_max, std::size_t *received, int *fd) {
    if (buffer_.capacity() > kKeptBytes) buffer_.Free();
    buffer_.Grow(std::max(bytes_max, kReceiveBytes), 0);
    *received = 0;
    while (*received < kHeaderBytes) {
        if (*received > 0) SetReceiveTimeout(deadline_ns_ - SteadyNowNs());
        iovec part{buffer_.data() + *received, bytes_max - *received};
        *received += Receive(&part, 1, fd);
    }
    if (!DecodeHeader(buffer_.data(), &reply_) || reply_.op != sent_.op || reply_.id != sent_.id) {
        Fail(Kind::kProtocol, "what came is no reply of ours");
    }
}

ClientConnection::Body ClientConnection::ReceiveBody(std::size_t received) {
    if (reply_.length > kReplyBytesMax) {
        Fail(Kind::kProtocol, "a reply of " + std::to_string(reply_.length) + " bytes");
    }
    const std::size_t whole = kHeaderBytes + reply_.length;
    if (received > whole) Fail(Kind::kProtocol, "more came than was announced");
    buffer_.Grow(whole, received);
    while (received < whole) {
        if (SteadyNowNs() >= deadline_ns_) Fail(Kind::kTimeout, "no whole reply in time");
        SetReceiveTimeout(deadline_ns_ - SteadyNowNs());
        iovec part{buffer_.data() + received, whole - received};
        received += Receive(&part, 1, nullptr);
    }
    const std::uint8_t *body = buffer_.data() + kHeaderBytes;
    if (reply_.status != 0) {
        throw ClientFailure(Kind::kRemote,
                            std::string(reinterpret_cast<const char *>(body), reply_.length),
                            reply_.status);
    }
    return {body, reply_.length};
}

ClientConnection::Body ClientConnection::Call(std::uint8_t op, std::vector<iovec> parts,
                                              double timeout_seconds) {
    Begin(op, &parts, timeout_seconds);
    std::size_t received;
    ReceiveHeader(std::max(kReceiveBytes, std::min(buffer_.capacity(), kKeptBytes)), &received,
                  nullptr);
    return ReceiveBody(received);
}

ClientConnection::Body ClientConnection::CallForFd(std::uint8_t op, std::vector<iovec> parts,
                                                   double timeout_seconds, int *fd) {
    *fd = -1;
    try {
        Begin(op, &parts, timeout_seconds);
        std::size_t received;
        ReceiveHeader(kReceiveBytes, &received, fd);
        return ReceiveBody(received);
    } catch (...) {
        if (*fd >= 0) close(std::exchange(*fd, -1));
        throw;
    }
}

void ClientConnection::CallInto(std::uint8_t op, std::vector<iovec> parts, std::vector<iovec> into,
                                double timeout_seconds) {
    const std::size_t expected = TotalBytes(into);
    Begin(op, &parts, timeout_seconds);
    std::size_t received;
    ReceiveHeader(kHeaderBytes, &received, nullptr);
    if (reply_.status != 0) ReceiveBody(received);  // throws
    if (reply_.length != expected) {
        Fail(Kind::kProtocol, "a reply of " + std::to_string(reply_.length) + " bytes where " +
                                  std::to_string(expected) + " were asked for");
    }
    std::size_t first = 0;
    Advance(&into, &first, 0);
    while (first < into.size()) {
        const std::int64_t left = deadline_ns_ - SteadyNowNs();
        if (left <= 0) Fail(Kind::kTimeout, "no whole reply in time");
        if (receive_timeout_ns_ - left > kTimeoutToleranceNs) SetReceiveTimeout(left);
        const std::size_t n = std::min(into.size() - first, kPartsMax);
        Advance(&into, &first, Receive(into.data() + first, n, nullptr));
    }
}

}  // namespace kvstore
