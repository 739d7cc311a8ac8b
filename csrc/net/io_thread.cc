#include "net/io_thread.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace kvstore {

namespace {

constexpr int kEventsMax = 64;
constexpr int kAcceptsMax = 16;  // a turn
constexpr std::int64_t kSweepNs = 1'000'000'000;
// Out of descriptors: until somebody leaves, accept would only fail again.
constexpr std::int64_t kAcceptPauseNs = 100'000'000;

constexpr std::uint32_t kReading = EPOLLIN | EPOLLRDHUP;
constexpr std::uint32_t kWaitingForOthers = EPOLLRDHUP;
constexpr std::uint32_t kWriting = EPOLLOUT;

}  // namespace

Server::IoThread::~IoThread() {
    for (const Command &command : mailbox_) {
        if (command.fd >= 0) close(command.fd);
    }
    if (epoll_ >= 0) close(epoll_);
    if (wake_ >= 0) close(wake_);
}

bool Server::IoThread::Open(std::string *error) {
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = nullptr;
    if (epoll_ < 0 || wake_ < 0 || epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_, &event) != 0) {
        *error = std::string("epoll: ") + std::strerror(errno);
        return false;
    }
    return true;
}

void Server::IoThread::Wake() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_, &one, sizeof(one));
}

void Server::IoThread::Post(Command command) {
    bool was_empty;
    {
        std::lock_guard lock(mutex_);
        was_empty = mailbox_.empty();
        mailbox_.push_back(std::move(command));
    }
    if (was_empty) Wake();
}

void Server::IoThread::Run() {
    next_sweep_ns_ = SteadyNowNs() + kSweepNs;
    epoll_event events[kEventsMax];
    while (!server_.stopping_.load(std::memory_order_acquire)) {
        const int n = epoll_wait(epoll_, events, kEventsMax, WaitMilliseconds(SteadyNowNs()));
        for (int i = 0; i < n; ++i) {
            auto *source = static_cast<Source *>(events[i].data.ptr);
            if (source == nullptr) {
                TakeCommands();
            } else if (source->is_listener) {
                Accept(static_cast<Listener &>(*source));
            } else {
                Handle(static_cast<Held &>(*source), events[i].events);
            }
        }
        RunReady();
        const std::int64_t now = parked_.empty() && n > 0 ? 0 : SteadyNowNs();
        const bool parked_due = std::any_of(parked_.begin(), parked_.end(), [&](Held *held) {
            return held->connection.parked_until_ns() <= now;
        });
        if (parked_due) RetryParked();
        const std::int64_t sweep_at = now != 0 ? now : SteadyNowNs();
        if (sweep_at >= next_sweep_ns_) Sweep(sweep_at);
        closed_.clear();
    }
    for (auto &[number, held] : connections_) held->connection.Cut();
    server_.num_connections_.fetch_sub(connections_.size());
    connections_.clear();
    for (const auto &listener : listeners_) close(listener->fd);
    listeners_.clear();
}

int Server::IoThread::WaitMilliseconds(std::int64_t now) const {
    if (!ready_.empty()) return 0;
    std::int64_t until = next_sweep_ns_;
    for (const Held *held : parked_) until = std::min(until, held->connection.parked_until_ns());
    for (const auto &listener : listeners_) {
        if (listener->paused_until_ns != 0) until = std::min(until, listener->paused_until_ns);
    }
    return until <= now ? 0 : static_cast<int>((until - now + 999'999) / 1'000'000);
}

void Server::IoThread::TakeCommands() {
    std::uint64_t count;
    [[maybe_unused]] const ssize_t got = read(wake_, &count, sizeof(count));
    std::vector<Command> commands;
    {
        std::lock_guard lock(mutex_);
        commands.swap(mailbox_);
    }
    for (Command &command : commands) Execute(command);
}

void Server::IoThread::Execute(Command &command) {
    if (command.kind == Command::Kind::kListen) {
        auto listener = std::make_unique<Listener>();
        listener->is_listener = true;
        listener->fd = command.fd;
        listener->is_local = command.status != 0;
        epoll_event event{};
        event.events = EPOLLIN;
        event.data.ptr = static_cast<Source *>(listener.get());
        epoll_ctl(epoll_, EPOLL_CTL_ADD, command.fd, &event);
        listeners_.push_back(std::move(listener));
        return;
    }
    if (command.kind == Command::Kind::kServe) {
        Welcome(command.fd, false);
        return;
    }
    if (command.kind == Command::Kind::kAdopt) {
        Adopt(command.fd, command.peer);
        return;
    }
    if (command.kind == Command::Kind::kRetry) {
        RetryParked();
        return;
    }
    const auto it = connections_.find(command.peer.connection);
    if (it == connections_.end()) return;
    Held &held = *it->second;
    if (command.kind == Command::Kind::kAnswer) {
        held.connection.Answer(command.task, command.status, std::move(command.body));
    } else {
        held.connection.HangUp();
    }
    Settle(held);
}

// --- taking connections

void Server::IoThread::Accept(Listener &listener) {
    for (int i = 0; i < kAcceptsMax; ++i) {
        const int fd = accept4(listener.fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            Welcome(fd, listener.is_local);
            continue;
        }
        if (errno == EINTR || errno == ECONNABORTED) continue;
        if (errno == EAGAIN || errno == EWOULDBLOCK) return;
        // Out of descriptors or memory. The connection stays in the backlog.
        epoll_event event{};
        event.data.ptr = static_cast<Source *>(&listener);
        epoll_ctl(epoll_, EPOLL_CTL_MOD, listener.fd, &event);
        listener.paused_until_ns = SteadyNowNs() + kAcceptPauseNs;
        next_sweep_ns_ = std::min(next_sweep_ns_, listener.paused_until_ns);
        return;
    }
}

void Server::IoThread::Welcome(int fd, bool is_local) {
    if (server_.num_connections_.fetch_add(1) >= server_.connections_max_) {
        server_.num_connections_.fetch_sub(1);
        AddTo(server_.services_.counters.connections_refused, 1);
        close(fd);
        return;
    }
    ConfigureSocket(fd, is_local);
    Peer peer;
    peer.connection = server_.services_.roster.NextConnection();
    peer.thread = peer.connection % server_.threads_.size();
    peer.is_local = is_local;
    if (is_local) PeerCredentials(fd, &peer.uid, &peer.pid);
    AddTo(server_.services_.counters.connections_total, 1);
    if (peer.thread == number_) {
        Adopt(fd, peer);
        return;
    }
    Command command;
    command.kind = Command::Kind::kAdopt;
    command.fd = fd;
    command.peer = peer;
    server_.Post(peer.thread, std::move(command));
}

void Server::IoThread::Adopt(int fd, const Peer &peer) {
    auto held = std::make_unique<Held>(server_.services_, fd, peer);
    epoll_event event{};
    event.events = held->interest = kReading;
    event.data.ptr = static_cast<Source *>(held.get());
    if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event) != 0) {
        server_.num_connections_.fetch_sub(1);
        return;
    }
    connections_.emplace(peer.connection, std::move(held));
}

