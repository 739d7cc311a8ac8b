// Requests that Python answers, and notices to it, in the order in which they came.
//
// Bounded in tasks and in bytes of their bodies.
//
// Thread safety: one mutex guards the queue; all methods may be called from any thread.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "core/types.h"

namespace kvstore {

// Kinds of tasks beyond the operations of the protocol. None of them is replied to.
inline constexpr std::uint8_t kNoticeStored = 200;    // body: the chain that was put
inline constexpr std::uint8_t kNoticePrefetch = 201;  // body: what is available of a chain
inline constexpr std::uint8_t kNoticeUsed = 202;      // body: what was acquired of a chain
inline constexpr std::uint8_t kGone = 203;            // the client's last connection closed

struct Task {
    std::uint64_t id = 0;
    std::uint8_t kind = 0;
    std::uint64_t connection = 0;
    std::uint64_t client = 0;  // 0: not admitted yet
    std::uint64_t owner = 0;
    std::int64_t namespace_id = -1;
    std::vector<std::uint8_t> body;
    std::int64_t received_ns = 0;
    int peer_uid = -1;
    int peer_pid = -1;
    bool is_local = false;
};

class TaskQueue {
public:
    static constexpr std::size_t kBytesMax = 256u << 20;

    explicit TaskQueue(std::size_t tasks_max) : tasks_max_(tasks_max) {}

    // False when the queue is full; `always` is for kinds that are bounded by other means.
    bool Push(std::unique_ptr<Task> task, bool always) {
        {
            std::lock_guard lock(mutex_);
            const std::size_t bytes = task->body.size();
            const bool full =
                tasks_.size() >= tasks_max_ || (bytes > 0 && bytes_ + bytes > kBytesMax);
            if (stopped_ || (full && !always)) return false;
            bytes_ += bytes;
            tasks_.push_back(std::move(task));
        }
        pushed_.notify_one();
        return true;
    }
    // Null when none came until the deadline (steady clock), and after Stop().
    std::unique_ptr<Task> Pop(std::int64_t deadline_ns) {
        const std::chrono::steady_clock::time_point deadline{std::chrono::nanoseconds(deadline_ns)};
        std::unique_lock lock(mutex_);
        pushed_.wait_until(lock, deadline, [&] { return stopped_ || !tasks_.empty(); });
        if (stopped_ || tasks_.empty()) return nullptr;
        std::unique_ptr<Task> task = std::move(tasks_.front());
        tasks_.pop_front();
        bytes_ -= task->body.size();
        return task;
    }
    void Stop() {
        {
            std::lock_guard lock(mutex_);
            stopped_ = true;
        }
        pushed_.notify_all();
    }
    std::size_t size() const {
        std::lock_guard lock(mutex_);
        return tasks_.size();
    }

private:
    const std::size_t tasks_max_;
    mutable std::mutex mutex_;
    std::condition_variable pushed_;
    std::deque<std::unique_ptr<Task>> tasks_;
    std::size_t bytes_ = 0;
    bool stopped_ = false;
};

}  // namespace kvstore
