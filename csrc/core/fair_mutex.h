// A reader-writer lock at which everybody queues. At a std::shared_mutex whoever reads passes those
// who wait to write: two threads that read in a loop kept a writer out for seconds; and one that
// prefers writers does the same to readers.
//
// A thread that holds it for reading must not take it for reading again: with a writer in between
// it would wait for itself.
#pragma once

#include <mutex>
#include <shared_mutex>

namespace kvstore {

class FairMutex {
public:
    void lock() {
        const std::lock_guard<std::mutex> turn(queue_);
        mutex_.lock();
    }
    bool try_lock() {
        const std::unique_lock<std::mutex> turn(queue_, std::try_to_lock);
        return turn.owns_lock() && mutex_.try_lock();
    }
    void unlock() { mutex_.unlock(); }
    void lock_shared() {
        const std::lock_guard<std::mutex> turn(queue_);
        mutex_.lock_shared();
    }
    void unlock_shared() { mutex_.unlock_shared(); }

private:
    std::mutex queue_;  // held by the one whose turn is next
    std::shared_mutex mutex_;
};

}  // namespace kvstore
