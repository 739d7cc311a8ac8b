// How the bytes of canonical blocks lie in an engine's paged KV tensors.
//
// A plan is a list of runs, the same for every block: run r of engine block b is `count` pieces of
// `bytes` bytes at
//     engine:  base + b * block_stride + i * engine_stride      (i in [0, count))
//     block:   block_offset + i * piece_stride
// Adjacent pieces are merged when the plan is built, so a layout in which a whole layer of a block
// is contiguous has one piece per layer, and a block-outermost layout one piece in all.
//
// Engines that hand over pointers instead of tensors have *scattered* blocks: run r of engine block
// b begins at addresses[b * runs.size() + r], and base and block_stride mean nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvstore {

struct Run {
    std::uint8_t *base = nullptr;   // address of engine block 0's first piece
    std::int64_t block_stride = 0;  // bytes from engine block b to b + 1
    std::int64_t engine_stride = 0;
    std::uint64_t block_offset = 0;
    std::uint64_t piece_stride = 0;
    std::uint32_t count = 0;
    std::uint32_t bytes = 0;
};

// Memory [begin, end) that some engine block touches.
struct PlanExtent {
    std::uintptr_t begin;
    std::uintptr_t end;
};

struct CopyPlan {
    std::vector<Run> runs;            // in ascending block_offset; together they cover the block
    std::uint64_t block_bytes = 0;    // payload of one canonical block
    std::int64_t num_blocks = 0;      // engine block ids are in [0, num_blocks)
    bool in_order = false;            // runs are ascending and gapless, pieces too: payload order
    bool whole_stripes = false;       // all pieces but the payload's last are multiples of 64 bytes
    bool writable = true;             // scatters into these tensors are allowed
    std::vector<PlanExtent> extents;  // sorted and disjoint: the engine memory of all blocks
    std::vector<std::uint8_t *> addresses;  // empty unless blocks are scattered

    // The first piece of run `run` of engine block `id`.
    std::uint8_t *EngineAddress(std::size_t run, std::int64_t id) const {
        if (addresses.empty()) return runs[run].base + id * runs[run].block_stride;
        return addresses[static_cast<std::size_t>(id) * runs.size() + run];
    }
};

// Checks `runs`, in any order, and makes the plan that is in payload order: every piece is looked
// at by itself, then neighbours are merged again into the fewest runs.
// Returns an empty string, or what is wrong: the pieces of a block must cover [0, block_bytes)
// exactly once, and must not overlap in engine memory.
std::string MakePlan(const std::vector<Run> &runs, std::uint64_t block_bytes,
                     std::int64_t num_blocks, CopyPlan *plan);

// Makes the plan of scattered blocks: piece p of block b is sizes[p] bytes at
// addresses[b * num_pieces + p], and a block is its pieces one after the other. Pieces that lie
// alike in every block are merged into runs. Returns as MakePlan. Pieces of a writable plan must
// not overlap; what is only read may lie anywhere.
std::string MakeScatteredPlan(const std::uint64_t *addresses, std::int64_t num_blocks,
                              const std::uint64_t *sizes, std::size_t num_pieces, bool writable,
                              CopyPlan *plan);

// True when [begin, begin + bytes) shares a byte with the engine memory of the plan.
bool TouchesEngine(const CopyPlan &plan, std::uintptr_t begin, std::uint64_t bytes);

}  // namespace kvstore
