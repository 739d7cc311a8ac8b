#include "core/blake3.h"

#include <bit>
#include <cstring>

#include "core/hash_dispatch.h"

// Generic vectors compile to SSE on x86 and to NEON on aarch64, from one source.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector) && (defined(__x86_64__) || defined(__aarch64__))
#define KV_BLAKE3_VECTOR 1
#endif
#endif

namespace kvstore {
namespace {

static_assert(std::endian::native == std::endian::little, "words are read as they lie in memory");

constexpr std::size_t kChunkBytes = 1024;
constexpr int kRounds = 7;
constexpr std::uint32_t kIv[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                                  0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};
constexpr int kPermutation[16] = {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8};

inline void Mix(std::uint32_t *state, int a, int b, int c, int d, std::uint32_t x,
                std::uint32_t y) {
    state[a] += state[b] + x;
    state[d] = std::rotr(state[d] ^ state[a], 16);
    state[c] += state[d];
    state[b] = std::rotr(state[b] ^ state[c], 12);
    state[a] += state[b] + y;
    state[d] = std::rotr(state[d] ^ state[a], 8);
    state[c] += state[d];
    state[b] = std::rotr(state[b] ^ state[c], 7);
}

void CompressPortable(const std::uint32_t chaining[8], const std::uint8_t *block,
                      std::uint64_t counter, std::uint32_t block_bytes, std::uint32_t flags,
                      std::uint32_t out[8]) {
    std::uint32_t state[16];
    std::uint32_t words[16];
    std::memcpy(state, chaining, 32);
    std::memcpy(state + 8, kIv, 16);
    state[12] = static_cast<std::uint32_t>(counter);
    state[13] = static_cast<std::uint32_t>(counter >> 32);
    state[14] = block_bytes;
    state[15] = flags;
    std::memcpy(words, block, sizeof(words));
    for (int round = 0; round < kRounds; ++round) {
        Mix(state, 0, 4, 8, 12, words[0], words[1]);
        Mix(state, 1, 5, 9, 13, words[2], words[3]);
        Mix(state, 2, 6, 10, 14, words[4], words[5]);
        Mix(state, 3, 7, 11, 15, words[6], words[7]);
        Mix(state, 0, 5, 10, 15, words[8], words[9]);
        Mix(state, 1, 6, 11, 12, words[10], words[11]);
        Mix(state, 2, 7, 8, 13, words[12], words[13]);
        Mix(state, 3, 4, 9, 14, words[14], words[15]);
        std::uint32_t permuted[16];
        for (int i = 0; i < 16; ++i) permuted[i] = words[kPermutation[i]];
        std::memcpy(words, permuted, sizeof(words));
    }
    for (int i = 0; i < 8; ++i) out[i] = state[i] ^ state[i + 8];
}

#ifdef KV_BLAKE3_VECTOR

typedef std::uint32_t Row __attribute__((vector_size(16)));
typedef std::uint8_t RowBytes __attribute__((vector_size(16)));

#define KV_INLINE __attribute__((always_inline)) inline

// With kShuffleBytes, rotations by whole bytes are byte shuffles, which is right where the
// processor has no vector rotation.
template <int kBits, bool kShuffleBytes>
KV_INLINE void RotateRight(Row &row) {
    if constexpr (kShuffleBytes && kBits == 16) {
        const RowBytes bytes = reinterpret_cast<RowBytes>(row);
        row = reinterpret_cast<Row>(__builtin_shufflevector(bytes, bytes, 2, 3, 0, 1, 6, 7, 4, 5,
                                                            10, 11, 8, 9, 14, 15, 12, 13));
    } else if constexpr (kShuffleBytes && kBits == 8) {
        const RowBytes bytes = reinterpret_cast<RowBytes>(row);
        row = reinterpret_cast<Row>(__builtin_shufflevector(bytes, bytes, 1, 2, 3, 0, 5, 6, 7, 4, 9,
                                                            10, 11, 8, 13, 14, 15, 12));
    } else {
        row = (row >> kBits) | (row << (32 - kBits));
    }
}

template <bool kShuffleBytes>
KV_INLINE void MixRows(Row &a, Row &b, Row &c, Row &d, const Row &x, const Row &y) {
    a = (a + x) + b;
    d ^= a;
    RotateRight<16, kShuffleBytes>(d);
    c += d;
    b ^= c;
    RotateRight<12, kShuffleBytes>(b);
    a = (a + y) + b;
    d ^= a;
    RotateRight<8, kShuffleBytes>(d);
    c += d;
    b ^= c;
    RotateRight<7, kShuffleBytes>(b);
}

// The 4x4 state is held by rows, so the four column mixes are one MixRows. For the diagonals, rows
// a, c and d turn and b, the last one to be ready, stays: lane j then mixes a[j-1], b[j], c[j+1]
// and d[j+2]. The message words are kept in the order in which lanes need them,
//   x0 = words 0 2 4 6, y0 = 1 3 5 7, x1 = 14 8 10 12, y1 = 15 9 11 13,
// and kPermutation turns into the seven shuffles at the end of a round.
template <bool kShuffleBytes>
KV_INLINE void CompressRows(const std::uint32_t chaining[8], const std::uint8_t *block,
                            std::uint64_t counter, std::uint32_t block_bytes, std::uint32_t flags,
                            std::uint32_t out[8]) {
    Row a, b, w0, w1, w2, w3;
    std::memcpy(&a, chaining, 16);
    std::memcpy(&b, chaining + 4, 16);
    std::memcpy(&w0, block, 16);
    std::memcpy(&w1, block + 16, 16);
    std::memcpy(&w2, block + 32, 16);
    std::memcpy(&w3, block + 48, 16);
    Row c = {kIv[0], kIv[1], kIv[2], kIv[3]};
    Row d = {static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32),
             block_bytes, flags};
    Row x0 = __builtin_shufflevector(w0, w1, 0, 2, 4, 6);
    Row y0 = __builtin_shufflevector(w0, w1, 1, 3, 5, 7);
    Row x1 = __builtin_shufflevector(w2, w3, 6, 0, 2, 4);
    Row y1 = __builtin_shufflevector(w2, w3, 7, 1, 3, 5);
#pragma GCC unroll 7
    for (int round = 0; round < kRounds; ++round) {
        MixRows<kShuffleBytes>(a, b, c, d, x0, y0);
        a = __builtin_shufflevector(a, a, 3, 0, 1, 2);
        c = __builtin_shufflevector(c, c, 1, 2, 3, 0);
        d = __builtin_shufflevector(d, d, 2, 3, 0, 1);
        MixRows<kShuffleBytes>(a, b, c, d, x1, y1);
        a = __builtin_shufflevector(a, a, 1, 2, 3, 0);
        c = __builtin_shufflevector(c, c, 3, 0, 1, 2);
        d = __builtin_shufflevector(d, d, 2, 3, 0, 1);
        // The -1 lanes are filled by the second shuffle.
        const Row next_x0 = __builtin_shufflevector(x0, y0, 1, 5, 7, 2);
        Row next_y0 = __builtin_shufflevector(x0, x1, 3, 6, 0, -1);
        Row next_x1 = __builtin_shufflevector(y1, y0, 0, 4, -1, 1);
        Row next_y1 = __builtin_shufflevector(x1, y1, 1, 6, -1, 0);
        next_y0 = __builtin_shufflevector(next_y0, y1, 0, 1, 2, 7);
        next_x1 = __builtin_shufflevector(next_x1, x1, 0, 1, 7, 3);
        next_y1 = __builtin_shufflevector(next_y1, y0, 0, 1, 6, 3);
        x0 = next_x0;
        y0 = next_y0;
        x1 = next_x1;
        y1 = next_y1;
    }
    a ^= c;
    b ^= d;
    std::memcpy(out, &a, 16);
    std::memcpy(out + 4, &b, 16);
}

#if defined(__x86_64__)
__attribute__((target("sse4.1")))
#endif
void CompressVector(const std::uint32_t chaining[8], const std::uint8_t *block,
                    std::uint64_t counter, std::uint32_t block_bytes, std::uint32_t flags,
                    std::uint32_t out[8]) {
    CompressRows<true>(chaining, block, counter, block_bytes, flags, out);
}

#if defined(__x86_64__)
// AVX-512VL rotates a vector in one instruction.
__attribute__((target("avx512f,avx512vl"))) void CompressAvx512(
    const std::uint32_t chaining[8], const std::uint8_t *block, std::uint64_t counter,
    std::uint32_t block_bytes, std::uint32_t flags, std::uint32_t out[8]) {
    CompressRows<false>(chaining, block, counter, block_bytes, flags, out);
}
#endif

#endif  // KV_BLAKE3_VECTOR

// The last compression of a chunk or of a parent, not made yet: the same one gives a chaining value
// or, with kBlake3Root, the hash.
struct Node {
    std::uint32_t chaining[8];
    std::uint8_t block[kBlake3BlockBytes];
    std::uint64_t counter;
    std::uint32_t block_bytes;
    std::uint32_t flags;
};

class Tree {
public:
    Tree(Blake3Compress compress, const std::uint32_t key[8], std::uint32_t flags)
        : compress_(compress), key_(key), flags_(flags) {}

