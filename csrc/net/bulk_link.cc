#include "net/bulk_link.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <system_error>
#include <thread>
#include <utility>

#include "core/store_core.h"
#include "net/frame.h"

namespace kvstore {

namespace {

using Kind = ClientFailure::Kind;
using End = BulkConnection::End;

// Less than this is not worth another connection and its thread.
constexpr std::uint64_t kStripeBytesMin = 8 << 20;
constexpr std::size_t kStripesMax = 4;
// Moves of several threads at a time find a connection each, up to so many.
constexpr std::size_t kConnectionsMin = 8;
constexpr std::size_t kUnsettledMax = 64;
constexpr std::int64_t kFlagNs = 5'000'000;
// What connections in use have to notice that the link is closed.
constexpr std::int64_t kCloseNs = 1'000'000'000;
constexpr double kYearSeconds = 366.0 * 24 * 3600;

// One core moves what one connection carries; the peer's part is done by others.
std::size_t UsefulStripes() {
    const std::size_t cores = std::max(1u, std::thread::hardware_concurrency());
    return std::clamp<std::size_t>(cores / 2, 1, kStripesMax);
}

}  // namespace

BulkLink::BulkLink(const std::string &address, std::string secret, std::uint64_t epoch,
                   double timeout_seconds, std::size_t connections, InterruptedHook interrupted)
    : address_(address),
      secret_(std::move(secret)),
      epoch_(epoch),
      timeout_ns_(std::max<std::int64_t>(DeadlineAfter(0, timeout_seconds), 1'000'000)),
      stripes_(connections > 0 ? connections : UsefulStripes()),
      connections_max_(std::max(stripes_, kConnectionsMin)),
      interrupted_(interrupted) {
    Return(Borrow(SteadyNowNs() + timeout_ns_, nullptr, true));
}

BulkLink::~BulkLink() { Close(); }

// --- connections

std::unique_ptr<BulkConnection> BulkLink::Open(std::int64_t deadline_ns) {
    try {
        auto connection = std::make_unique<BulkConnection>(
            address_, secret_, epoch_, timeout_ns_,
            std::min(deadline_ns, SteadyNowNs() + timeout_ns_), interrupted_);
        const std::lock_guard lock(mutex_);
        if (closed_.is_set()) throw ClientFailure(Kind::kConnection, address_ + ": closed");
        lost_ = false;
        return connection;
    } catch (const ClientFailure &failure) {
        const std::lock_guard lock(mutex_);
        --num_open_;
        lost_ = lost_ || failure.kind != Kind::kInterrupted;
        is_another_ = is_another_ || (failure.kind == Kind::kRemote &&
                                      failure.status == static_cast<int>(Status::kIncompatible));
        returned_.notify_all();
        throw;
    }
}

// Null when none is free until the deadline, or the flag was set. Throws ClientFailure.
std::unique_ptr<BulkConnection> BulkLink::Borrow(std::int64_t deadline_ns,
                                                 const CancelFlag *cancelled, bool may_wait) {
    std::unique_lock lock(mutex_);
    while (true) {
        if (closed_.is_set()) throw ClientFailure(Kind::kConnection, address_ + ": closed");
        if (is_another_) {
            throw ClientFailure(Kind::kRemote, address_ + ": the peer was started anew",
                                static_cast<int>(Status::kIncompatible));
        }
        while (!idle_.empty()) {
            std::unique_ptr<BulkConnection> connection = std::move(idle_.back());
            idle_.pop_back();
            if (connection->IsOpen()) return connection;
            --num_open_;
            lost_ = true;
        }
        if (num_open_ < connections_max_) {
            ++num_open_;
            lock.unlock();
            return Open(deadline_ns);
        }
        const std::int64_t now = SteadyNowNs();
        if (!may_wait || now >= deadline_ns || (cancelled != nullptr && cancelled->is_set())) {
            return nullptr;
        }
        returned_.wait_until(lock, std::chrono::steady_clock::time_point(std::chrono::nanoseconds(
                                       std::min(deadline_ns, now + kFlagNs))));
    }
}

void BulkLink::Return(std::unique_ptr<BulkConnection> connection) {
    const std::lock_guard lock(mutex_);
    if (closed_.is_set()) {
        --num_open_;
    } else {
        idle_.push_back(std::move(connection));
    }
    returned_.notify_all();
}

// After anything went wrong on it.
void BulkLink::Discard(std::unique_ptr<BulkConnection> connection, bool is_lost) {
    const std::lock_guard lock(mutex_);
    if (!connection->is_settled()) {
        settled_.store(false);
        // Of one more nobody will know when it is settled.
        if (unsettled_.size() < kUnsettledMax) {
            unsettled_.push_back(std::move(connection));
        } else {
            forgot_ = true;
        }
    }
    --num_open_;
    lost_ = lost_ || is_lost;
    returned_.notify_all();
}

bool BulkLink::is_alive() {
    const std::lock_guard lock(mutex_);
    if (closed_.is_set() || is_another_) return false;
    const auto gone = std::remove_if(idle_.begin(), idle_.end(),
                                     [](const auto &each) { return !each->IsOpen(); });
    if (gone != idle_.end()) {
        num_open_ -= static_cast<std::size_t>(idle_.end() - gone);
        idle_.erase(gone, idle_.end());
        lost_ = true;
    }
    return !lost_;
}

bool BulkLink::Close() {
    std::unique_lock lock(mutex_);
    closed_.Set();
    num_open_ -= idle_.size();
    idle_.clear();
    returned_.notify_all();
    const bool ended = returned_.wait_for(lock, std::chrono::nanoseconds(kCloseNs),
                                          [&] { return num_open_ == 0; });
    const auto now = std::remove_if(unsettled_.begin(), unsettled_.end(),
                                    [](const auto &each) { return each->TrySettle(0); });
    unsettled_.erase(now, unsettled_.end());
    settled_.store(unsettled_.empty() && !forgot_);
    return ended && settled_.load();
}

// --- moves

BulkBytes BulkLink::Info(double timeout_seconds) {
    const std::int64_t deadline = DeadlineAfter(SteadyNowNs(), timeout_seconds, kYearSeconds);
    std::unique_ptr<BulkConnection> connection = Borrow(deadline, nullptr, true);
    if (connection == nullptr) {
        throw ClientFailure(Kind::kTimeout, address_ + ": all connections are in use");
    }
    try {
        BulkBytes info = connection->Info(deadline);
        Return(std::move(connection));
        return info;
    } catch (const ClientFailure &failure) {
        Discard(std::move(connection), failure.kind != Kind::kInterrupted);
        throw;
    }
}

// Carries a part of the move over one more connection.
BulkConnection::End BulkLink::Carry(BulkMove &move, bool may_wait) {
    std::unique_ptr<BulkConnection> connection;
    try {
        connection = Borrow(move.deadline_ns, move.cancelled, may_wait);
    } catch (const ClientFailure &failure) {
        if (failure.kind == Kind::kInterrupted) return End::kInterrupted;
        if (failure.kind == Kind::kRemote) return End::kRefused;
        return SteadyNowNs() >= move.deadline_ns ? End::kLate : End::kLost;
    }
    if (connection == nullptr) {
        return SteadyNowNs() >= move.deadline_ns ? End::kLate : End::kCancelled;
    }
    const End end = connection->Run(move);
    if (end == End::kDone) {
        Return(std::move(connection));
    } else {
        const bool is_lost = end == End::kLost || connection->is_silent();
        Discard(std::move(connection), is_lost);
    }
    return end;
}

void BulkLink::Move(const BulkBatch &batch, double timeout_seconds, const CancelFlag *cancelled) {
    BulkMove move(batch, DeadlineAfter(SteadyNowNs(), timeout_seconds, kYearSeconds), cancelled,
                  &closed_);
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < batch.n; ++i) {
        bytes += std::min(batch.lengths[i], kBulkPieceBytesMax);
    }
    const std::size_t stripes = std::clamp<std::uint64_t>(bytes / kStripeBytesMin, 1, stripes_);
    std::vector<std::thread> extra;
    for (std::size_t i = 1; i < stripes; ++i) {
        try {
            extra.emplace_back([&] { Carry(move, false); });
        } catch (const std::system_error &) {
            break;  // no more threads here: those that there are carry it all
        }
    }
    const End end = Carry(move, true);
    if (end == End::kInterrupted || end == End::kCancelled) move.Stop();
    for (std::thread &thread : extra) thread.join();
    // What nobody took: those who might have are gone.
    BulkMove::Range left;
    while (move.Take(&left)) {
        std::fill_n(batch.statuses + left.first, left.n, StatusOf(end));
    }
    if (end == End::kInterrupted) {
        throw ClientFailure(Kind::kInterrupted, address_ + ": interrupted");
    }
}

}  // namespace kvstore
