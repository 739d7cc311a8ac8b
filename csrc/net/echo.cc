#include "net/echo.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "core/store_core.h"
#include "net/client.h"
#include "net/socket.h"

namespace kvstore {

namespace {

constexpr std::uint64_t kEchoBytesMax = 64u << 20;

bool SendAll(int fd, const std::uint8_t *data, std::size_t bytes) {
    while (bytes > 0) {
        const ssize_t sent = send(fd, data, bytes, MSG_NOSIGNAL);
        if (sent <= 0) return false;
        data += sent;
        bytes -= static_cast<std::size_t>(sent);
    }
    return true;
}

bool ReceiveAll(int fd, std::uint8_t *data, std::size_t bytes) {
    while (bytes > 0) {
        const ssize_t received = recv(fd, data, bytes, 0);
        if (received <= 0) return false;
        data += received;
        bytes -= static_cast<std::size_t>(received);
    }
    return true;
}

}  // namespace

EchoServer::EchoServer(int listening_fd) : listener_(fcntl(listening_fd, F_DUPFD_CLOEXEC, 0)) {
    if (listener_ < 0) {
        throw std::runtime_error(std::string("echo: duplicate the socket: ") +
                                 std::strerror(errno));
    }
    thread_ = std::thread([this] { Run(); });
}

EchoServer::~EchoServer() { Stop(); }

void EchoServer::Stop() {
    if (stopping_.exchange(true)) return;
    const int fd = connection_.load();
    if (fd >= 0) shutdown(fd, SHUT_RDWR);
    thread_.join();
    close(listener_);
}

void EchoServer::Run() {
    while (!stopping_.load()) {
        pollfd ready{listener_, POLLIN, 0};
        if (poll(&ready, 1, 50) <= 0) continue;
        const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
        if (fd < 0) continue;
        int domain = 0;
        socklen_t size = sizeof(domain);
        getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size);
        ConfigureSocket(fd, domain == AF_UNIX);
        connection_.store(fd);
        if (!stopping_.load()) Serve(fd);
        connection_.store(-1);
        close(fd);
    }
}

void EchoServer::Serve(int fd) {
    std::uint64_t sizes[2];
    if (!ReceiveAll(fd, reinterpret_cast<std::uint8_t *>(sizes), sizeof(sizes))) return;
    if (sizes[0] > kEchoBytesMax || sizes[1] > kEchoBytesMax) return;
    std::vector<std::uint8_t> request(sizes[0]);
    const std::vector<std::uint8_t> reply(sizes[1], 1);
    while (ReceiveAll(fd, request.data(), request.size())) {
        if (!SendAll(fd, reply.data(), reply.size())) return;
    }
}

std::vector<double> EchoRoundTrips(const std::string &address, std::size_t request_bytes,
                                   std::size_t reply_bytes, std::size_t count) {
    const ClientConnection connection(address, 5.0, nullptr);
    const int fd = connection.fd();
    const timeval none{};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &none, sizeof(none));
    const std::vector<std::uint8_t> request(request_bytes, 2);
    std::vector<std::uint8_t> reply(reply_bytes);
    const std::uint64_t sizes[2] = {request_bytes, reply_bytes};
    bool alive = SendAll(fd, reinterpret_cast<const std::uint8_t *>(sizes), sizeof(sizes));
    std::vector<double> seconds(count);
    for (std::size_t i = 0; i < count && alive; ++i) {
        const std::int64_t begin = SteadyNowNs();
        alive = SendAll(fd, request.data(), request.size()) &&
                ReceiveAll(fd, reply.data(), reply.size());
        seconds[i] = static_cast<double>(SteadyNowNs() - begin) * 1e-9;
    }
    if (!alive) throw std::runtime_error("echo: " + address + ": the peer closed the connection");
    return seconds;
}

}  // namespace kvstore
