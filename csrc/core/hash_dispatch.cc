#include "core/hash_dispatch.h"

#include <atomic>

namespace kvstore {
namespace {

std::atomic<SimdLevel> simd_limit{SimdLevel::kBest};

}  // namespace

void SetHashSimdLimit(SimdLevel limit) { simd_limit.store(limit, std::memory_order_relaxed); }

SimdLevel HashSimdLimit() { return simd_limit.load(std::memory_order_relaxed); }

}  // namespace kvstore
