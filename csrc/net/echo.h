// The barest exchange of bytes between two processes, to measure the protocol against: blocking
// sends and receives, no epoll, no frames.
#pragma once

#include <atomic>
#include <cstddef>
#include <string>
#include <thread>
#include <vector>

namespace kvstore {

// Serves one connection after the other on a listening socket, which is duplicated.
class EchoServer {
public:
    explicit EchoServer(int listening_fd);
    ~EchoServer();
    EchoServer(const EchoServer &) = delete;
    EchoServer &operator=(const EchoServer &) = delete;
    void Stop();

private:
    void Run();
    void Serve(int fd);

    const int listener_;
    std::atomic<int> connection_{-1};
    std::atomic<bool> stopping_{false};
    std::thread thread_;
};

// Seconds that each of `count` round trips took: `request_bytes` there, `reply_bytes` back.
// `address` as of ClientConnection. Throws std::runtime_error.
std::vector<double> EchoRoundTrips(const std::string &address, std::size_t request_bytes,
                                   std::size_t reply_bytes, std::size_t count);

}  // namespace kvstore
