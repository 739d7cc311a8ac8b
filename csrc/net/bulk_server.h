// Serves Regions over TCP: every connection has a thread of its own, which sends from regions and
// receives into them; nobody else touches their bytes.
//
// A connection is closed at its first frame that is none of ours, when its peer did not prove
// within 10 s that it knows the secret, and when within a frame nothing moved for 10 s. Strangers
// do not keep peers out: where there are as many connections as may be, the oldest that has not
// proved itself gives way.
//
// Thread safety: all methods may be called from any thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "net/regions.h"

namespace kvstore {

struct BulkCounters {
    std::atomic<std::uint64_t> accepted_connections{0};
    std::atomic<std::uint64_t> refused_connections{0};  // beyond connections_max
    std::atomic<std::uint64_t> refused_greetings{0};    // wrong secret, epoch or version
    std::atomic<std::uint64_t> protocol_errors{0};
    // A region of theirs was removed, or they gave way.
    std::atomic<std::uint64_t> cut_connections{0};
    std::atomic<std::uint64_t> stalled_connections{0};
    std::atomic<std::uint64_t> read_pieces{0};
    std::atomic<std::uint64_t> read_bytes{0};
    std::atomic<std::uint64_t> written_pieces{0};
    std::atomic<std::uint64_t> written_bytes{0};
    std::atomic<std::uint64_t> refused_pieces{0};
    std::atomic<std::uint64_t> damaged_pieces{0};
};

// Spreads bytes over time, for all connections together. One mutex guards it.
class Throttle {
public:
    explicit Throttle(std::uint64_t bytes_per_second) : rate_(bytes_per_second) {}
    // How many bytes to move at once: so few that others' turns come often.
    std::size_t chunk_bytes() const;
    // From when on these bytes may be moved; 0: at once.
    std::int64_t Reserve(std::size_t bytes, std::int64_t now_ns);

private:
    const std::uint64_t rate_;  // 0: no limit
    std::mutex mutex_;
    std::int64_t next_ns_ = 0;
};

// What the connections of a server share.
struct BulkServices {
    BulkServices(Regions &all, std::string key, std::uint64_t own_epoch, std::uint64_t rate)
        : regions(all), secret(std::move(key)), epoch(own_epoch), throttle(rate) {}

    Regions &regions;
    const std::string secret;
    const std::uint64_t epoch;
    BulkCounters counters;
    Throttle throttle;

    std::shared_ptr<const std::vector<std::uint8_t>> info() const {
        const std::lock_guard lock(info_mutex_);
        return info_;
    }
    void SetInfo(std::vector<std::uint8_t> info) {
        auto shared = std::make_shared<const std::vector<std::uint8_t>>(std::move(info));
        const std::lock_guard lock(info_mutex_);
        info_ = std::move(shared);
    }

private:
    mutable std::mutex info_mutex_;
    std::shared_ptr<const std::vector<std::uint8_t>> info_ =
        std::make_shared<const std::vector<std::uint8_t>>();
};

class BulkServer {
public:
    // REQUIRES: `regions` outlives the server.
    BulkServer(Regions &regions, std::string secret, std::uint64_t epoch,
               std::size_t connections_max, std::uint64_t bytes_per_second);
    ~BulkServer();
    BulkServer(const BulkServer &) = delete;
    BulkServer &operator=(const BulkServer &) = delete;

    // Accepts connections of a bound, listening socket, which is duplicated. False with errno.
    bool Listen(int fd);
    BulkServices &services() { return services_; }
    std::size_t num_connections();
    // Ends all connections; returns when nothing of them runs any more.
    void Stop();

private:
    struct Held;
    void Accept(int listener);
    void Welcome(int fd);
    void Reap();
    bool MakeRoom();

    BulkServices services_;
    const std::size_t connections_max_;
    int stop_fd_ = -1;  // readable once stopping
    std::mutex mutex_;  // guards what follows
    bool stopping_ = false;
    std::vector<std::thread> acceptors_;
    std::list<std::unique_ptr<Held>> held_;
};

}  // namespace kvstore
