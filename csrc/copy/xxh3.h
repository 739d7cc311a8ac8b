// Own XXH3-64 (seed 0, default secret), in a form that copies the bytes while it hashes them.
//
// Algorithm: "XXH3" in the xxHash specification, github.com/Cyan4973/xxHash, doc/xxhash_spec.md.
// Only payloads longer than kXxh3ShortBytes can be streamed; shorter ones are hashed at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore {

inline constexpr std::size_t kXxh3ShortBytes = 240;
inline constexpr std::size_t kStripeBytes = 64;
// Pieces shorter than this end before the hardware has noticed a stream to prefetch: whoever walks
// over them asks for the next ones in time.
inline constexpr std::size_t kPrefetchPieceBytes = 4096;

// Which instructions the kernels use. The process starts with the best the CPU has.
enum class SimdLevel : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };
SimdLevel BestSimdLevel();
SimdLevel CurrentSimdLevel();
// For tests: false when the CPU has no such level. Not to be called while copies run.
bool ForceSimdLevel(SimdLevel level);

// Cached: plain stores. Streaming: non-temporal stores, which neither read the destination's cache
// lines first nor displace others; StreamFence() must follow before the bytes are handed over.
enum class StoreMode { kCached, kStreaming };
void StreamFence();

// `count` pieces of `bytes` bytes.
struct PieceRun {
    std::uint8_t *to;
    const std::uint8_t *from;
    std::ptrdiff_t to_stride;
    std::ptrdiff_t from_stride;
    std::size_t bytes;
    std::size_t count;
};

// Copies without hashing.
void CopyPieces(const PieceRun &run, StoreMode mode);

// Hashes one payload of a known length, given front to back.
//
// Thread safety: none; one stream belongs to one thread.
class Xxh3Stream {
public:
    // REQUIRES: payload_bytes > kXxh3ShortBytes.
    explicit Xxh3Stream(std::uint64_t payload_bytes);

    // Hashes (and copies) the payload's next bytes. All but the payload's last bytes must come in
    // multiples of kStripeBytes: REQUIRES bytes % kStripeBytes == 0, or that this ends the payload.
    void Update(const std::uint8_t *from, std::size_t bytes);
    void CopyUpdate(std::uint8_t *to, const std::uint8_t *from, std::size_t bytes, StoreMode mode);
    // The same for the pieces of a run one after the other; the run may end the payload.
    void CopyUpdate(const PieceRun &run, StoreMode mode);

    // Payload bytes taken so far.
    std::uint64_t bytes_done() const { return bytes_done_; }

    // The hash. `last_stripe` points to the payload's last kStripeBytes bytes.
    // REQUIRES: the whole payload was given.
    std::uint64_t Finish(const std::uint8_t *last_stripe) const;

    // Accumulators and the place within the current block of stripes; kernels update them.
    struct State {
        alignas(64) std::uint64_t lanes[8];
        std::uint32_t stripe;
    };

private:
    State state_;
    std::uint64_t payload_bytes_;
    std::uint64_t stripes_left_;  // the stripe that ends the payload is not among them
    std::uint64_t bytes_done_ = 0;
};

}  // namespace kvstore
