// A byte array that keeps its memory and does not clear what it hands out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

namespace kvstore {

class ByteBuffer {
public:
    std::uint8_t *data() { return data_.get(); }
    const std::uint8_t *data() const { return data_.get(); }
    std::size_t capacity() const { return capacity_; }

    // Makes room for `bytes`, keeping the first `kept`. REQUIRES: kept <= capacity().
    void Grow(std::size_t bytes, std::size_t kept) {
        if (bytes <= capacity_) return;
        std::unique_ptr<std::uint8_t[]> larger(new std::uint8_t[bytes]);
        if (kept > 0) std::memcpy(larger.get(), data_.get(), kept);
        data_ = std::move(larger);
        capacity_ = bytes;
    }
    void Free() {
        data_.reset();
        capacity_ = 0;
    }

private:
    std::unique_ptr<std::uint8_t[]> data_;
    std::size_t capacity_ = 0;
};

}  // namespace kvstore
