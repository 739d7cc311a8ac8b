// A link to one peer's regions over UCX: a worker and an endpoint of its own, so that closing it,
// which destroys the worker, leaves nobody who could write into local memory, and so that a slow
// peer holds up no other.
//
// The thread that moves progresses the worker itself, without a switch to another thread. Of
// several that move at once one drives: it progresses for all, and sleeps in poll() when nothing
// comes; the others wait for their parts. Between moves the server's thread looks in (Tend), so
// that a dead peer is noticed and keys are handed back.
//
// A link fails when its endpoint does, when nothing came for the timeout while something was under
// way, and when a move ended with requests that do not come to an end. As long as is_alive() is
// true after a move, its local memory is settled; else it is once Close() returned true.
//
// Thread safety: mutex_ guards everything; all methods may be called from any thread.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/cancel.h"
#include "core/fair_mutex.h"
#include "net/ucx_core.h"
#include "net/ucx_messages.h"
#include "net/ucx_move.h"
#include "net/ucx_worker.h"

namespace kvstore {

class UcxLink {
public:
    // Connects to a UcxServer at `address`, of `epoch` unless that is 0, and proves to it that we
    // know `secret`, as it must to us. Throws UcxFailure: kPeer, kRefused, kTimeout, kLibrary.
    UcxLink(std::shared_ptr<UcxCore> core, const std::vector<std::uint8_t> &address,
            std::uint64_t epoch, const std::string &secret, std::int64_t deadline_ns);
    ~UcxLink();
    UcxLink(const UcxLink &) = delete;
    UcxLink &operator=(const UcxLink &) = delete;

    // Moves a batch between local memory and a region of the peer; statuses tell what became of
    // each piece. Reads are checked against `sums`. Ends shortly after the deadline at the latest.
    void Move(UcxOp op, std::uint64_t region, const UcxBatch &batch, std::int64_t deadline_ns,
              const CancelFlag *cancel, PieceStatus *statuses);

    bool is_alive();
    // Why it failed; "" while it has not.
    std::string failure();
    std::uint64_t epoch() const { return epoch_; }
    // Transports and devices in use, "tcp/eth0"; "" where this UCX does not say.
    const std::string &transports() const { return transports_; }

    // Looks after a link that nobody uses at the moment.
    void Tend();
    // Ends moves under way. True: settled; may be called again when it was not. REQUIRES: nothing.
    bool Close(std::int64_t deadline_ns);

private:
    using Lock = std::unique_lock<FairMutex>;

    void Greet(Lock &lock, std::uint64_t epoch, const std::string &secret,
               std::int64_t deadline_ns);
    void AwaitReply(Lock &lock, UcxKind kind, std::int64_t deadline_ns, UcxMessage *reply);
    PieceStatus Open(Lock &lock, std::uint64_t region, std::int64_t deadline_ns,
                     const CancelFlag *cancel, UcxRemote **remote);
    void MoveBy(Lock &lock, UcxRemote *remote, std::unique_ptr<UcxMove> move, const UcxBatch &batch,
                std::int64_t deadline_ns, const CancelFlag *cancel, PieceStatus *statuses);
    PieceStatus Run(Lock &lock, UcxMove &move, const UcxBatch &batch, std::int64_t deadline_ns,
                    const CancelFlag *cancel, PieceStatus *statuses);
    void Drain(Lock &lock, UcxMove &move);
    void Release(UcxRemote *remote);
    // Progresses, or waits for who does, for a short while. Who progressed drives from then on.
    void Advance(Lock &lock, std::int64_t deadline_ns);
    void StopDriving();
    void AfterProgress();
    void Take(UcxMessage &message);
    // Sends a key back: it will not be used again.
    void HandBack(std::uint64_t region);
    void Fail(const std::string &why);
    std::string NameOfTransports();

    const std::shared_ptr<UcxCore> core_;
    FairMutex mutex_;
    std::condition_variable_any changed_;
    ucx::Ep ep_ = nullptr;  // null once it was closed
    std::uint64_t session_ = 0;
    std::uint64_t epoch_ = 0;
    std::string transports_;
    std::string failure_;
    bool is_failed_ = false;
    bool is_closing_ = false;
    std::thread::id driver_;  // no thread: nobody drives
    bool is_asleep_ = false;  // the driver
    bool has_done_ = false;   // set when a request ends
    std::size_t waiting_ = 0;
    std::size_t moving_ = 0;
    std::int64_t last_event_ns_ = 0;
    std::vector<UcxMessage> inbox_;
    std::vector<UcxMessage> replies_;
    std::unordered_map<std::uint64_t, std::unique_ptr<UcxRemote>> remotes_;
    bool one_sided_ = false;
    std::unique_ptr<UcxMessages> messages_;
    // Moves that ended with requests under way, and the region that each uses; null by messages.
    std::vector<std::pair<std::unique_ptr<UcxMove>, UcxRemote *>> orphans_;
    // Null once closed. The last member: its end may still call back.
    std::unique_ptr<UcxWorker> worker_;
};

}  // namespace kvstore
