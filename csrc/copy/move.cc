#include "copy/move.h"

#include <algorithm>

#include "copy/copy.h"
#include "copy/workers.h"
#include "copy/xxh3.h"
#include "core/store_core.h"

namespace kvstore {

namespace {

constexpr std::uint64_t kParallelBytes = 1 << 20;
constexpr std::uint64_t kGrainBytes = 256 << 10;

struct Move {
    const Piece *pieces;
    const std::uint64_t *sums;
    PieceStatus *statuses;
    StoreMode mode;
    const CancelFlag *cancelled;
    std::int64_t deadline_ns;
};

bool Copied(const Move &move, std::size_t i) {
    const Piece &piece = move.pieces[i];
    const PieceRun run{piece.to, piece.from, 0, 0, static_cast<std::size_t>(piece.bytes), 1};
    if (move.sums == nullptr) {
        CopyPieces(run, move.mode);
        return true;
    }
    if (piece.bytes <= kXxh3ShortBytes) {
        return CopyWithChecksum(piece.to, piece.from, run.bytes) == move.sums[i];
    }
    Xxh3Stream stream(piece.bytes);
    stream.CopyUpdate(run, move.mode);
    return stream.Finish(piece.from + piece.bytes - kStripeBytes) == move.sums[i];
}

std::size_t GrainOf(std::uint64_t total, std::size_t n) {
    const std::uint64_t mean = std::max<std::uint64_t>(1, total / n);
    return static_cast<std::size_t>(std::max<std::uint64_t>(1, kGrainBytes / mean));
}

void MoveOne(const Move &move, std::size_t i) {
    PieceStatus &status = move.statuses[i];
    if (move.cancelled != nullptr && move.cancelled->is_set()) {
        status = PieceStatus::kCancelled;
    } else if (SteadyNowNs() >= move.deadline_ns) {
        status = PieceStatus::kLate;
    } else {
        status = Copied(move, i) ? PieceStatus::kOk : PieceStatus::kDamaged;
    }
}

}  // namespace

void MovePieces(const Piece *pieces, const std::uint64_t *sums, PieceStatus *statuses,
                std::size_t n, int threads, const CancelFlag *cancelled, std::int64_t deadline_ns) {
    if (n == 0) return;
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < n; ++i) total += pieces[i].bytes;
    Move move{pieces,    sums,
              statuses,  total >= kStreamingBatchBytes ? StoreMode::kStreaming : StoreMode::kCached,
              cancelled, deadline_ns};
    const auto body = [](void *context, std::size_t begin, std::size_t end) {
        const Move &mine = *static_cast<const Move *>(context);
        for (std::size_t i = begin; i < end; ++i) MoveOne(mine, i);
        if (mine.mode == StoreMode::kStreaming) StreamFence();
    };
    ParallelFor(n, GrainOf(total, n), total < kParallelBytes ? 1 : threads, body, &move);
}

void ChecksumPieces(const Piece *pieces, std::uint64_t *sums, std::size_t n, int threads) {
    if (n == 0) return;
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < n; ++i) total += pieces[i].bytes;
    struct Sums {
        const Piece *pieces;
        std::uint64_t *sums;
    } all{pieces, sums};
    const auto body = [](void *context, std::size_t begin, std::size_t end) {
        const Sums &mine = *static_cast<const Sums *>(context);
        for (std::size_t i = begin; i < end; ++i) {
            mine.sums[i] = Xxh3(mine.pieces[i].from, mine.pieces[i].bytes);
        }
    };
    ParallelFor(n, GrainOf(total, n), total < kParallelBytes ? 1 : threads, body, &all);
}

}  // namespace kvstore
