// Gather and scatter of paged KV blocks: one launch copies a batch, on the caller's stream.
//
//   kv_gather_W:   canonical block at blocks[i]  <-  engine block ids[i]
//   kv_scatter_W:  engine block ids[i]           <-  canonical block at blocks[i]
//
// for payload bytes [begin, end) of each block, in words of W bytes: 16, or fewer where an address,
// a stride or a length is no multiple of 16. The host chooses W (kvstore/gpu/blocks.py), and
// answers for every address: a kernel checks nothing.
//
// A thread block copies one tile of kThreads * kWords words of one KV block; neighbouring threads
// copy neighbouring words. A thread reads all its words before it writes the first, so that
// kWords reads are under way at a time. `blocks` may be in host memory that is mapped for the GPU.
//
// REQUIRES: gridDim.x is the number of blocks times `tiles`, blockDim.x is kThreads.
#include "piece_index.h"

constexpr unsigned int kThreads = 256;
constexpr unsigned int kWords = 4;

template <typename Word, bool is_gather>
KV_INDEX void KvCopyTile(const KvRun *runs, unsigned int num_runs, const KvAddress *table,
                         const long long *ids, const KvAddress *blocks, unsigned long long begin,
                         unsigned long long end, unsigned int tiles) {
    const KvTile tile = KvTileOf(blockIdx.x, tiles, begin, end, kThreads * kWords, sizeof(Word));
    const long long id = ids[tile.entry];
    const KvAddress block = blocks[tile.entry];
    // The same for all threads, and mostly the same run: then no thread searches.
    const unsigned int first = KvFindRun(runs, 0, num_runs - 1, tile.first);
    const unsigned int last =
        KvFindRun(runs, first, num_runs - 1, tile.first + (tile.words - 1) * sizeof(Word));
    Word words[kWords];
    KvAddress to[kWords];
#pragma unroll
    for (unsigned int k = 0; k < kWords; ++k) {
        const unsigned int word = k * kThreads + threadIdx.x;
        if (word >= tile.words) continue;
        const unsigned long long offset = tile.first + word * sizeof(Word);
        const unsigned int at = KvFindRun(runs, first, last, offset);
        const KvRun &run = runs[at];
        const KvAddress engine =
            KvRunAddress(run, at, num_runs, table, id) + KvWithinRun(run, offset);
        to[k] = is_gather ? block + offset : engine;
        words[k] = *reinterpret_cast<const Word *>(is_gather ? engine : block + offset);
    }
#pragma unroll
    for (unsigned int k = 0; k < kWords; ++k) {
        if (k * kThreads + threadIdx.x < tile.words) *reinterpret_cast<Word *>(to[k]) = words[k];
    }
}

#define KV_KERNELS(width, Word)                                                                    \
    extern "C" __global__ void __launch_bounds__(kThreads)                                         \
        kv_gather_##width(const KvRun *runs, unsigned int num_runs, const KvAddress *table,        \
                          const long long *ids, const KvAddress *blocks, unsigned long long begin, \
                          unsigned long long end, unsigned int tiles) {                            \
        KvCopyTile<Word, true>(runs, num_runs, table, ids, blocks, begin, end, tiles);             \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(kThreads)                                         \
        kv_scatter_##width(const KvRun *runs, unsigned int num_runs, const KvAddress *table,       \
                           const long long *ids, const KvAddress *blocks,                          \
                           unsigned long long begin, unsigned long long end, unsigned int tiles) { \
        KvCopyTile<Word, false>(runs, num_runs, table, ids, blocks, begin, end, tiles);            \
    }

KV_KERNELS(16, uint4)
KV_KERNELS(8, uint2)
KV_KERNELS(4, unsigned int)
KV_KERNELS(2, unsigned short)
KV_KERNELS(1, unsigned char)
