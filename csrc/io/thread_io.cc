// The fallback where there is no io_uring: blocking pread and pwrite on a bounded pool of threads.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "io/file.h"

namespace kvstore {
namespace {

constexpr unsigned kMaxThreads = 64;

int Transfer(const IoRequest &request) {
    std::size_t moved = 0;
    while (moved < request.bytes) {
        const off_t at = static_cast<off_t>(request.offset + moved);
        const ssize_t result =
            request.write ? pwrite(request.fd, request.data + moved, request.bytes - moved, at)
                          : pread(request.fd, request.data + moved, request.bytes - moved, at);
        if (result > 0) {
            moved += static_cast<std::size_t>(result);
        } else if (result == 0) {
            return request.write ? EIO : ENODATA;
        } else if (errno != EINTR) {
            return errno;
        }
    }
    return 0;
}

// `run_` serializes batches. `mutex_` guards everything below it; workers take one request at a
// time from the current batch, and the last to finish wakes the caller.
class ThreadIo : public IoQueue {
public:
    explicit ThreadIo(unsigned depth) {
        const unsigned threads = std::min(depth, kMaxThreads);
        try {
            for (unsigned i = 0; i < threads; ++i) workers_.emplace_back([this] { Work(); });
        } catch (const std::system_error &) {
            if (workers_.empty()) throw;  // fewer threads than asked for still do the job
        }
    }

    ~ThreadIo() override {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread &worker : workers_) worker.join();
    }

    const char *kind() const override { return "threads"; }
    unsigned depth() const override { return static_cast<unsigned>(workers_.size()); }

    void Run(const IoRequest *requests, std::size_t n, const OnDone &done) override {
        if (n == 0) return;
        std::lock_guard<std::mutex> turn(run_);
        std::unique_lock<std::mutex> lock(mutex_);
        requests_ = requests;
        count_ = n;
        next_ = 0;
        unfinished_ = n;
        done_ = &done;
        if (n == 1) {
            wake_.notify_one();
        } else {
            wake_.notify_all();
        }
        finished_.wait(lock, [this] { return unfinished_ == 0; });
    }

private:
    void Work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return stopping_ || next_ < count_; });
            if (stopping_) return;
            const std::size_t index = next_++;
            const IoRequest request = requests_[index];
            const OnDone &done = *done_;
            lock.unlock();
            done(index, Transfer(request));
            lock.lock();
            if (--unfinished_ == 0) finished_.notify_one();
        }
    }

    std::mutex run_;
    std::mutex mutex_;
    std::condition_variable wake_, finished_;
    const IoRequest *requests_ = nullptr;
    const OnDone *done_ = nullptr;
    std::size_t count_ = 0, next_ = 0, unfinished_ = 0;
    bool stopping_ = false;
    std::vector<std::thread> workers_;
};

}  // namespace

std::unique_ptr<IoQueue> OpenThreadIo(unsigned depth) { return std::make_unique<ThreadIo>(depth); }

}  // namespace kvstore
