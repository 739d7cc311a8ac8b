#include "net/server.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <utility>

#include "core/check.h"
#include "net/io_thread.h"

namespace kvstore {

namespace {

// Between two looks at parked requests, should a change have gone unseen.
constexpr std::int64_t kWatchNs = 100'000'000;
constexpr std::int64_t kDrainPollNs = 2'000'000;
// Between two wake-ups of parked requests: those that take room and give it back wake each other.
constexpr std::chrono::milliseconds kWakePause(1);

}  // namespace

Server::Server(StoreCore &core, std::size_t threads, std::size_t connections_max,
               std::size_t tasks_max)
    : services_(core, tasks_max), connections_max_(connections_max) {
    KV_CHECK(threads > 0);
    core.Why(0, BlockHash{});  // from now on it remembers what was evicted
    for (std::size_t i = 0; i < threads; ++i) {
        threads_.push_back(std::make_unique<IoThread>(*this, i));
    }
}

Server::~Server() { Stop(); }

bool Server::Start(std::string *error) {
    for (const auto &thread : threads_) {
        if (thread->Open(error)) continue;
        std::lock_guard lock(mutex_);
        stopped_ = true;  // nothing to join
        return false;
    }
    for (const auto &thread : threads_) thread->Start();
    watcher_ = std::thread([this] { Watch(); });
    return true;
}

bool Server::Listen(int fd, bool is_local) {
    std::lock_guard lock(mutex_);
    if (stopped_) {
        errno = EBADF;
        return false;
    }
    const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0) return false;
    fcntl(own, F_SETFL, fcntl(own, F_GETFL) | O_NONBLOCK);
    Command command;
    command.kind = Command::Kind::kListen;
    command.fd = own;
    command.status = is_local ? 1 : 0;
    Post(0, std::move(command));
    return true;
}

bool Server::Serve(int fd) {
    std::lock_guard lock(mutex_);
    if (stopped_) {
        close(fd);
        return false;
    }
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    Command command;
    command.kind = Command::Kind::kServe;
    command.fd = fd;
    Post(0, std::move(command));
    return true;
}

void Server::Post(std::size_t thread, Command command) {
    threads_[thread]->Post(std::move(command));
}

std::unique_ptr<Task> Server::NextTask(std::int64_t deadline_ns) {
    while (true) {
        std::unique_ptr<Task> task = services_.tasks.Pop(deadline_ns);
        // Nobody waits for the answer of one that has gone.
        if (task == nullptr || task->id == 0 || services_.roster.IsPending(task->id)) return task;
    }
}

bool Server::Reply(std::uint64_t task, std::uint8_t status, std::vector<std::uint8_t> body) {
    Command command;
    if (!services_.roster.TakePending(task, &command.peer)) return false;
    command.kind = Command::Kind::kAnswer;
    command.task = task;
    command.status = status;
    command.body = std::move(body);
    const std::size_t thread = command.peer.thread;
    Post(thread, std::move(command));
    return true;
}

void Server::HangUp(std::uint64_t connection) {
    Command command;
    if (!services_.roster.Find(connection, &command.peer)) return;
    command.kind = Command::Kind::kHangUp;
    const std::size_t thread = command.peer.thread;
    Post(thread, std::move(command));
}

// Wakes parked requests when a block became ready or room was made.
void Server::Watch() {
    std::uint64_t seen = services_.core.ChangeCount();
    while (services_.WaitForParked()) {
        const std::uint64_t now = services_.core.WaitForChange(seen, SteadyNowNs() + kWatchNs);
        if (now == seen) continue;
        for (const auto &thread : threads_) thread->Post(Command{});
        std::this_thread::sleep_for(kWakePause);
        seen = now;
    }
}

bool Server::Drain(std::int64_t deadline_ns) {
    services_.draining.store(true);
    while (services_.core.Stats().reservations > 0) {
        const std::int64_t now = SteadyNowNs();
        if (now >= deadline_ns) return false;
        const std::uint64_t seen = services_.core.ChangeCount();
        services_.core.WaitForChange(seen, std::min(deadline_ns, now + kDrainPollNs));
    }
    return true;
}

void Server::Stop() {
    std::lock_guard lock(mutex_);
    if (stopped_) return;
    stopped_ = true;
    services_.stopping.store(true);
    stopping_.store(true, std::memory_order_release);
    services_.tasks.Stop();
    services_.StopWaiting();
    for (const auto &thread : threads_) thread->Wake();
    for (const auto &thread : threads_) thread->Join();
    watcher_.join();
}

}  // namespace kvstore
