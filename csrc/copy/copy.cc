#include "copy/copy.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "copy/workers.h"
#include "copy/xxh3.h"
#include "core/check.h"

namespace kvstore {
namespace {

// Below this a batch costs less than waking a helper.
constexpr std::uint64_t kParallelBatchBytes = 1 << 20;
// A helper takes this much at a time: small enough to share the work evenly.
constexpr std::uint64_t kGrainBytes = 256 << 10;
// Bytes copied before they are hashed out of L1, where pieces are not whole stripes.
constexpr std::uint64_t kTileBytes = 8 << 10;
// Short pieces are taken in groups of this much, with the lines of those that follow under way.
constexpr std::uint64_t kGroupBytes = 2 << 10;
constexpr std::uint64_t kPrefetchBytes = 1 << 10;

template <bool kGather>
struct Batch {
    using BlockPointer = std::conditional_t<kGather, std::uint8_t *, const std::uint8_t *>;

    const CopyPlan &plan;
    const std::int64_t *ids;
    BlockPointer const *blocks;
    std::uint64_t *checksums;
    std::uint64_t begin;  // payload range
    std::uint64_t end;
    StoreMode mode;
};

template <bool kGather>
PieceRun Between(std::uint8_t *engine, std::int64_t engine_stride,
                 typename Batch<kGather>::BlockPointer block, std::uint64_t piece_stride,
                 std::size_t bytes, std::size_t count) {
    const auto block_stride = static_cast<std::ptrdiff_t>(piece_stride);
    if constexpr (kGather) return {block, engine, block_stride, engine_stride, bytes, count};
    if constexpr (!kGather) return {engine, block, engine_stride, block_stride, bytes, count};
}

// Asks for the engine's lines of a block's short pieces, in payload order.
class Prefetcher {
public:
    Prefetcher(const CopyPlan &plan, std::int64_t id) : plan_(plan), id_(id) {}

