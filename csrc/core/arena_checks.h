// Checksums of what is written rarely in an arena.
#pragma once

#include "core/arena_format.h"

namespace kvstore {

// Of all fields before `checksum`.
void SuperblockChecksum(const Superblock &block, std::uint8_t out[16]);
void MetadataChecksum(const MetadataHeader &header, const void *bytes, std::uint8_t out[16]);

}  // namespace kvstore
