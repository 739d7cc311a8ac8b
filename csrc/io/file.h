// The one door to files: a batch of reads or writes at explicit offsets, many in flight at once.
//
// Thread safety: Run() may be called from any thread; batches of one queue run one after another.
// Use one queue per caller that must not wait for another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "core/types.h"

namespace kvstore {

// What O_DIRECT asks of offsets, addresses and lengths, whatever the device's sector size.

struct IoRequest {
    int fd;
    bool write;
    std::uint64_t offset;
    std::uint8_t *data;
    std::size_t bytes;
};

class IoQueue {
public:
    using OnDone = std::function<void(std::size_t index, int error)>;

    virtual ~IoQueue() = default;

    // Runs all requests, in any order, and returns when the last is done. `done` is called exactly
    // once a request, possibly from several threads at once; `error` is 0, an errno, or ENODATA
    // for a read past the end of the file. Short transfers are continued, interrupted ones redone.
    // REQUIRES: the requests' memory stays valid during the call, and where `fd` was opened with
    // O_DIRECT, offset, data and bytes are multiples of kPageBytes.
    virtual void Run(const IoRequest *requests, std::size_t n, const OnDone &done) = 0;

    virtual const char *kind() const = 0;
    virtual unsigned depth() const = 0;  // requests in flight at most
};

// Null where the kernel does not offer io_uring (too old, seccomp, sysctl).
std::unique_ptr<IoQueue> OpenUring(unsigned depth);
// At most 64 threads; never fails but by std::system_error when no thread can be started.
std::unique_ptr<IoQueue> OpenThreadIo(unsigned depth);

}  // namespace kvstore
