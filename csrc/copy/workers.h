// Helper threads for batches of independent items.
//
// Thread safety: ParallelFor may be called from many threads at once. The caller always works too,
// so a call makes progress when every helper is busy. Helpers are bounded, started at first use,
// never joined, and belong to the process that started them: a child of fork() starts its own.
#pragma once

#include <cstddef>

namespace kvstore {

// body(context, begin, end) is called for disjoint ranges that together make [0, items), on at
// most `threads` threads, the caller's among them; returns when all calls have. `grain` is the
// number of items in a range. The body must not call ParallelFor.
void ParallelFor(std::size_t items, std::size_t grain, int threads,
                 void (*body)(void *context, std::size_t begin, std::size_t end), void *context);

}  // namespace kvstore
