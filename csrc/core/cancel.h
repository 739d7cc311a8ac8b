// A flag that ends a move from another thread.
#pragma once

#include <atomic>

namespace kvstore {

class CancelFlag {
public:
    void Set() { set_.store(true, std::memory_order_release); }
    bool is_set() const { return set_.load(std::memory_order_acquire); }

private:
    std::atomic<bool> set_{false};
};

}  // namespace kvstore
