// What one endpoint has of UCX: a context, a server of its regions, and its links to peers.
//
// Registered memory stays mapped until RemoveRegion returned true for it, or Close returned.
// A forked child must not use its parent's context: every method throws UcxFailure (kForked), and
// destroying it does nothing.
//
// Thread safety: all methods may be called from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "net/ucx_core.h"
#include "net/ucx_link.h"
#include "net/ucx_server.h"

namespace kvstore {

class UcxContext {
public:
    // Throws UcxFailure (kLibrary), which names the library and the reason.
    explicit UcxContext(UcxOptions options);
    ~UcxContext();
    UcxContext(const UcxContext &) = delete;
    UcxContext &operator=(const UcxContext &) = delete;

    // All of these throw UcxFailure: kForked, kClosed.
    const std::string &version() const;
    const std::string &library() const;
    std::vector<std::pair<std::string, std::string>> Transports();
    std::vector<std::uint8_t> Address();
    bool AddRegion(std::uint64_t id, void *address, std::size_t bytes, bool writable);
    bool RemoveRegion(std::uint64_t id, std::int64_t deadline_ns);
    std::size_t num_peers();
    std::shared_ptr<UcxLink> Connect(const std::vector<std::uint8_t> &address, std::uint64_t epoch,
                                     const std::string &secret, std::int64_t deadline_ns);
    const std::shared_ptr<UcxCore> &core() const { return core_; }
    // Ends links and peers. Moves under way end at once, and are waited for. Idempotent.
    void Close();

private:
    std::shared_ptr<UcxServer> Server();
    void TendLinks();
    std::vector<std::shared_ptr<UcxLink>> Links();

    const std::shared_ptr<UcxCore> core_;
    std::mutex mutex_;
    std::vector<std::weak_ptr<UcxLink>> links_;  // guarded by mutex_
    std::shared_ptr<UcxServer> server_;          // guarded by mutex_; null once closed
};

}  // namespace kvstore
