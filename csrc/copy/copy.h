// Moves batches of blocks between an engine's paged tensors and contiguous canonical blocks,
// computing XXH3-64 of the payload on the way: one pass over the bytes, not two.
//
// Batches of at least kStreamingBatchBytes are written with non-temporal stores: they do not read
// the destination's lines first, which took memcpy's time down to 0.6 where the buffers exceed the
// caches. Smaller ones stay in the cache for whoever reads them next.
//
// Thread safety: all functions may be called from any thread; the GIL must not be held. Helper
// threads are started at the first batch that can use them and live as long as the process; after
// fork() the child starts its own at its first such batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "copy/plan.h"

namespace kvstore {

// Past a core's L2, from where on stores through the cache only displace other lines.
inline constexpr std::uint64_t kStreamingBatchBytes = 1 << 20;

// XXH3-64, seed 0, default secret: the same value as the reference implementation.
std::uint64_t Xxh3(const void *data, std::size_t bytes);

// Copies `bytes` and returns XXH3-64 of them. The buffers must not overlap.
std::uint64_t CopyWithChecksum(void *to, const void *from, std::size_t bytes);

// blocks[i] <- engine block ids[i]; checksums[i] is set where `checksums` is not null.
// `threads` is an upper bound; small batches stay on the calling thread.
// REQUIRES: every id in [0, plan.num_blocks); blocks do not overlap.
void GatherBlocks(const CopyPlan &plan, const std::int64_t *ids, std::uint8_t *const *blocks,
                  std::size_t n, std::uint64_t *checksums, int threads);

// engine block ids[i] <- blocks[i]; checksums[i], where asked for, is that of the bytes read.
void ScatterBlocks(const CopyPlan &plan, const std::int64_t *ids, const std::uint8_t *const *blocks,
                   std::size_t n, std::uint64_t *checksums, int threads);

// The same for the payload bytes [begin, end) of every block only, without checksums: for engines
// that fill a reserved block layer by layer. `blocks` points to whole canonical blocks.
// REQUIRES: begin <= end <= plan.block_bytes.
void GatherRange(const CopyPlan &plan, const std::int64_t *ids, std::uint8_t *const *blocks,
                 std::size_t n, std::uint64_t begin, std::uint64_t end, int threads);
void ScatterRange(const CopyPlan &plan, const std::int64_t *ids, const std::uint8_t *const *blocks,
                  std::size_t n, std::uint64_t begin, std::uint64_t end, int threads);

// checksums[i] <- XXH3-64 of `bytes` bytes at blocks[i].
void ChecksumBlocks(const std::uint8_t *const *blocks, std::size_t n, std::size_t bytes,
                    std::uint64_t *checksums, int threads);

}  // namespace kvstore
