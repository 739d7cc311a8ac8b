#include "core/mapping.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>

namespace kvstore {

void *MapOnHugeEdge(std::size_t bytes, int fd, bool writable) {
    constexpr std::size_t kPage = 4096;
    const std::size_t mapped = (bytes + kPage - 1) / kPage * kPage;
    // Takes address space with room to spare, the mapping in the midst of it, and the rest back.
    const std::size_t room = mapped + kHugePageBytes;
    void *taken =
        mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (taken == MAP_FAILED) return nullptr;
    const auto begin = reinterpret_cast<std::uintptr_t>(taken);
    const std::uintptr_t edge = (begin + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    const int flags = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *base = mmap(reinterpret_cast<void *>(edge), mapped,
                      writable ? PROT_READ | PROT_WRITE : PROT_READ, flags | MAP_FIXED, fd, 0);
    if (base == MAP_FAILED) {
        const int error = errno;
        munmap(taken, room);
        errno = error;
        return nullptr;
    }
    if (edge > begin) munmap(taken, edge - begin);
    const std::uintptr_t end = edge + mapped;
    if (end < begin + room) munmap(reinterpret_cast<void *>(end), begin + room - end);
    return base;
}

}  // namespace kvstore
