#include "net/bulk_server.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <system_error>
#include <utility>

#include "core/check.h"
#include "core/store_core.h"
#include "net/bulk_session.h"
#include "net/socket.h"

namespace kvstore {

namespace {

constexpr std::int64_t kBurstNs = 10'000'000;
constexpr std::size_t kChunkBytesMin = 4 << 10;
constexpr int kAcceptPauseMs = 20;  // when there is no descriptor for a connection
constexpr int kUserTimeoutMs = 10'000;

// Signals are for the threads of whoever embeds us.
class SignalsBlocked {
public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
};

}  // namespace

// --- the limit

std::size_t Throttle::chunk_bytes() const {
    if (rate_ == 0) return kBulkChunkBytes;
    return std::clamp<std::uint64_t>(rate_ / 100, kChunkBytesMin, kBulkChunkBytes);
}

std::int64_t Throttle::Reserve(std::size_t bytes, std::int64_t now_ns) {
    if (rate_ == 0) return 0;
    const auto cost =
        static_cast<std::int64_t>(static_cast<double>(bytes) * 1e9 / static_cast<double>(rate_));
    const std::lock_guard lock(mutex_);
    next_ns_ = std::max(next_ns_, now_ns - kBurstNs) + cost;
    return next_ns_;
}

// --- the server

struct BulkServer::Held {
    Held(BulkServices &services, int fd) : session(services, fd) {}
    BulkSession session;
    std::atomic<bool> ended{false};
    std::thread thread;
};

BulkServer::BulkServer(Regions &regions, std::string secret, std::uint64_t epoch,
                       std::size_t connections_max, std::uint64_t bytes_per_second)
    : services_(regions, std::move(secret), epoch, bytes_per_second),
      connections_max_(connections_max),
      stop_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    KV_CHECK(stop_fd_ >= 0);
}

BulkServer::~BulkServer() {
    Stop();
    close(stop_fd_);
}

bool BulkServer::Listen(int fd) {
    const std::lock_guard lock(mutex_);
    if (stopping_) {
        errno = EBADF;
        return false;
    }
    const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0) return false;
    fcntl(own, F_SETFL, fcntl(own, F_GETFL) | O_NONBLOCK);
    const SignalsBlocked blocked;
    acceptors_.emplace_back([this, own] { Accept(own); });
    return true;
}

void BulkServer::Accept(int listener) {
    bool full = false;  // of descriptors
    while (true) {
        pollfd ready[2] = {{stop_fd_, POLLIN, 0}, {listener, POLLIN, 0}};
        const int n = poll(ready, full ? 1 : 2, full ? kAcceptPauseMs : -1);
        if (n < 0 && errno != EINTR) break;
        if (n > 0 && ready[0].revents != 0) break;
        const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        full = fd < 0 && errno != EAGAIN && errno != EINTR && errno != ECONNABORTED;
        if (fd >= 0) Welcome(fd);
    }
    close(listener);
}

void BulkServer::Welcome(int fd) {
    ConfigureSocket(fd, false);
    const int timeout = kUserTimeoutMs;
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout, sizeof(timeout));
    const std::lock_guard lock(mutex_);
    Reap();
    if (stopping_ || (held_.size() >= connections_max_ && !MakeRoom())) {
        services_.counters.refused_connections.fetch_add(1);
        close(fd);
        return;
    }
    services_.counters.accepted_connections.fetch_add(1);
    held_.push_back(std::make_unique<Held>(services_, fd));
    Held *held = held_.back().get();
    try {
        held->thread = std::thread([held] {
            held->session.Run();
            held->ended.store(true);
        });
    } catch (const std::system_error &) {  // this process may have no more threads
        services_.counters.refused_connections.fetch_add(1);
        held_.pop_back();
    }
}

// Ends the oldest connection whose peer has not proved itself. REQUIRES: mutex_ is held.
bool BulkServer::MakeRoom() {
    const auto stranger =
        std::find_if(held_.begin(), held_.end(),
                     [](const std::unique_ptr<Held> &held) { return !held->session.is_greeted(); });
    if (stranger == held_.end()) return false;
    (*stranger)->session.Cut();
    (*stranger)->thread.join();  // it only waits for its peer, or says a few bytes
    held_.erase(stranger);
    return true;
}

// Forgets the connections that have ended. REQUIRES: mutex_ is held.
void BulkServer::Reap() {
    held_.remove_if([](const std::unique_ptr<Held> &held) {
        if (!held->ended.load()) return false;
        held->thread.join();
        return true;
    });
}

std::size_t BulkServer::num_connections() {
    const std::lock_guard lock(mutex_);
    Reap();
    return held_.size();
}

void BulkServer::Stop() {
    std::vector<std::thread> acceptors;
    std::list<std::unique_ptr<Held>> held;
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
        const std::uint64_t one = 1;
        KV_CHECK(write(stop_fd_, &one, sizeof(one)) == sizeof(one));
        acceptors.swap(acceptors_);
        held.swap(held_);
    }
    for (std::thread &thread : acceptors) thread.join();
    for (const auto &each : held) each->session.Cut();
    for (const auto &each : held) each->thread.join();
}

}  // namespace kvstore
