// Leases on blocks that came with an adopted arena: their bytes lay in memory that others could
// write to while no process was answerable for it, so they are checked before they are granted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/store_core.h"

namespace kvstore {

// As StoreCore::Acquire, but every block granted has the bytes of its checksum, or was committed by
// this process. A block that is damaged ends the run and is removed; *num_damaged counts them.
// Costs a look at each grant when all are verified, one pass over the bytes of those that are not.
// Where these are more than `max_bytes`, that many of them are checked (or one block's), nothing is
// granted and `*is_left` set: for who has others to look after before the next call.
std::size_t AcquireVerified(StoreCore &core, OwnerId owner, NamespaceId ns, const BlockHash *hashes,
                            std::size_t n, std::int64_t expires_ns, bool use, LeaseId *lease,
                            Grant *grants, std::size_t *num_damaged,
                            std::size_t max_bytes = SIZE_MAX, bool *is_left = nullptr);

}  // namespace kvstore
