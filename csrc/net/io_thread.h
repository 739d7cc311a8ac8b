// One thread of the server, its epoll instance and its connections.
//
// Thread safety: Post may be called from any thread; the rest runs on the thread itself.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "net/connection.h"
#include "net/server.h"
#include "net/socket.h"

namespace kvstore {

struct Server::Command {
    enum class Kind { kListen, kServe, kAdopt, kAnswer, kHangUp, kRetry };
    Kind kind = Kind::kRetry;
    int fd = -1;  // kListen, kServe, kAdopt
    Peer peer{};  // kAdopt; its connection for kAnswer and kHangUp
    std::uint64_t task = 0;
    std::uint8_t status = 0;
    std::vector<std::uint8_t> body{};
};

class Server::IoThread {
public:
    IoThread(Server &server, std::size_t number) : server_(server), number_(number) {}
    ~IoThread();

    bool Open(std::string *error);
    void Start() {
        thread_ = std::thread([this] { Run(); });
    }
    void Join() { thread_.join(); }
    void Post(Command command);
    void Wake();

private:
    struct Source {
        bool is_listener = false;
        int fd = -1;
    };
    struct Listener : Source {
        bool is_local = false;
        std::int64_t paused_until_ns = 0;
    };
    struct Held : Source {
        Held(Services &services, int socket, const Peer &peer)
            : channel(socket), connection(services, channel, peer) {
            fd = socket;
        }
        SocketChannel channel;
        Connection connection;  // goes before its channel
        std::uint32_t interest = 0;
        bool is_ready = false;
    };

    void Run();
    void TakeCommands();
    void Execute(Command &command);
    void Accept(Listener &listener);
    void Welcome(int fd, bool is_local);
    void Adopt(int fd, const Peer &peer);
    void Handle(Held &held, std::uint32_t events);
    void Settle(Held &held);
    void SetInterest(Held &held, std::uint32_t interest);
    void RunReady();
    void RetryParked();
    void Sweep(std::int64_t now);
    int WaitMilliseconds(std::int64_t now) const;

    Server &server_;
    const std::size_t number_;
    int epoll_ = -1;
    int wake_ = -1;
    std::thread thread_;
    std::mutex mutex_;
    std::vector<Command> mailbox_;  // guarded by mutex_
    std::vector<std::unique_ptr<Listener>> listeners_;
    std::unordered_map<std::uint64_t, std::unique_ptr<Held>> connections_;
    std::unordered_set<Held *> parked_;
    std::vector<Held *> ready_;
    // Closed in this round; their events may still be in the batch that is being handled.
    std::vector<std::unique_ptr<Held>> closed_;
    std::int64_t next_sweep_ns_ = 0;
};

}  // namespace kvstore
