// A zero-filled array that asks the kernel for huge pages: an index of millions of blocks is read
// at random places, and with 4 KiB pages every read would also miss the TLB.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <utility>

#include "core/check.h"
#include "core/mapping.h"

namespace kvstore {

template <typename T>
class HugeArray {
public:
    HugeArray() = default;
    explicit HugeArray(std::size_t size) : size_(size), bytes_(RoundUp(size * sizeof(T))) {
        if (bytes_ == 0) return;
        void *memory = MapOnHugeEdge(bytes_, -1);
        KV_CHECK(memory != nullptr);
        madvise(memory, bytes_, MADV_HUGEPAGE);  // advice: without it only slower
        data_ = static_cast<T *>(memory);
    }
    HugeArray(HugeArray &&other) noexcept { swap(other); }
    HugeArray &operator=(HugeArray &&other) noexcept {
        swap(other);
        return *this;
    }
    HugeArray(const HugeArray &) = delete;
    HugeArray &operator=(const HugeArray &) = delete;
    ~HugeArray() {
        if (data_ != nullptr) munmap(data_, bytes_);
    }

    T &operator[](std::size_t i) { return data_[i]; }
    const T &operator[](std::size_t i) const { return data_[i]; }
    std::size_t size() const { return size_; }
    std::size_t bytes() const { return bytes_; }

private:
    static std::size_t RoundUp(std::size_t bytes) { return (bytes + 4095) & ~std::size_t{4095}; }
    void swap(HugeArray &other) {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(bytes_, other.bytes_);
    }

    T *data_ = nullptr;
    std::size_t size_ = 0;
    std::size_t bytes_ = 0;
};

}  // namespace kvstore
