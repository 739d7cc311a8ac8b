// Moves whole extents between a caller's memory and a file opened with O_DIRECT.
//
// An extent starts on a page of the file and owns its last page alone. Memory that is page-aligned
// is read and written in place; memory that is not, and the bytes of a last partial page, pass
// through a bounce buffer of bounded size, so that nothing beyond the caller's bytes is touched.
//
// Thread safety: as IoQueue::Run. The GIL must not be held.
#pragma once

#include <cstddef>
#include <cstdint>

#include "io/file.h"

namespace kvstore {

struct Extent {
    int fd;
    std::uint64_t offset;  // multiple of kPageBytes
    std::uint8_t *data;
    std::size_t bytes;
};

// errors[i] is 0 or the errno of extent i. A partial last page is padded with zeros on disk.
void WriteExtents(IoQueue &queue, const Extent *extents, std::size_t n, int *errors);

// As WriteExtents. Where `checksums` is not null, errors[i] is EBADMSG when XXH3-64 of the bytes
// read is not checksums[i]. The memory of an extent with an error holds unspecified bytes.
void ReadExtents(IoQueue &queue, const Extent *extents, std::size_t n,
                 const std::uint64_t *checksums, int *errors);

}  // namespace kvstore
