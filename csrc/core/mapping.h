// Memory mapped where the kernel can back it with huge pages.
#pragma once

#include <cstddef>

namespace kvstore {

inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

// Maps `bytes` at an address that is a multiple of kHugePageBytes: a huge page fits only there.
// fd >= 0: the file, shared. fd < 0: anonymous memory, private and not reserved.
// Returns null, with errno, when there is no room.
void *MapOnHugeEdge(std::size_t bytes, int fd, bool writable = true);

}  // namespace kvstore