    // The node over `data`, whose first chunk is number `first_chunk`. Recursion is as deep as the
    // tree: 2 levels for a block of 1024 tokens.
    Node Over(const std::uint8_t *data, std::size_t num_bytes, std::uint64_t first_chunk) const {
        if (num_bytes <= kChunkBytes) return Chunk(data, num_bytes, first_chunk);
        // The left side is the largest complete tree that leaves at least a byte to the right.
        const std::size_t left_chunks = std::bit_floor((num_bytes - 1) / kChunkBytes);
        const std::size_t left_bytes = left_chunks * kChunkBytes;
        const Node left = Over(data, left_bytes, first_chunk);
        const Node right =
            Over(data + left_bytes, num_bytes - left_bytes, first_chunk + left_chunks);
        Node parent;
        std::memcpy(parent.chaining, key_, sizeof(parent.chaining));
        std::uint32_t chaining[8];
        Finish(left, 0, chaining);
        std::memcpy(parent.block, chaining, 32);
        Finish(right, 0, chaining);
        std::memcpy(parent.block + 32, chaining, 32);
        parent.counter = 0;
        parent.block_bytes = kBlake3BlockBytes;
        parent.flags = flags_ | kBlake3Parent;
        return parent;
    }

    void Finish(const Node &node, std::uint32_t more_flags, std::uint32_t out[8]) const {
        compress_(node.chaining, node.block, node.counter, node.block_bytes,
                  node.flags | more_flags, out);
    }

private:
    Node Chunk(const std::uint8_t *data, std::size_t num_bytes, std::uint64_t counter) const {
        Node node;
        std::memcpy(node.chaining, key_, sizeof(node.chaining));
        std::uint32_t start = kBlake3ChunkStart;
        while (num_bytes > kBlake3BlockBytes) {
            compress_(node.chaining, data, counter, kBlake3BlockBytes, flags_ | start,
                      node.chaining);
            start = 0;
            data += kBlake3BlockBytes;
            num_bytes -= kBlake3BlockBytes;
        }
        std::memset(node.block, 0, sizeof(node.block));
        if (num_bytes > 0) std::memcpy(node.block, data, num_bytes);
        node.counter = counter;
        node.block_bytes = static_cast<std::uint32_t>(num_bytes);
        node.flags = flags_ | start | kBlake3ChunkEnd;
        return node;
    }