    // Continues up to payload offset `end`.
    void Advance(std::uint64_t end) {
        for (; run_ < plan_.runs.size(); ++run_, piece_ = 0) {
            const Run &run = plan_.runs[run_];
            for (; piece_ < run.count; ++piece_) {
                if (run.block_offset + piece_ * run.piece_stride >= end) return;
                if (run.bytes >= kPrefetchPieceBytes) break;
                const std::uint8_t *piece =
                    plan_.EngineAddress(run_, id_) + piece_ * run.engine_stride;
                for (std::uint32_t at = 0; at < run.bytes; at += 64) __builtin_prefetch(piece + at);
            }
        }
    }

private:
    const CopyPlan &plan_;
    std::int64_t id_;
    std::size_t run_ = 0;
    std::uint32_t piece_ = 0;
};

// Calls take(PieceRun) for all pieces of batch block i, in the order of the plan.
template <bool kGather, typename Take>
void ForPieces(const Batch<kGather> &batch, std::size_t i, const Take &take) {
    const std::int64_t id = batch.ids[i];
    Prefetcher prefetcher(batch.plan, id);
    for (std::size_t r = 0; r < batch.plan.runs.size(); ++r) {
        const Run &run = batch.plan.runs[r];
        std::uint8_t *engine = batch.plan.EngineAddress(r, id);
        const bool in_groups = kGather && run.bytes < kPrefetchPieceBytes;
        const std::uint64_t group =
            in_groups ? std::max<std::uint64_t>(1, kGroupBytes / run.bytes) : run.count;
        for (std::uint64_t p = 0; p < run.count; p += group) {
            const std::uint64_t offset = run.block_offset + p * run.piece_stride;
            const std::uint64_t count = std::min(group, run.count - p);
            if (in_groups) prefetcher.Advance(offset + count * run.piece_stride + kPrefetchBytes);
            take(Between<kGather>(engine + static_cast<std::int64_t>(p) * run.engine_stride,
                                  run.engine_stride, batch.blocks[i] + offset, run.piece_stride,
                                  run.bytes, count));
        }
    }
}

template <bool kGather>
void CopyWhole(const Batch<kGather> &batch, std::size_t i) {
    ForPieces<kGather>(batch, i, [&](const PieceRun &run) { CopyPieces(run, batch.mode); });
}

// Hashes the bytes while they are in registers. REQUIRES: plan.in_order and plan.whole_stripes.
template <bool kGather>
std::uint64_t CopyFused(const Batch<kGather> &batch, std::size_t i) {
    const std::uint64_t block_bytes = batch.plan.block_bytes;
    Xxh3Stream stream(block_bytes);
    ForPieces<kGather>(batch, i, [&](const PieceRun &run) { stream.CopyUpdate(run, batch.mode); });
    return stream.Finish(batch.blocks[i] + block_bytes - kStripeBytes);
}

// Copies a tile, then hashes it out of the cache. REQUIRES: plan.in_order.
template <bool kGather>
std::uint64_t CopyTiled(const Batch<kGather> &batch, std::size_t i) {
    const CopyPlan &plan = batch.plan;
    Xxh3Stream stream(plan.block_bytes);
    const std::uint8_t *block = batch.blocks[i];
    std::uint64_t copied = 0;
    const auto hash_tile = [&] {
        std::uint64_t bytes = copied - stream.bytes_done();
        if (copied < plan.block_bytes) bytes -= bytes % kStripeBytes;
        if (bytes > 0) stream.Update(block + stream.bytes_done(), bytes);
    };
    for (std::size_t r = 0; r < plan.runs.size(); ++r) {
        const Run &run = plan.runs[r];
        for (std::uint32_t p = 0; p < run.count; ++p) {
            std::uint8_t *engine = plan.EngineAddress(r, batch.ids[i]) + p * run.engine_stride;
            for (std::uint64_t at = 0; at < run.bytes;) {
                const std::uint64_t bytes = std::min<std::uint64_t>(kTileBytes, run.bytes - at);
                CopyPieces(Between<kGather>(engine + at, 0, batch.blocks[i] + copied, 0, bytes, 1),
                           StoreMode::kCached);
                at += bytes;
                copied += bytes;
                if (copied - stream.bytes_done() >= kTileBytes) hash_tile();
            }
        }
    }
    hash_tile();
    return stream.Finish(block + plan.block_bytes - kStripeBytes);
}

// Copies the part of a piece, or of each of `count` pieces, that lies in the batch's range.
template <bool kGather>
void CopyRunRange(const Batch<kGather> &batch, std::size_t i, std::size_t r) {
    const Run &run = batch.plan.runs[r];
    const auto copy = [&](std::uint64_t first, std::uint64_t skip, std::uint64_t bytes,
                          std::uint64_t count) {
        const auto index = static_cast<std::int64_t>(first);
        std::uint8_t *engine =
            batch.plan.EngineAddress(r, batch.ids[i]) + index * run.engine_stride + skip;
        CopyPieces(
            Between<kGather>(engine, run.engine_stride,
                             batch.blocks[i] + run.block_offset + first * run.piece_stride + skip,
                             run.piece_stride, bytes, count),
            batch.mode);
    };
    const std::uint64_t last = run.block_offset + (run.count - 1) * run.piece_stride;
    if (batch.begin <= run.block_offset && batch.end >= last + run.bytes) {
        copy(0, 0, run.bytes, run.count);
        return;
    }
    for (std::uint64_t p = 0; p < run.count; ++p) {
        const std::uint64_t offset = run.block_offset + p * run.piece_stride;
        const std::uint64_t from = std::max(batch.begin, offset);
        const std::uint64_t to = std::min(batch.end, offset + run.bytes);
        if (from < to) copy(p, from - offset, to - from, 1);
    }
}

template <bool kGather>
void CopyRangeOfBlock(const Batch<kGather> &batch, std::size_t i) {
    const std::vector<Run> &runs = batch.plan.runs;
    auto run = runs.begin();
    if (batch.plan.in_order) {
        run = std::upper_bound(runs.begin(), runs.end(), batch.begin,
                               [](std::uint64_t at, const Run &r) { return at < r.block_offset; });
        if (run != runs.begin()) --run;
    }
    for (; run != runs.end() && run->block_offset < batch.end; ++run) {
        CopyRunRange<kGather>(batch, i, static_cast<std::size_t>(run - runs.begin()));
    }
}

template <bool kGather>
void CopyBlock(const Batch<kGather> &batch, std::size_t i) {
    const CopyPlan &plan = batch.plan;
    if (batch.end - batch.begin < plan.block_bytes) {
        CopyRangeOfBlock<kGather>(batch, i);
    } else if (batch.checksums == nullptr) {
        CopyWhole<kGather>(batch, i);
    } else if (plan.in_order && plan.block_bytes > kXxh3ShortBytes) {
        batch.checksums[i] =
            plan.whole_stripes ? CopyFused<kGather>(batch, i) : CopyTiled<kGather>(batch, i);
    } else {
        Batch<kGather> cached = batch;
        cached.mode = StoreMode::kCached;  // the block is read again at once
        CopyWhole<kGather>(cached, i);
        batch.checksums[i] = Xxh3(batch.blocks[i], plan.block_bytes);
    }
}

template <bool kGather>
void CopyBatch(Batch<kGather> batch, std::size_t n, int threads) {
    const std::uint64_t bytes = batch.end - batch.begin;
    KV_CHECK(batch.begin <= batch.end && batch.end <= batch.plan.block_bytes);
    if (bytes == 0 || n == 0) return;
    for (std::size_t i = 0; i < n; ++i) {
        KV_CHECK(batch.ids[i] >= 0 && batch.ids[i] < batch.plan.num_blocks);
    }
    const std::uint64_t total = bytes * n;
    if (total >= kStreamingBatchBytes) batch.mode = StoreMode::kStreaming;
    const auto body = [](void *context, std::size_t begin, std::size_t end) {
        const auto &mine = *static_cast<const Batch<kGather> *>(context);
        for (std::size_t i = begin; i < end; ++i) CopyBlock<kGather>(mine, i);
        if (mine.mode == StoreMode::kStreaming) StreamFence();
    };
    const std::size_t grain = std::max<std::uint64_t>(1, kGrainBytes / bytes);
    ParallelFor(n, grain, total < kParallelBatchBytes ? 1 : threads, body, &batch);
}

}  // namespace

void GatherBlocks(const CopyPlan &plan, const std::int64_t *ids, std::uint8_t *const *blocks,
                  std::size_t n, std::uint64_t *checksums, int threads) {
    CopyBatch<true>({plan, ids, blocks, checksums, 0, plan.block_bytes, StoreMode::kCached}, n,
                    threads);
}

void ScatterBlocks(const CopyPlan &plan, const std::int64_t *ids, const std::uint8_t *const *blocks,
                   std::size_t n, std::uint64_t *checksums, int threads) {
    CopyBatch<false>({plan, ids, blocks, checksums, 0, plan.block_bytes, StoreMode::kCached}, n,
                     threads);
}

void GatherRange(const CopyPlan &plan, const std::int64_t *ids, std::uint8_t *const *blocks,
                 std::size_t n, std::uint64_t begin, std::uint64_t end, int threads) {
    CopyBatch<true>({plan, ids, blocks, nullptr, begin, end, StoreMode::kCached}, n, threads);
}

void ScatterRange(const CopyPlan &plan, const std::int64_t *ids, const std::uint8_t *const *blocks,
                  std::size_t n, std::uint64_t begin, std::uint64_t end, int threads) {
    CopyBatch<false>({plan, ids, blocks, nullptr, begin, end, StoreMode::kCached}, n, threads);
}

void ChecksumBlocks(const std::uint8_t *const *blocks, std::size_t n, std::size_t bytes,
                    std::uint64_t *checksums, int threads) {
    struct Context {
        const std::uint8_t *const *blocks;
        std::size_t bytes;
        std::uint64_t *checksums;
    } context{blocks, bytes, checksums};
    const auto body = [](void *raw, std::size_t begin, std::size_t end) {
        const auto &mine = *static_cast<const Context *>(raw);
        for (std::size_t i = begin; i < end; ++i) {
            mine.checksums[i] = Xxh3(mine.blocks[i], mine.bytes);
        }
    };
    const std::size_t grain =
        std::max<std::uint64_t>(1, kGrainBytes / std::max<std::size_t>(1, bytes));
    ParallelFor(n, grain, bytes * n < kParallelBatchBytes ? 1 : threads, body, &context);
}

std::uint64_t CopyWithChecksum(void *to, const void *from, std::size_t bytes) {
    auto *target = static_cast<std::uint8_t *>(to);
    const auto *source = static_cast<const std::uint8_t *>(from);
    if (bytes <= kXxh3ShortBytes) {
        if (bytes > 0) std::memcpy(target, source, bytes);
        return Xxh3(source, bytes);
    }
    const bool streaming = bytes >= kStreamingBatchBytes;
    Xxh3Stream stream(bytes);
    stream.CopyUpdate(target, source, bytes,
                      streaming ? StoreMode::kStreaming : StoreMode::kCached);
    if (streaming) StreamFence();
    return stream.Finish(source + bytes - kStripeBytes);
}

}  // namespace kvstore
