// Reads blocks at leisure and removes those whose bytes are not what their checksum says.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/store_core.h"

namespace kvstore {

struct ScrubResult {
    std::uint64_t cursor = 0;  // where to go on; 0 at the end of a round
    std::uint64_t bytes = 0;   // checked
    std::uint64_t num_damaged = 0;
};

// Checks blocks that are ready in the cpu tier from `cursor` on (0: the first), about `max_bytes`
// of them and at least one. Blocks are pinned a few at a time, so hardly ever is a put refused
// because of it, and nobody waits for it longer than it takes to list them. A sound block counts as
// verified afterwards.
// Thread safety: may be called from any thread, several at once.
ScrubResult Scrub(StoreCore &core, std::uint64_t cursor, std::size_t max_bytes);

}  // namespace kvstore
