#include "io/extent_io.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "copy/copy.h"
#include "core/check.h"

namespace kvstore {
namespace {

// A block is cut into requests of this size, so that a few large blocks still fill the queue.
constexpr std::size_t kPieceBytes = std::size_t{512} << 10;
// Bounce memory per window of extents; one extent larger than this gets a window of its own.
constexpr std::size_t kBounceBytesMax = std::size_t{8} << 20;

std::size_t RoundUp(std::size_t bytes) {
    return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

bool Aligned(const Extent &extent) {
    return reinterpret_cast<std::uintptr_t>(extent.data) % kPageBytes == 0;
}

std::size_t BounceBytes(const Extent &extent) {
    if (!Aligned(extent)) return RoundUp(extent.bytes);
    return extent.bytes % kPageBytes == 0 ? 0 : kPageBytes;
}

struct Free {
    void operator()(void *memory) const { std::free(memory); }
};

struct Window {
    std::size_t begin, end;
    std::size_t bounce_bytes;
};

Window NextWindow(const Extent *extents, std::size_t n, std::size_t begin) {
    Window window{begin, begin, 0};
    while (window.end < n) {
        const std::size_t more = BounceBytes(extents[window.end]);
        if (window.end > begin && window.bounce_bytes + more > kBounceBytesMax) break;
        window.bounce_bytes += more;
        ++window.end;
    }
    return window;
}

// What one extent waits for. `bounce` is null where all bytes move in place.
struct Progress {
    std::atomic<std::size_t> pieces{0};
    std::atomic<int> error{0};
    std::uint8_t *bounce = nullptr;
};

// Delivers what was bounced and checks the bytes.
int FinishRead(const Extent &extent, const std::uint8_t *bounce, const std::uint64_t *checksum) {
    if (bounce != nullptr && !Aligned(extent)) {
        const std::uint64_t got = CopyWithChecksum(extent.data, bounce, extent.bytes);
        return checksum != nullptr && got != *checksum ? EBADMSG : 0;
    }
    const std::size_t tail = extent.bytes % kPageBytes;
    if (tail > 0) std::memcpy(extent.data + extent.bytes - tail, bounce, tail);
    if (checksum == nullptr) return 0;
    return Xxh3(extent.data, extent.bytes) == *checksum ? 0 : EBADMSG;
}

void AddPieces(bool write, const Extent &extent, std::size_t from, std::uint8_t *data,
               std::size_t bytes, std::vector<IoRequest> *requests) {
    for (std::size_t at = 0; at < bytes; at += kPieceBytes) {
        requests->push_back({extent.fd, write, extent.offset + from + at, data + at,
                             std::min(kPieceBytes, bytes - at)});
    }
}

void RunWindow(IoQueue &queue, bool write, const Extent *extents, const Window &window,
               const std::uint64_t *checksums, int *errors) {
    std::unique_ptr<std::uint8_t, Free> bounce;
    if (window.bounce_bytes > 0) {
        bounce.reset(
            static_cast<std::uint8_t *>(std::aligned_alloc(kPageBytes, window.bounce_bytes)));
        if (bounce == nullptr) throw std::bad_alloc();
    }
    std::vector<Progress> progress(window.end - window.begin);
    std::vector<IoRequest> requests;
    std::vector<std::size_t> owner;
    std::size_t bounced = 0;
    for (std::size_t i = window.begin; i < window.end; ++i) {
        const Extent &extent = extents[i];
        Progress &state = progress[i - window.begin];
        const std::size_t before = requests.size();
        const std::size_t bytes = BounceBytes(extent);
        // What is left of the extent after the part that moves in place.
        const std::size_t in_place =
            Aligned(extent) ? extent.bytes / kPageBytes * kPageBytes : std::size_t{0};
        AddPieces(write, extent, 0, extent.data, in_place, &requests);
        if (bytes > 0) {
            state.bounce = bounce.get() + bounced;
            bounced += bytes;
            if (write) {
                const std::size_t rest = extent.bytes - in_place;
                std::memcpy(state.bounce, extent.data + in_place, rest);
                std::memset(state.bounce + rest, 0, bytes - rest);
            }
            AddPieces(write, extent, in_place, state.bounce, bytes, &requests);
        }
        state.pieces = requests.size() - before;
        owner.resize(requests.size(), i);
        errors[i] = 0;
    }
    queue.Run(requests.data(), requests.size(), [&](std::size_t index, int error) {
        const std::size_t i = owner[index];
        Progress &state = progress[i - window.begin];
        int none = 0;
        if (error != 0) state.error.compare_exchange_strong(none, error);
        if (state.pieces.fetch_sub(1) > 1) return;
        errors[i] = state.error;
        if (errors[i] == 0 && !write) {
            errors[i] = FinishRead(extents[i], state.bounce, checksums ? checksums + i : nullptr);
        }
    });
}

void RunAll(IoQueue &queue, bool write, const Extent *extents, std::size_t n,
            const std::uint64_t *checksums, int *errors) {
    for (std::size_t at = 0; at < n;) {
        const Window window = NextWindow(extents, n, at);
        RunWindow(queue, write, extents, window, checksums, errors);
        at = window.end;
    }
}

}  // namespace

void WriteExtents(IoQueue &queue, const Extent *extents, std::size_t n, int *errors) {
    RunAll(queue, true, extents, n, nullptr, errors);
}

void ReadExtents(IoQueue &queue, const Extent *extents, std::size_t n,
                 const std::uint64_t *checksums, int *errors) {
    RunAll(queue, false, extents, n, checksums, errors);
}

}  // namespace kvstore
