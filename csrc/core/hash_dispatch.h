// Which instructions the hash functions may use.
//
// Each hash picks the best code for this processor when it is called. The limit below lets tests
// run the slower variants on a fast machine; nothing else sets it. All variants give the same
// bytes.
//
// Thread safety: the limit is atomic; a call in progress keeps what it picked.
#pragma once

namespace kvstore {

enum class HashSimdLevel : int {
    kPortable = 0,  // plain C++
    kVector = 1,    // 128-bit vectors (SSE4.1, NEON)
    kBest = 2,      // whatever is fastest here (AVX-512VL, SHA-NI)
};

// Lowers, or restores, the level that hashes may use.
void SetHashSimdLimit(HashSimdLevel limit);
HashSimdLevel HashSimdLimit();

}  // namespace kvstore
