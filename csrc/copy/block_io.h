// Put and load of whole batches within one process: decisions and copies in one native call, so
// that a single small block costs one crossing of the language border.
#pragma once

#include <cstddef>
#include <cstdint>

#include "copy/plan.h"
#include "core/store_core.h"

namespace kvstore {

struct PutResult {
    std::size_t num_leading = 0;  // leading blocks that are in the store now
    std::size_t num_stored = 0;   // copied now
    std::size_t num_present = 0;  // were ready already
    std::size_t num_pending = 0;  // somebody else is writing them
    std::size_t num_no_space = 0;
    std::size_t num_orphan = 0;
};

// Puts chain.hashes[i] <- engine block ids[i]. REQUIRES: as Reserve and GatherBlocks.
PutResult PutBlocks(StoreCore &core, OwnerId owner, NamespaceId ns, const Chain &chain,
                    const CopyPlan &plan, const std::int64_t *ids, int threads);

struct LoadResult {
    std::size_t num_loaded = 0;  // leading blocks whose exact bytes are in the engine's tensors
    bool corrupt = false;        // block `num_loaded` failed its checksum and was removed
};

// Loads engine block ids[i] <- hashes[i] for the leading blocks that are ready in the cpu tier.
// With `verify`, a block whose bytes do not match their checksum ends the run and is removed; the
// engine block that it was copied to holds garbage then, and so may the ones after it.
LoadResult LoadBlocks(StoreCore &core, OwnerId owner, NamespaceId ns, const BlockHash *hashes,
                      std::size_t n, const CopyPlan &plan, const std::int64_t *ids, bool verify,
                      int threads);

}  // namespace kvstore
