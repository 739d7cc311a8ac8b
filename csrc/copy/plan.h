// How the bytes of canonical blocks lie in an engine's paged KV tensors.
//
// A plan is a list of runs, the same for every block: run r of engine block b is `count` pieces of
// `bytes` bytes at
//     engine:  base + b * block_stride + i * engine_stride      (i in [0, count))
//     block:   block_offset + i * piece_stride
// Adjacent pieces are merged when the plan is built, so a layout in which a whole layer of a block
// is contiguous has one piece per layer, and a block-outermost layout one piece in all.
#pragma once

#include <cstddef>
#include <cstdint>
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

struct CopyPlan {
    std::vector<Run> runs;          // in ascending block_offset; together they cover the block
    std::uint64_t block_bytes = 0;  // payload of one canonical block
    std::int64_t num_blocks = 0;    // engine block ids are in [0, num_blocks)
    bool in_order = false;          // runs are ascending and gapless, pieces too: payload order
};

}  // namespace kvstore
