// How long answers took: counts in log-spaced buckets.
//
// Thread safety: everything is a relaxed atomic; a reader may see a count before its sum.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace kvstore {

class LatencyHistogram {
public:
    // Upper bounds in seconds; one more bucket takes what is longer.
    static constexpr std::array<double, 22> kBounds = {
        1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3,
        5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1,    2,    5,    10};

    void Add(std::int64_t ns) {
        const double seconds = static_cast<double>(ns) * 1e-9;
        std::size_t bucket = 0;
        while (bucket < kBounds.size() && seconds > kBounds[bucket]) ++bucket;
        counts_[bucket].fetch_add(1, std::memory_order_relaxed);
        sum_ns_.fetch_add(ns > 0 ? static_cast<std::uint64_t>(ns) : 0, std::memory_order_relaxed);
    }
    std::array<std::uint64_t, kBounds.size() + 1> Counts() const {
        std::array<std::uint64_t, kBounds.size() + 1> counts{};
        for (std::size_t i = 0; i < counts.size(); ++i) {
            counts[i] = counts_[i].load(std::memory_order_relaxed);
        }
        return counts;
    }
    double SumSeconds() const {
        return static_cast<double>(sum_ns_.load(std::memory_order_relaxed)) * 1e-9;
    }

private:
    std::array<std::atomic<std::uint64_t>, kBounds.size() + 1> counts_{};
    std::atomic<std::uint64_t> sum_ns_{0};
};

}  // namespace kvstore
