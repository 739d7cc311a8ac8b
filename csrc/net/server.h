// The daemon's server: threads with an epoll instance each; a connection belongs to one of them.
//
// Requests are answered on these threads: a call into the core takes microseconds. They never run
// Python; what Python is to answer waits in the task queue.
//
// Bounds: connections_max connections (more are closed at once), tasks_max tasks (more are
// refused), one frame a turn for each connection. A greeting must be over within 10 s.
//
// Thread safety: all methods may be called from any thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "net/services.h"

namespace kvstore {

class Server {
public:
    // `core` must outlive the server.
    Server(StoreCore &core, std::size_t threads, std::size_t connections_max,
           std::size_t tasks_max);
    ~Server();
    Server(const Server &) = delete;
    Server &operator=(const Server &) = delete;

    // False, with `error`, when the threads' descriptors could not be had.
    bool Start(std::string *error);
    // Takes connections from a bound, listening socket, which is duplicated. False, with errno,
    // when that fails or the server has stopped.
    bool Listen(int fd, bool is_local);
    // Serves a connected socket as one that came over TCP: what its other end is, the caller knows.
    // It is the server's from now on, also when this fails. False when the server has stopped.
    bool Serve(int fd);

    // Null when none came until the deadline (steady clock), and after Stop().
    std::unique_ptr<Task> NextTask(std::int64_t deadline_ns);
    // Answers a task. False when nobody waits for it any more.
    bool Reply(std::uint64_t task, std::uint8_t status, std::vector<std::uint8_t> body);
    void HangUp(std::uint64_t connection);

    // Refuses new reservations from now on and waits until none is open; false at the deadline.
    bool Drain(std::int64_t deadline_ns);
    // Closes all connections and ends their clients. Idempotent.
    void Stop();

    Services &services() { return services_; }

private:
    class IoThread;
    struct Command;

    void Watch();
    void Post(std::size_t thread, Command command);

    Services services_;
    const std::size_t connections_max_;
    std::atomic<std::size_t> num_connections_{0};
    std::vector<std::unique_ptr<IoThread>> threads_;
    std::thread watcher_;
    std::mutex mutex_;  // of stopping
    std::atomic<bool> stopping_{false};
    bool stopped_ = false;
};

}  // namespace kvstore
