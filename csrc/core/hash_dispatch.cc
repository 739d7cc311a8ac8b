#include "core/hash_dispatch.h"

#include <atomic>

namespace kvstore {
namespace {

std::atomic<HashSimdLevel> simd_limit{HashSimdLevel::kBest};

}  // namespace

void SetHashSimdLimit(HashSimdLevel limit) { simd_limit.store(limit, std::memory_order_relaxed); }

HashSimdLevel HashSimdLimit() { return simd_limit.load(std::memory_order_relaxed); }

}  // namespace kvstore
