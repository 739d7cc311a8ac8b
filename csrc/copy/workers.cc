#include "copy/workers.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace kvstore {
namespace {

// More threads than this do not raise the bandwidth of one memory controller any further.
constexpr unsigned kMaxHelpers = 15;

// One call of ParallelFor; lives on the caller's stack.
struct Job {
    void (*body)(void *, std::size_t, std::size_t);
    void *context;
    std::size_t items;
    std::size_t grain;
    std::atomic<std::size_t> next{0};
    int wanted = 0;  // helpers that may still join; guarded by Workers::mutex_
    int inside = 0;  // helpers at work; guarded by Workers::mutex_

    void Work() {
        for (;;) {
            const std::size_t begin = next.fetch_add(grain, std::memory_order_relaxed);
            if (begin >= items) return;
            body(context, begin, std::min(items, begin + grain));
        }
    }
};

class Workers {
public:
    const pid_t pid = getpid();

    void Run(Job *job, int helpers) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            Grow(helpers);
            job->wanted = std::min<int>(helpers, static_cast<int>(started_));
            if (job->wanted > 0) jobs_.push_back(job);
        }
        for (int i = 0; i < helpers; ++i) work_.notify_one();
        job->Work();
        std::unique_lock<std::mutex> lock(mutex_);
        Withdraw(job);
        left_.wait(lock, [job] { return job->inside == 0; });
    }

private:
    void Grow(int helpers) {
        const unsigned cores = std::max(1U, std::thread::hardware_concurrency());
        const unsigned limit =
            std::min({kMaxHelpers, cores - 1, static_cast<unsigned>(std::max(0, helpers))});
        while (started_ < limit) {
            try {
                std::thread(&Workers::Loop, this).detach();
            } catch (const std::system_error &) {
                return;  // no more threads to be had: the caller does the work
            }
            ++started_;
        }
    }

    void Withdraw(Job *job) {
        job->wanted = 0;
        jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
    }

    void Loop() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_.wait(lock, [this] { return !jobs_.empty(); });
            Job *job = jobs_.front();
            ++job->inside;
            if (--job->wanted == 0) Withdraw(job);
            lock.unlock();
            job->Work();
            lock.lock();
            if (--job->inside == 0) left_.notify_all();
        }
    }

    std::mutex mutex_;  // guards everything below
    std::condition_variable work_;
    std::condition_variable left_;
    std::vector<Job *> jobs_;  // those that want helpers, oldest first
    unsigned started_ = 0;
};

// Never destroyed: helpers may still wait in it while the process exits. One made before a fork is
// left alone in the child, where its threads do not exist and its mutex may be held for ever.
Workers &TheWorkers() {
    static std::atomic<Workers *> current{nullptr};
    Workers *workers = current.load(std::memory_order_acquire);
    const pid_t pid = getpid();
    while (workers == nullptr || workers->pid != pid) {
        auto *made = new Workers;
        if (current.compare_exchange_strong(workers, made, std::memory_order_acq_rel)) return *made;
        delete made;  // another thread was first; it has not been used yet
    }
    return *workers;
}

}  // namespace

void ParallelFor(std::size_t items, std::size_t grain, int threads,
                 void (*body)(void *context, std::size_t begin, std::size_t end), void *context) {
    if (items == 0) return;
    const std::size_t ranges = (items + grain - 1) / grain;
    const int useful = static_cast<int>(std::min<std::size_t>(ranges, kMaxHelpers + 1));
    if (std::min(threads, useful) <= 1) {
        body(context, 0, items);
        return;
    }
    Job job{body, context, items, grain};
    TheWorkers().Run(&job, std::min(threads, useful) - 1);
}

}  // namespace kvstore
