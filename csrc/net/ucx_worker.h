// One UCX worker: its network addresses, its endpoints, its events.
//
// Thread safety: none; one thread at a time, which a lock of the owner sees to. WaitForEvents,
// after a successful Arm, needs none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "net/ucx_library.h"
#include "net/ucx_wire.h"

namespace kvstore {

class UcxWorker {
public:
    // Called within Progress. The bytes of a part are there during the call only.
    using OnMessage = std::function<void(UcxMessage &)>;
    using OnPart = std::function<void(const UcxPartHead &, const void *data, std::size_t bytes)>;

    UcxWorker(const UcxLibrary &library, ucx::Context context, OnMessage on_message,
              OnPart on_part);
    // Nothing reaches this process's memory through the worker any more when this returned.
    ~UcxWorker();
    UcxWorker(const UcxWorker &) = delete;
    UcxWorker &operator=(const UcxWorker &) = delete;

    // How many events there were.
    unsigned Progress();
    // Readies the descriptors; false when there are events already.
    bool Arm();
    // Until an event, Wake(), or `timeout_ms`.
    void WaitForEvents(int timeout_ms) const;
    void Wake() const;

    std::vector<std::uint8_t> Address();

    struct ErrorHandler {
        void (*call)(void *owner, ucx::Ep ep, ucx::Status status);
        void *owner;
    };
    // To a worker of that address; errors of the peer are told to the handler, within Progress.
    // Throws UcxFailure (kPeer).
    ucx::Ep Connect(const std::vector<std::uint8_t> &address, const ErrorHandler &handler);
    // False when the endpoint has failed. The bytes are kept until they are sent.
    bool Send(ucx::Ep ep, std::vector<std::uint8_t> bytes);
    // Sends a head, which must stay until `done`, with bytes from where they lie. What it returns
    // is UCX's: null when done already, without `done` being called.
    ucx::StatusPtr SendPart(ucx::Ep ep, const UcxPartHead &head, const void *data,
                            std::size_t bytes, ucx::SendCallback done, void *owner);
    // As Send, of a head without bytes.
    bool SendHead(ucx::Ep ep, const UcxPartHead &head);
    void Free(void *request) const { api_.ucp_request_free(request); }
    // Ends an endpoint at once; what was under way over it ends with an error.
    void Close(ucx::Ep ep);
    // True when no closing of an endpoint, and nothing of one that failed, is left to progress.
    bool IsFlushed();

private:
    static ucx::Status Received(void *self, const void *header, std::size_t header_length,
                                void *data, std::size_t length, const ucx::AmRecvParam *param);
    static ucx::Status ReceivedPart(void *self, const void *header, std::size_t header_length,
                                    void *data, std::size_t length, const ucx::AmRecvParam *param);
    bool Handle(unsigned id, ucx::AmRecvCallback callback);
    bool Done(ucx::StatusPtr request);

    const UcxLibrary &library_;
    const ucx::Functions &api_;
    const OnMessage on_message_;
    const OnPart on_part_;
    ucx::Worker worker_ = nullptr;
    int event_fd_ = -1;
    int wake_fd_ = -1;
    std::vector<ucx::StatusPtr> closing_;
    ucx::StatusPtr flush_ = nullptr;
};

}  // namespace kvstore