    const Blake3Compress compress_;
    const std::uint32_t *const key_;
    const std::uint32_t flags_;
};

}  // namespace

Blake3Compress PickBlake3Compress() {
#ifdef KV_BLAKE3_VECTOR
    const HashSimdLevel limit = HashSimdLimit();
    if (limit == HashSimdLevel::kPortable) return CompressPortable;
#if defined(__x86_64__)
    if (limit == HashSimdLevel::kBest && __builtin_cpu_supports("avx512vl")) return CompressAvx512;
    if (!__builtin_cpu_supports("sse4.1")) return CompressPortable;
#endif
    return CompressVector;
#else
    return CompressPortable;
#endif
}

void Blake3(Blake3Compress compress, const std::uint8_t *data, std::size_t num_bytes,
            const std::uint8_t *key, std::uint8_t out[32]) {
    std::uint32_t key_words[8];
    std::memcpy(key_words, key != nullptr ? key : reinterpret_cast<const std::uint8_t *>(kIv), 32);
    const Tree tree(compress, key_words, key != nullptr ? kBlake3KeyedHash : 0);
    std::uint32_t words[8];
    tree.Finish(tree.Over(data, num_bytes, 0), kBlake3Root, words);
    std::memcpy(out, words, 32);
}

}  // namespace kvstore
