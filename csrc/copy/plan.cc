#include "copy/plan.h"

#include <algorithm>
#include <limits>

namespace kvstore {
namespace {

__extension__ using Wide = __int128;

constexpr std::int64_t kMaxPieces = 1 << 22;  // 32 bytes each while a plan is made
constexpr std::uint64_t kMaxPieceBytes = std::uint64_t{1} << 31;
constexpr Wide kMaxAddress = std::numeric_limits<std::int64_t>::max();

struct Piece {
    std::uint64_t block_offset;
    std::int64_t engine;  // address in engine block 0
    std::int64_t block_stride;
    std::uint64_t bytes;
};

std::string RangeText(std::uint64_t begin, std::uint64_t end) {
    return std::string("[") + std::to_string(begin) + ", " + std::to_string(end) + ")";
}

// Checks one run by itself and finds the memory it touches in all blocks.
std::string CheckRun(const Run &run, std::size_t index, std::uint64_t block_bytes,
                     std::int64_t num_blocks, PlanExtent *extent) {
    const std::string name = "run " + std::to_string(index);
    if (run.base == nullptr) return name + " has a null base";
    if (run.count == 0) return name + " has no pieces: count must be positive";
    if (run.bytes == 0) return name + " has empty pieces: bytes must be positive";
    const Wide last = static_cast<Wide>(run.count) - 1;
    const Wide payload_end = run.block_offset + last * run.piece_stride + run.bytes;
    if (payload_end > block_bytes) {
        return name + " ends past block_bytes (" + std::to_string(block_bytes) + ")";
    }
    const Wide blocks_span = static_cast<Wide>(run.block_stride) * (num_blocks - 1);
    const Wide pieces_span = static_cast<Wide>(run.engine_stride) * last;
    const Wide base = reinterpret_cast<std::uintptr_t>(run.base);
    const Wide begin = base + std::min<Wide>(blocks_span, 0) + std::min<Wide>(pieces_span, 0);
    const Wide end =
        base + std::max<Wide>(blocks_span, 0) + std::max<Wide>(pieces_span, 0) + run.bytes;
    if (begin <= 0 || end > kMaxAddress) return name + " leaves the address space";
    const Wide stride = run.block_stride < 0 ? -static_cast<Wide>(run.block_stride)
                                             : static_cast<Wide>(run.block_stride);
    if (num_blocks > 1 && stride < run.bytes) {
        return name + ": pieces of neighbouring blocks overlap, block_stride is " +
               std::to_string(run.block_stride) + " and a piece has " + std::to_string(run.bytes) +
               " bytes";
    }
    *extent = {static_cast<std::uintptr_t>(begin), static_cast<std::uintptr_t>(end)};
    return "";
}

void MergeExtents(std::vector<PlanExtent> *extents) {
    std::sort(extents->begin(), extents->end(),
              [](const PlanExtent &a, const PlanExtent &b) { return a.begin < b.begin; });
    std::size_t kept = 0;
    for (const PlanExtent &extent : *extents) {
        if (kept > 0 && extent.begin <= (*extents)[kept - 1].end) {
            (*extents)[kept - 1].end = std::max((*extents)[kept - 1].end, extent.end);
        } else {
            (*extents)[kept++] = extent;
        }
    }
    extents->resize(kept);
}

// Sorts by payload offset and joins pieces that are adjacent on both sides.
std::string OrderPieces(std::vector<Piece> *pieces, std::uint64_t block_bytes) {
    std::sort(pieces->begin(), pieces->end(),
              [](const Piece &a, const Piece &b) { return a.block_offset < b.block_offset; });
    std::uint64_t covered = 0;
    std::size_t kept = 0;
    for (const Piece piece : *pieces) {
        if (piece.block_offset > covered) {
            return "payload bytes " + RangeText(covered, piece.block_offset) + " are in no run";
        }
        if (piece.block_offset < covered) {
            const std::uint64_t end = std::min(covered, piece.block_offset + piece.bytes);
            return "payload bytes " + RangeText(piece.block_offset, end) + " are in two pieces";
        }
        covered += piece.bytes;
        if (kept > 0) {
            Piece &before = (*pieces)[kept - 1];
            if (before.block_stride == piece.block_stride &&
                before.engine + static_cast<std::int64_t>(before.bytes) == piece.engine &&
                before.bytes + piece.bytes <= kMaxPieceBytes) {
                before.bytes += piece.bytes;
                continue;
            }
        }
        (*pieces)[kept++] = piece;
    }
    pieces->resize(kept);
    if (covered != block_bytes) {
        return "payload bytes " + RangeText(covered, block_bytes) + " are in no run";
    }
    return "";
}

// True when the engine sides of two pieces of block `block` share a byte.
bool PiecesOverlap(std::vector<Piece> pieces, std::int64_t block) {
    for (Piece &piece : pieces) piece.engine += piece.block_stride * block;
    std::sort(pieces.begin(), pieces.end(),
              [](const Piece &a, const Piece &b) { return a.engine < b.engine; });
    for (std::size_t i = 1; i < pieces.size(); ++i) {
        if (pieces[i - 1].engine + static_cast<std::int64_t>(pieces[i - 1].bytes) >
            pieces[i].engine) {
            return true;
        }
    }
    return false;
}

std::vector<Run> RunsOf(const std::vector<Piece> &pieces) {
    std::vector<Run> runs;
    std::size_t i = 0;
    while (i < pieces.size()) {
        const Piece &first = pieces[i];
        std::size_t end = i + 1;
        std::int64_t engine_stride = static_cast<std::int64_t>(first.bytes);
        if (end < pieces.size()) engine_stride = pieces[end].engine - first.engine;
        while (end < pieces.size() && pieces[end].bytes == first.bytes &&
               pieces[end].block_stride == first.block_stride &&
               pieces[end].engine - pieces[end - 1].engine == engine_stride) {
            ++end;
        }
        const auto count = static_cast<std::uint32_t>(end - i);
        runs.push_back({reinterpret_cast<std::uint8_t *>(first.engine), first.block_stride,
                        count > 1 ? engine_stride : static_cast<std::int64_t>(first.bytes),
                        first.block_offset, first.bytes, count,
                        static_cast<std::uint32_t>(first.bytes)});
        i = end;
    }
    return runs;
}

}  // namespace

std::string MakePlan(const std::vector<Run> &runs, std::uint64_t block_bytes,
                     std::int64_t num_blocks, CopyPlan *plan) {
    if (block_bytes == 0) return "block_bytes must be positive";
    if (num_blocks <= 0) return "num_blocks must be positive";
    std::vector<Piece> pieces;
    std::vector<PlanExtent> extents;
    std::int64_t total = 0;
    for (std::size_t r = 0; r < runs.size(); ++r) {
        PlanExtent extent;
        const std::string wrong = CheckRun(runs[r], r, block_bytes, num_blocks, &extent);
        if (!wrong.empty()) return wrong;
        extents.push_back(extent);
        total += runs[r].count;
        if (total > kMaxPieces) {
            return "a block falls into more than " + std::to_string(kMaxPieces) + " pieces";
        }
    }
    pieces.reserve(static_cast<std::size_t>(total));
    for (const Run &run : runs) {
        for (std::uint32_t i = 0; i < run.count; ++i) {
            pieces.push_back({run.block_offset + i * run.piece_stride,
                              reinterpret_cast<std::int64_t>(run.base) + i * run.engine_stride,
                              run.block_stride, run.bytes});
        }
    }
    const std::string wrong = OrderPieces(&pieces, block_bytes);
    if (!wrong.empty()) return wrong;
    // Strides may differ between runs, so the first and the last block are both looked at.
    if (PiecesOverlap(pieces, 0) || PiecesOverlap(pieces, num_blocks - 1)) {
        return "pieces of one block overlap in engine memory";
    }
    MergeExtents(&extents);
    plan->runs = RunsOf(pieces);
    plan->block_bytes = block_bytes;
    plan->num_blocks = num_blocks;
    plan->in_order = true;
    plan->whole_stripes = std::all_of(pieces.begin(), pieces.end() - 1,
                                      [](const Piece &piece) { return piece.bytes % 64 == 0; });
    plan->extents = std::move(extents);
    return "";
}

bool TouchesEngine(const CopyPlan &plan, std::uintptr_t begin, std::uint64_t bytes) {
    const auto after = std::upper_bound(
        plan.extents.begin(), plan.extents.end(), begin,
        [](std::uintptr_t address, const PlanExtent &extent) { return address < extent.end; });
    return after != plan.extents.end() && after->begin < begin + bytes;
}

}  // namespace kvstore
