// A UCP context with our settings: what a server of regions and the links to peers share.
//
// Thread safety: all methods may be called from any thread; UCX locks the context.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "net/ucx_library.h"

namespace kvstore {

struct UcxOptions {
    std::string library;      // path of a libucp
    std::string modules;      // its optional parts, as in UCX_MODULES; "" for all
    std::string tls;          // transports, as in UCX_TLS
    std::string net_devices;  // as in UCX_NET_DEVICES; "" for all
    double timeout = 2.0;     // seconds of silence after which a peer counts as gone
    std::string secret;
    std::uint64_t epoch = 0;
    std::vector<std::pair<std::string, std::string>> settings;  // of UCX, which win
    double spin = 50e-6;  // seconds to look for events before sleeping
    // Whether regions are read and written by requests of UCX that the target has no part in, which
    // is what RDMA does; else by messages, which the target answers.
    bool one_sided = false;
};

class UcxCore {
public:
    // Throws UcxFailure (kLibrary), which names the library and the reason.
    explicit UcxCore(UcxOptions options);
    // REQUIRES: no worker is left.
    ~UcxCore();
    UcxCore(const UcxCore &) = delete;
    UcxCore &operator=(const UcxCore &) = delete;

    // Throws UcxFailure (kForked) in a child of the process that made this.
    void CheckProcess() const;
    bool is_forked() const;

    // Pairs of transport and device.
    std::vector<std::pair<std::string, std::string>> Transports() const;

    // Memory that peers may read, and write to if `writable`. Throws UcxFailure (kLibrary).
    ucx::Mem Map(void *address, std::size_t bytes, bool writable) const;
    void Unmap(ucx::Mem memory) const;
    std::vector<std::uint8_t> Key(ucx::Mem memory) const;

    const UcxLibrary &library() const { return library_; }
    const ucx::Functions &api() const { return library_.api(); }
    const UcxOptions &options() const { return options_; }
    ucx::Context context() const { return context_; }
    std::int64_t timeout_ns() const { return timeout_ns_; }
    std::int64_t spin_ns() const { return spin_ns_; }

private:
    const UcxOptions options_;
    const UcxLibrary &library_;
    const std::int64_t timeout_ns_;
    const std::int64_t spin_ns_;
    const pid_t pid_;
    ucx::Context context_ = nullptr;
};

}  // namespace kvstore