// --- serving them

void Server::IoThread::Handle(Held &held, std::uint32_t events) {
    Connection &connection = held.connection;
    switch (connection.state()) {
        case Connection::State::kReceiving:
            connection.OnReadable();  // sees the peer's end too, after what came before it
            break;
        case Connection::State::kWaiting:
            if ((events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) {
                connection.Close();
            } else {
                SetInterest(held, kWaitingForOthers);
            }
            break;
        case Connection::State::kSending:
            if ((events & (EPOLLHUP | EPOLLERR)) != 0) {
                connection.Close();
            } else {
                connection.OnWritable();
            }
            break;
        case Connection::State::kClosed:
            return;
    }
    Settle(held);
}

// Brings what epoll watches in line with what the connection waits for.
void Server::IoThread::Settle(Held &held) {
    Connection &connection = held.connection;
    if (connection.is_parked()) {
        parked_.insert(&held);
    } else if (!parked_.empty()) {
        parked_.erase(&held);
    }
    switch (connection.state()) {
        case Connection::State::kReceiving:
            SetInterest(held, kReading);
            if (connection.has_buffered_frame() && !held.is_ready) {
                held.is_ready = true;
                ready_.push_back(&held);
            }
            break;
        case Connection::State::kWaiting:
            break;  // most answers come before anything else does: changed when something came
        case Connection::State::kSending:
            SetInterest(held, kWriting);
            break;
        case Connection::State::kClosed: {
            const auto it = connections_.find(connection.peer().connection);
            if (it == connections_.end()) return;
            epoll_ctl(epoll_, EPOLL_CTL_DEL, held.fd, nullptr);
            std::erase(ready_, &held);
            closed_.push_back(std::move(it->second));
            connections_.erase(it);
            server_.num_connections_.fetch_sub(1);
            break;
        }
    }
}

void Server::IoThread::SetInterest(Held &held, std::uint32_t interest) {
    if (held.interest == interest) return;
    held.interest = interest;
    epoll_event event{};
    event.events = interest;
    event.data.ptr = static_cast<Source *>(&held);
    epoll_ctl(epoll_, EPOLL_CTL_MOD, held.fd, &event);
}

// One frame for each connection whose next one had arrived with the last.
void Server::IoThread::RunReady() {
    const std::vector<Held *> turn = std::exchange(ready_, {});
    for (Held *held : turn) held->is_ready = false;
    for (Held *held : turn) {
        held->connection.Turn();
        Settle(*held);
    }
}

void Server::IoThread::RetryParked() {
    const std::vector<Held *> parked(parked_.begin(), parked_.end());
    for (Held *held : parked) {
        held->connection.Retry();
        Settle(*held);
    }
}

void Server::IoThread::Sweep(std::int64_t now) {
    next_sweep_ns_ = now + kSweepNs;
    for (const auto &listener : listeners_) {
        if (listener->paused_until_ns == 0 || listener->paused_until_ns > now) continue;
        listener->paused_until_ns = 0;
        epoll_event event{};
        event.events = EPOLLIN;
        event.data.ptr = static_cast<Source *>(listener.get());
        epoll_ctl(epoll_, EPOLL_CTL_MOD, listener->fd, &event);
    }
    std::vector<Held *> overdue;
    for (const auto &[number, held] : connections_) {
        if (held->connection.deadline_ns() <= now) overdue.push_back(held.get());
    }
    for (Held *held : overdue) {
        held->connection.CloseOverdue();
        Settle(*held);
    }
}

}  // namespace kvstore
