// Serves this process's regions to peers over UCX: a worker, and a thread that progresses it, since
// UCX emulates one-sided moves over TCP in software on the target.
//
// What is asked for by messages is looked at, region and bounds. One-sided moves are not: over
// transports without their own, UCX follows a key to memory that is gone, and dies. So memory may
// go only when Remove returned true: every peer that was given the key has handed it back, or its
// endpoint is closed.
//
// Peers are pinged: those that are gone are noticed, and those that wait for bytes see that we
// live.
//
// Bounds: kPeersMax peers, of which those that have not proved themselves go after 10 s.
//
// Thread safety: mutex_ guards everything; all methods may be called from any thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "core/fair_mutex.h"
#include "net/ucx_core.h"
#include "net/ucx_outbox.h"
#include "net/ucx_worker.h"

namespace kvstore {

class UcxServer {
public:
    static constexpr std::size_t kPeersMax = 4096;

    // `tend` is called by the thread every now and then.
    UcxServer(std::shared_ptr<UcxCore> core, std::function<void()> tend);
    // Ends all peers' access. REQUIRES: Stop() was called.
    ~UcxServer();
    UcxServer(const UcxServer &) = delete;
    UcxServer &operator=(const UcxServer &) = delete;

    std::vector<std::uint8_t> Address();
    // False when a region has that id, also one whose keys are not all back. Throws UcxFailure.
    bool Add(std::uint64_t id, void *address, std::size_t bytes, bool writable);
    // No key is given out any more. True when none is in use and none can be used again; false when
    // one may be at the deadline. May be called again.
    bool Remove(std::uint64_t id, std::int64_t deadline_ns);
    std::size_t num_peers();
    // Ends the thread. Idempotent.
    void Stop();

private:
    struct Region {
        std::uint64_t base = 0;
        std::uint64_t bytes = 0;
        bool writable = false;
        bool is_removed = false;
        ucx::Mem memory = nullptr;
        std::vector<std::uint8_t> key;
        std::unordered_set<std::uint64_t> holders;  // of its key: sessions
        std::size_t uses = 0;                       // parts of it that are being sent
    };
    struct Peer {
        ucx::Ep ep = nullptr;
        std::uint8_t client_nonce[kUcxNonceBytes];
        std::uint8_t server_nonce[kUcxNonceBytes];
        bool is_proved = false;
        std::int64_t since_ns = 0;
        std::unique_ptr<UcxOutbox> outbox;
        // Bytes that have not come of parts that are being written, of those at all in bounds.
        std::unordered_map<std::uint64_t, std::uint64_t> writing;
    };
    struct Answered {
        std::uint64_t session;
        std::uint64_t part;
        UcxAnswer answer;
    };

    void Run();
    void Answer(UcxMessage &message);
    void Greet(UcxMessage &message);
    void Admit(std::uint64_t session, Peer &peer, const UcxHead &head);
    void Open(std::uint64_t session, Peer &peer, const UcxHead &head);
    void Drop(std::uint64_t session);
    void DropFailed();
    void DropUnproved(std::int64_t now);
    void Ping();
    void OnPart(const UcxPartHead &head, const void *data, std::size_t bytes);
    void OnRead(Peer &peer, const UcxPartHead &head);
    void OnWrite(Peer &peer, const UcxPartHead &head, const void *data, std::size_t bytes);
    void OnSent(std::uint64_t session, const UcxPartHead &head);
    Region *Find(const UcxPartHead &head, std::uint64_t here_bytes);
    void Pump();
    void CutOff(std::uint64_t region);

    const std::shared_ptr<UcxCore> core_;
    const std::function<void()> tend_;
    FairMutex mutex_;
    std::condition_variable_any handed_back_;
    std::unique_ptr<UcxWorker> worker_;
    std::vector<UcxMessage> inbox_;
    std::vector<ucx::Ep> failed_;
    std::vector<Answered> answers_;
    std::unordered_set<std::uint64_t> busy_;          // sessions with something to send
    std::vector<std::unique_ptr<UcxOutbox>> ending_;  // of peers that are gone
    std::unordered_map<std::uint64_t, Peer> peers_;   // by session
    std::unordered_map<std::uint64_t, Region> regions_;
    std::atomic<bool> stopping_{false};
    std::thread thread_;
};

}  // namespace kvstore
