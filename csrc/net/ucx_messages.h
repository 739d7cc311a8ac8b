// Moves by messages, the client's side: parts that were asked of a peer, and what it answered.
//
// UCX emulates one-sided moves over TCP in software, and its target does not survive a peer that
// goes away in the middle: in every version seen (1.13 to 1.23) the answer to a get that cannot be
// sent is a fatal error of the process. Messages fail as requests, and the server looks at what it
// is asked for. They cost the same two copies.
//
// Local memory is written by OnPart alone, so nothing is written once a move was forgotten.
//
// Thread safety: none; the lock of the link.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>

#include "net/ucx_move.h"
#include "net/ucx_outbox.h"
#include "net/ucx_worker.h"

namespace kvstore {

class UcxMessages {
public:
    explicit UcxMessages(UcxWorker &worker);
    UcxMessages(const UcxMessages &) = delete;
    UcxMessages &operator=(const UcxMessages &) = delete;

    void set_session(std::uint64_t session) { session_ = session; }
    // Ask for a part. Its move is told when it ends. False when the endpoint has failed.
    bool Read(ucx::Ep ep, UcxPartHead head, std::uint8_t *to, UcxMove::Part *part);
    bool Write(ucx::Ep ep, UcxPartHead head, const std::uint8_t *from, UcxMove::Part *part);
    bool Pump(ucx::Ep ep) { return outbox_.Pump(ep); }

    // What came from the peer.
    void OnPart(const UcxPartHead &head, const void *data, std::size_t bytes);
    void OnAnswer(std::uint64_t part, UcxAnswer answer);

    // Ends a move's parts, but for those whose memory UCX still reads, which end later.
    void Forget(const UcxMove &move);
    std::size_t in_flight() const { return outbox_.in_flight(); }

private:
    struct Awaited {
        UcxMove::Part *part = nullptr;
        std::uint8_t *to = nullptr;  // of a read
        std::uint64_t at = 0;        // of the part in its piece
        std::uint64_t bytes = 0;     // of the part
        std::uint64_t left = 0;      // that have not come
        bool is_sending = false;
        bool is_answered = false;
        PieceStatus status = PieceStatus::kLost;
    };
    void Settle(std::uint64_t part, Awaited &awaited);

    UcxWorker &worker_;
    std::uint64_t session_ = 0;
    std::uint64_t next_part_ = 1;
    std::unordered_map<std::uint64_t, Awaited> awaited_;
    UcxOutbox outbox_;
};

}  // namespace kvstore
