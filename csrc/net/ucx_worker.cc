#include "net/ucx_worker.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "core/check.h"

namespace kvstore {
namespace {

using Kind = UcxFailure::Kind;

// The active messages that we use; their heads say what they are.
constexpr unsigned kMessageId = 11, kPartId = 12;

template <typename Content>
struct Outgoing {
    const ucx::Functions &api;
    const Content content;
};

// Frees what was sent once UCX is done with it.
template <typename Content>
void OnSent(void *request, ucx::Status, void *sent) {
    auto *outgoing = static_cast<Outgoing<Content> *>(sent);
    outgoing->api.ucp_request_free(request);
    delete outgoing;
}

}  // namespace

UcxWorker::UcxWorker(const UcxLibrary &library, ucx::Context context, OnMessage on_message,
                     OnPart on_part)
    : library_(library),
      api_(library.api()),
      on_message_(std::move(on_message)),
      on_part_(std::move(on_part)) {
    const UcxQuiet quiet;
    ucx::WorkerParams params = {};
    params.field_mask = ucx::kWorkerParamThreadMode;
    params.thread_mode = ucx::kThreadModeSerialized;
    const ucx::Status created = api_.ucp_worker_create(context, &params, &worker_);
    if (created != ucx::kOk) {
        throw UcxFailure(Kind::kLibrary, library.path() + ": no worker: " + library.Text(created) +
                                             " (" + LastUcxLog() + ")");
    }
    wake_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (wake_fd_ < 0 || api_.ucp_worker_get_efd(worker_, &event_fd_) != ucx::kOk ||
        !Handle(kMessageId, &Received) || !Handle(kPartId, &ReceivedPart)) {
        if (wake_fd_ >= 0) close(wake_fd_);
        api_.ucp_worker_destroy(worker_);
        throw UcxFailure(Kind::kLibrary, library.path() + ": a worker without events or messages");
    }
}

UcxWorker::~UcxWorker() {
    const UcxQuiet quiet;
    for (ucx::StatusPtr request : closing_) api_.ucp_request_free(request);
    if (flush_ != nullptr) api_.ucp_request_free(flush_);
    api_.ucp_worker_destroy(worker_);
    close(wake_fd_);
}

bool UcxWorker::Handle(unsigned id, ucx::AmRecvCallback callback) {
    ucx::AmHandlerParam handler = {};
    handler.field_mask =
        ucx::kAmHandlerId | ucx::kAmHandlerFlags | ucx::kAmHandlerCb | ucx::kAmHandlerArg;
    handler.id = id;
    handler.flags = ucx::kAmFlagWholeMsg;
    handler.cb = callback;
    handler.arg = this;
    return api_.ucp_worker_set_am_recv_handler(worker_, &handler) == ucx::kOk;
}

unsigned UcxWorker::Progress() {
    const UcxQuiet quiet;
    return api_.ucp_worker_progress(worker_);
}

bool UcxWorker::Arm() {
    const UcxQuiet quiet;
    return api_.ucp_worker_arm(worker_) == ucx::kOk;
}

void UcxWorker::WaitForEvents(int timeout_ms) const {
    pollfd fds[2] = {{event_fd_, POLLIN, 0}, {wake_fd_, POLLIN, 0}};
    if (poll(fds, 2, timeout_ms) > 0 && (fds[1].revents & POLLIN) != 0) {
        std::uint64_t count;
        [[maybe_unused]] const ssize_t got = read(wake_fd_, &count, sizeof(count));
    }
}

void UcxWorker::Wake() const {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t put = write(wake_fd_, &one, sizeof(one));
}

std::vector<std::uint8_t> UcxWorker::Address() {
    const UcxQuiet quiet;
    ucx::WorkerAttr attr = {};
    attr.field_mask = ucx::kWorkerAttrAddress | ucx::kWorkerAttrAddressFlags;
    attr.address_flags = ucx::kWorkerAddressNetOnly;
    const ucx::Status status = api_.ucp_worker_query(worker_, &attr);
    if (status != ucx::kOk) {
        throw UcxFailure(Kind::kLibrary,
                         library_.path() + ": no address: " + library_.Text(status));
    }
    const auto *data = reinterpret_cast<const std::uint8_t *>(attr.address);
    std::vector<std::uint8_t> address(data, data + attr.address_length);
    api_.ucp_worker_release_address(worker_, attr.address);
    if (address.size() > kUcxTailBytesMax) {
        throw UcxFailure(Kind::kLibrary, "ucx: an address of " + std::to_string(address.size()) +
                                             " bytes: name fewer devices");
    }
    return address;
}

ucx::Ep UcxWorker::Connect(const std::vector<std::uint8_t> &address, const ErrorHandler &handler) {
    const UcxQuiet quiet;
    ucx::EpParams params = {};
    params.field_mask =
        ucx::kEpParamRemoteAddress | ucx::kEpParamErrHandlingMode | ucx::kEpParamErrHandler;
    params.address = reinterpret_cast<const ucx::Address *>(address.data());
    params.err_mode = ucx::kErrHandlingModePeer;
    params.err_handler = {handler.call, handler.owner};
    ucx::Ep ep = nullptr;
    const ucx::Status status = api_.ucp_ep_create(worker_, &params, &ep);
    if (status != ucx::kOk) {
        throw UcxFailure(Kind::kPeer,
                         "ucx: no endpoint: " + library_.Text(status) + " (" + LastUcxLog() + ")");
    }
    return ep;
}

bool UcxWorker::Send(ucx::Ep ep, std::vector<std::uint8_t> bytes) {
    const UcxQuiet quiet;
    using Bytes = std::vector<std::uint8_t>;
    auto *outgoing = new Outgoing<Bytes>{api_, std::move(bytes)};
    ucx::RequestParam param = {};
    param.op_attr_mask = ucx::kOpCallback | ucx::kOpUserData | ucx::kOpFlags;
    param.flags = ucx::kAmSendEager;
    param.user_data = outgoing;
    param.cb.send = &OnSent<Bytes>;
    const ucx::StatusPtr result = api_.ucp_am_send_nbx(
        ep, kMessageId, nullptr, 0, outgoing->content.data(), outgoing->content.size(), &param);
    if (ucx::IsRequest(result)) return true;
    delete outgoing;
    return result == nullptr;
}

ucx::StatusPtr UcxWorker::SendPart(ucx::Ep ep, const UcxPartHead &head, const void *data,
                                   std::size_t bytes, ucx::SendCallback done, void *owner) {
    const UcxQuiet quiet;
    ucx::RequestParam param = {};
    param.op_attr_mask = ucx::kOpCallback | ucx::kOpUserData | ucx::kOpFlags | ucx::kOpMemoryType;
    param.flags = ucx::kAmSendEager;
    param.memory_type = ucx::kMemoryTypeHost;
    param.cb.send = done;
    param.user_data = owner;
    return api_.ucp_am_send_nbx(ep, kPartId, &head, sizeof(head), data, bytes, &param);
}

bool UcxWorker::SendHead(ucx::Ep ep, const UcxPartHead &head) {
    auto *outgoing = new Outgoing<UcxPartHead>{api_, head};
    const ucx::StatusPtr result =
        SendPart(ep, outgoing->content, nullptr, 0, &OnSent<UcxPartHead>, outgoing);
    if (ucx::IsRequest(result)) return true;
    delete outgoing;
    return result == nullptr;
}

void UcxWorker::Close(ucx::Ep ep) {
    const UcxQuiet quiet;
    ucx::RequestParam param = {};
    param.op_attr_mask = ucx::kOpFlags;
    param.flags = ucx::kEpCloseForce;
    const ucx::StatusPtr request = api_.ucp_ep_close_nbx(ep, &param);
    if (ucx::IsRequest(request)) closing_.push_back(request);
}

bool UcxWorker::Done(ucx::StatusPtr request) {
    if (api_.ucp_request_check_status(request) == ucx::kInProgress) return false;
    api_.ucp_request_free(request);
    return true;
}

bool UcxWorker::IsFlushed() {
    const UcxQuiet quiet;
    std::erase_if(closing_, [this](ucx::StatusPtr request) { return Done(request); });
    if (!closing_.empty()) return false;
    if (flush_ == nullptr) {
        const ucx::RequestParam param = {};
        const ucx::StatusPtr request = api_.ucp_worker_flush_nbx(worker_, &param);
        if (!ucx::IsRequest(request)) return true;
        flush_ = request;
    }
    if (!Done(flush_)) return false;
    flush_ = nullptr;
    return true;
}

ucx::Status UcxWorker::Received(void *self, const void *, std::size_t, void *data,
                                std::size_t length, const ucx::AmRecvParam *param) {
    UcxMessage message;
    if ((param->recv_attr & ucx::kAmRecvRndv) == 0 && ParseUcx(data, length, &message)) {
        static_cast<UcxWorker *>(self)->on_message_(message);
    }
    return ucx::kOk;
}

ucx::Status UcxWorker::ReceivedPart(void *self, const void *header, std::size_t header_length,
                                    void *data, std::size_t length, const ucx::AmRecvParam *param) {
    UcxPartHead head;
    if ((param->recv_attr & ucx::kAmRecvRndv) != 0 || header_length != sizeof(head)) {
        return ucx::kOk;
    }
    std::memcpy(&head, header, sizeof(head));
    if (head.magic == kUcxMagic) static_cast<UcxWorker *>(self)->on_part_(head, data, length);
    return ucx::kOk;
}

}  // namespace kvstore
