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

void SortExtents(std::vector<PlanExtent> *extents) {
    const auto before = [](const PlanExtent &a, const PlanExtent &b) { return a.begin < b.begin; };
    if (!std::is_sorted(extents->begin(), extents->end(), before)) {
        std::sort(extents->begin(), extents->end(), before);
    }
}

// REQUIRES: sorted.
void MergeExtents(std::vector<PlanExtent> *extents) {
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

bool WholeStripes(const std::vector<Piece> &pieces) {
    return std::all_of(pieces.begin(), pieces.end() - 1,
                       [](const Piece &piece) { return piece.bytes % 64 == 0; });
}

// Pieces of blocks as an engine gave them; see MakeScatteredPlan.
struct Scattered {
    const std::uint64_t *addresses;
    std::size_t num_blocks;
    const std::uint64_t *sizes;
    std::size_t num_pieces;
};

std::string CheckScattered(const Scattered &given) {
    for (std::size_t p = 0; p < given.num_pieces; ++p) {
        if (given.sizes[p] > 0 && given.sizes[p] <= kMaxPieceBytes) continue;
        return "piece " + std::to_string(p) + " has " + std::to_string(given.sizes[p]) +
               " bytes, need 1 to 2**31";
    }
    for (std::size_t i = 0; i < given.num_blocks * given.num_pieces; ++i) {
        const std::size_t p = i % given.num_pieces;
        const std::uint64_t address = given.addresses[i];
        if (address > 0 && address <= kMaxAddress - given.sizes[p]) continue;
        return std::string(address == 0 ? "null" : "impossible") + " address of block " +
               std::to_string(i / given.num_pieces) + ", piece " + std::to_string(p);
    }
    return "";
}

// The pieces of block 0. Neighbours that lie at the same distance in every block have the same
// block_stride, which means nothing else here: only these may be merged.
std::vector<Piece> PiecesOf(const Scattered &given) {
    const std::uint64_t *first = given.addresses;
    std::vector<bool> is_alike(given.num_pieces, true);  // as the piece before it
    for (std::size_t b = 1; b < given.num_blocks; ++b) {
        const std::uint64_t *row = given.addresses + b * given.num_pieces;
        for (std::size_t p = 1; p < given.num_pieces; ++p) {
            if (row[p] - row[p - 1] != first[p] - first[p - 1]) is_alike[p] = false;
        }
    }
    std::vector<Piece> pieces;
    std::uint64_t offset = 0;
    std::int64_t group = 0;
    for (std::size_t p = 0; p < given.num_pieces; ++p) {
        if (!is_alike[p]) ++group;
        pieces.push_back({offset, static_cast<std::int64_t>(first[p]), group, given.sizes[p]});
        offset += given.sizes[p];
    }
    return pieces;
}

// Which piece begins at a payload offset. REQUIRES: one does.
std::size_t ColumnAt(const std::vector<Piece> &pieces, std::uint64_t block_offset) {
    const auto at = std::lower_bound(
        pieces.begin(), pieces.end(), block_offset,
        [](const Piece &piece, std::uint64_t value) { return piece.block_offset < value; });
    return static_cast<std::size_t>(at - pieces.begin());
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
    SortExtents(&extents);
    MergeExtents(&extents);
    plan->runs = RunsOf(pieces);
    plan->block_bytes = block_bytes;
    plan->num_blocks = num_blocks;
    plan->in_order = true;
    plan->whole_stripes = WholeStripes(pieces);
    plan->extents = std::move(extents);
    return "";
}

std::string MakeScatteredPlan(const std::uint64_t *addresses, std::int64_t num_blocks,
                              const std::uint64_t *sizes, std::size_t num_pieces, bool writable,
                              CopyPlan *plan) {
    if (num_blocks <= 0) return "there must be at least one block";
    if (num_pieces == 0) return "there must be at least one piece";
    const auto n = static_cast<std::size_t>(num_blocks);
    if (n > kMaxPieces / num_pieces) {
        return "the blocks fall into more than " + std::to_string(kMaxPieces) + " pieces";
    }
    const Scattered given{addresses, n, sizes, num_pieces};
    std::string wrong = CheckScattered(given);
    if (!wrong.empty()) return wrong;
    std::vector<Piece> pieces = PiecesOf(given);
    const std::uint64_t block_bytes = pieces.back().block_offset + pieces.back().bytes;
    const std::vector<Piece> columns = pieces;
    wrong = OrderPieces(&pieces, block_bytes);
    if (!wrong.empty()) return wrong;

    // Column by column: of a pool whose pages were handed out in order they come out sorted.
    std::vector<PlanExtent> extents;
    extents.reserve(n * pieces.size());
    for (const Piece &piece : pieces) {
        const std::uint64_t *column = addresses + ColumnAt(columns, piece.block_offset);
        for (std::size_t b = 0; b < n; ++b) {
            extents.push_back({column[b * num_pieces], column[b * num_pieces] + piece.bytes});
        }
    }
    SortExtents(&extents);
    for (std::size_t i = 1; writable && i < extents.size(); ++i) {
        if (extents[i - 1].end <= extents[i].begin) continue;
        return "pieces overlap: two share the byte at address " + std::to_string(extents[i].begin);
    }
    MergeExtents(&extents);

    plan->runs = RunsOf(pieces);
    plan->addresses.resize(n * plan->runs.size());
    for (std::size_t r = 0; r < plan->runs.size(); ++r) {
        Run &run = plan->runs[r];
        run.base = nullptr;
        run.block_stride = 0;
        const std::uint64_t *column = addresses + ColumnAt(columns, run.block_offset);
        for (std::size_t b = 0; b < n; ++b) {
            plan->addresses[b * plan->runs.size() + r] =
                reinterpret_cast<std::uint8_t *>(column[b * num_pieces]);
        }
    }
    plan->block_bytes = block_bytes;
    plan->num_blocks = num_blocks;
    plan->in_order = true;
    plan->whole_stripes = WholeStripes(pieces);
    plan->writable = writable;
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
