// The client's side of the bulk protocol: batches of pieces moved to and from a peer's regions.
//
// A link holds a few connections, opened when they are needed. A move uses one, and several when it
// is large; moves of different threads use different ones. A connection on which anything went
// wrong is closed, and the next move opens another: a peer that came back is found again, unless it
// has another epoch.
//
// No move outlives its deadline by more than kSettleNs, and none leaves anybody behind who could
// still write to local memory.
//
// Thread safety: all methods may be called from any thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "copy/move.h"
#include "core/cancel.h"
#include "net/bulk_connection.h"
#include "net/dial.h"

namespace kvstore {

class BulkLink {
public:
    // Opens the first connection. `address`: as Dial's, TCP only. `epoch`: that the peer must have;
    // 0: any. `connections`: how many a move may use; 0: as many as this machine has use for.
    // Throws ClientFailure; kRemote when the secret or the epoch is another one.
    BulkLink(const std::string &address, std::string secret, std::uint64_t epoch,
             double timeout_seconds, std::size_t connections, InterruptedHook interrupted);
    ~BulkLink();
    BulkLink(const BulkLink &) = delete;
    BulkLink &operator=(const BulkLink &) = delete;

    // What the peer says of itself. Throws ClientFailure.
    std::vector<std::uint8_t> Info(double timeout_seconds);
    // Sets the status of every piece. Throws ClientFailure: kInterrupted.
    void Move(const BulkBatch &batch, double timeout_seconds, const CancelFlag *cancelled);
    // False once the peer was found to be gone, until a move has reached it again.
    bool is_alive();
    // False when a write was given up whose bytes the peer may still be taking in.
    // Close finds out whether that has ended.
    bool is_settled() const { return settled_.load(); }
    // From now on every move is lost, those under way too, which are waited for. Whether it is
    // settled then; asking again later tells anew.
    bool Close();

private:
    using Connections = std::vector<std::unique_ptr<BulkConnection>>;

    std::unique_ptr<BulkConnection> Borrow(std::int64_t deadline_ns, const CancelFlag *cancelled,
                                           bool may_wait);
    std::unique_ptr<BulkConnection> Open(std::int64_t deadline_ns);
    void Return(std::unique_ptr<BulkConnection> connection);
    void Discard(std::unique_ptr<BulkConnection> connection, bool is_lost);
    BulkConnection::End Carry(BulkMove &move, bool may_wait);

    const std::string address_;
    const std::string secret_;
    const std::uint64_t epoch_;
    const std::int64_t timeout_ns_;
    const std::size_t stripes_;
    const std::size_t connections_max_;
    const InterruptedHook interrupted_;
    std::atomic<bool> settled_{true};
    CancelFlag closed_;

    std::mutex mutex_;  // guards what follows
    std::condition_variable returned_;
    Connections idle_;
    Connections unsettled_;     // given up, and kept to see when the peer has hung up
    std::size_t num_open_ = 0;  // and being opened
    bool forgot_ = false;       // one that was not settled
    bool lost_ = false;
    bool is_another_ = false;  // a peer with another epoch is there
};

}  // namespace kvstore
