// Where a byte of a canonical block lies in an engine's tensors, as the copy kernels compute it.
//
// The table is csrc/copy/plan.h's: runs in ascending payload order that cover a block without gaps,
// whose pieces are as far apart in the payload as they are long. So a payload offset is found by a
// binary search for its run, one division for its piece, and what remains within the piece.
//
// Compiled by nvcc, by NVRTC, which has no standard headers, and by g++ for the emulation in
// tests/gpu: so nothing is included, and types are the compiler's own.
#pragma once

#ifdef __CUDACC__
#define KV_INDEX __device__ __forceinline__
#else
#define KV_INDEX inline
#endif

typedef unsigned long long KvAddress;

// A row of the table in GPU memory; kvstore/gpu/blocks.py writes it.
struct KvRun {
    KvAddress base;                   // engine block 0's first piece; unused where a table is given
    long long block_stride;           // bytes from engine block b to b + 1
    long long engine_stride;          // bytes from piece to piece
    unsigned long long block_offset;  // where the run begins in the payload
    unsigned int piece_bytes;
    unsigned int count;
};

// The last run in [first, last] that begins at or before `offset`. REQUIRES: `first` does.
KV_INDEX unsigned int KvFindRun(const KvRun *runs, unsigned int first, unsigned int last,
                                unsigned long long offset) {
    while (first < last) {
        const unsigned int middle = first + (last - first + 1) / 2;
        if (runs[middle].block_offset <= offset) {
            first = middle;
        } else {
            last = middle - 1;
        }
    }
    return first;
}

// Where the first piece of run `run` of engine block `id` lies. `table`: of scattered blocks, the
// address of each run of each block; null for blocks at even distances.
KV_INDEX KvAddress KvRunAddress(const KvRun &run, unsigned int index, unsigned int num_runs,
                                const KvAddress *table, long long id) {
    if (table != nullptr) return table[id * num_runs + index];
    return run.base + id * run.block_stride;
}

// How far behind the run's first piece the payload byte `offset` lies. 64-bit divisions are long on
// a GPU: runs of 4 GiB and more do not occur, so the one here has 32 bits.
KV_INDEX long long KvWithinRun(const KvRun &run, unsigned long long offset) {
    const unsigned int within = static_cast<unsigned int>(offset - run.block_offset);
    const unsigned int piece = within / run.piece_bytes;
    return piece * run.engine_stride + (within - piece * run.piece_bytes);
}

// What one thread block copies: words [first, first + count) of the payload of entry `entry`.
struct KvTile {
    unsigned int entry;
    unsigned long long first;  // a payload offset in bytes
    unsigned int words;
};

// Tile `index` of a launch that copies bytes [begin, end) of each block in tiles of `tile_words`
// words of `word_bytes`, `tiles` for each block.
KV_INDEX KvTile KvTileOf(unsigned int index, unsigned int tiles, unsigned long long begin,
                         unsigned long long end, unsigned int tile_words, unsigned int word_bytes) {
    const unsigned int entry = index / tiles;
    const unsigned long long step = static_cast<unsigned long long>(tile_words) * word_bytes;
    const unsigned long long first = begin + (index - entry * tiles) * step;
    const unsigned long long left = end - first;
    KvTile tile;
    tile.entry = entry;
    tile.first = first;
    tile.words = left < step ? static_cast<unsigned int>(left / word_bytes) : tile_words;
    return tile;
}
