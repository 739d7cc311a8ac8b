// What all connections of a server share: the core, the roster, the tasks for Python, the counts.
//
// Thread safety: all of it may be used from any thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/store_core.h"
#include "net/frame.h"
#include "net/latency.h"
#include "net/roster.h"
#include "net/sketch.h"
#include "net/tasks.h"

namespace kvstore {

// Totals since the start, named as in kvstore/metrics.py; relaxed.
struct NetCounters {
    using Count = std::atomic<std::uint64_t>;
    Count queried_blocks{0};
    Count hit_cpu_blocks{0};
    Count missed_blocks{0};
    Count missed_absent_blocks{0};
    Count missed_pending_blocks{0};
    Count missed_evicted_blocks{0};
    Count missed_ssd_blocks{0};  // on ssd, but the caller did not wait for it
    Count missed_corrupt_blocks{0};
    Count queried_tokens{0};
    Count hit_cpu_tokens{0};
    Count loaded_bytes{0};
    Count stored_bytes{0};
    Count read_bytes{0};     // payload sent by READ
    Count written_bytes{0};  // payload received by WRITE
    Count integrity_failures{0};
    Count requests{0};
    Count protocol_errors{0};
    Count refused_busy{0};     // tasks refused: the queue was full
    Count notices_dropped{0};  // notices not given to Python: the queue was full
    Count connections_total{0};
    Count connections_refused{0};
    Count timed_out_connections{0};  // greeting not finished, or stuck in the middle of a frame
};

inline void AddTo(NetCounters::Count &count, std::uint64_t n) {
    count.fetch_add(n, std::memory_order_relaxed);
}

class Services {
public:
    static constexpr std::size_t kOps = 64;

    Services(StoreCore &given_core, std::size_t tasks_max)
        : core(given_core), reader(given_core.NewOwner()), tasks(tasks_max) {}

    // The client's last connection closed: frees what it held and tells Python. Where it was not
    // the client that closed it, that is no sign that it writes no more.
    void EndClient(const Client &client, bool was_cut);
    void AddUse(NamespaceId ns, const BlockHash &first, std::uint64_t blocks) {
        std::lock_guard lock(sketch_mutex_);
        sketch_.Add(ns, first, blocks);
    }
    std::vector<HotPrefix> HotPrefixes() {
        std::lock_guard lock(sketch_mutex_);
        return sketch_.Top();
    }

    StoreCore &core;
    // Whose the leases are that READs send under: were they the client's, another connection of it
    // could end one while bytes are still sent, and then they would be another's.
    const OwnerId reader;
    Roster roster;
    TaskQueue tasks;
    NetCounters counters;
    LatencyHistogram latencies[kOps];
    std::atomic<bool> draining{false};
    std::atomic<bool> stopping{false};

    // How many connections wait for a block or for room.
    void AddParked();
    void RemoveParked();
    std::uint64_t num_parked() const;
    // Waits until there is one; false once StopWaiting was called.
    bool WaitForParked();
    void StopWaiting();

private:
    mutable std::mutex parked_mutex_;
    std::condition_variable parked_changed_;
    std::uint64_t parked_ = 0;
    bool stopped_waiting_ = false;
    std::mutex sketch_mutex_;
    PrefixSketch sketch_;
};

}  // namespace kvstore
