#include "net/ucx_server.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <utility>

#include "core/store_core.h"

namespace kvstore {
namespace {

constexpr std::int64_t kTendNs = 100'000'000;
constexpr std::int64_t kGreetingNs = 10'000'000'000;
constexpr std::size_t kInboxMax = 4 * UcxServer::kPeersMax;

}  // namespace

UcxServer::UcxServer(std::shared_ptr<UcxCore> core, std::function<void()> tend)
    : core_(std::move(core)), tend_(std::move(tend)) {
    worker_ = std::make_unique<UcxWorker>(core_->library(), core_->context(),
                                          [this](UcxMessage &message) {
                                              if (inbox_.size() < kInboxMax)
                                                  inbox_.push_back(std::move(message));
                                          });
    thread_ = std::thread([this] { Run(); });
}

UcxServer::~UcxServer() {
    Stop();
    worker_.reset();
    for (const auto &[id, region] : regions_) core_->Unmap(region.memory);
}

void UcxServer::Stop() {
    if (core_->is_forked()) return;
    stopping_.store(true);
    worker_->Wake();
    if (thread_.joinable()) thread_.join();
}

std::vector<std::uint8_t> UcxServer::Address() {
    std::lock_guard lock(mutex_);
    return worker_->Address();
}

std::size_t UcxServer::num_peers() {
    std::lock_guard lock(mutex_);
    return peers_.size();
}

// --- regions

bool UcxServer::Add(std::uint64_t id, void *address, std::size_t bytes, bool writable) {
    std::lock_guard lock(mutex_);
    if (regions_.contains(id)) return false;
    Region region;
    region.base = reinterpret_cast<std::uint64_t>(address);
    region.bytes = bytes;
    region.writable = writable;
    region.memory = core_->Map(address, bytes, writable);
    try {
        region.key = core_->Key(region.memory);
        if (region.key.size() > kUcxTailBytesMax) {
            throw UcxFailure(UcxFailure::Kind::kLibrary, "ucx: the key of a region is too long");
        }
    } catch (...) {
        core_->Unmap(region.memory);
        throw;
    }
    regions_.emplace(id, std::move(region));
    return true;
}

bool UcxServer::Remove(std::uint64_t id, std::int64_t deadline_ns) {
    std::unique_lock lock(mutex_);
    if (!regions_.contains(id)) return true;
    regions_.at(id).is_removed = true;
    UcxHead head;
    head.kind = UcxKind::kRevoke;
    head.region = id;
    for (const std::uint64_t session : regions_.at(id).holders) {
        const auto found = peers_.find(session);
        if (found != peers_.end()) worker_->Send(found->second.ep, EncodeUcx(head));
    }
    worker_->Wake();
    while (regions_.contains(id) && !regions_.at(id).holders.empty()) {
        const std::int64_t left = deadline_ns - SteadyNowNs();
        if (left <= 0) return false;
        handed_back_.wait_for(lock, std::chrono::nanoseconds(left));
    }
    const auto found = regions_.find(id);
    if (found == regions_.end()) return true;  // another thread removed it too
    core_->Unmap(found->second.memory);
    regions_.erase(found);
    handed_back_.notify_all();
    return true;
}

// --- peers

void UcxServer::Answer(UcxMessage &message) {
    if (message.head.kind == UcxKind::kHello) return Greet(message);
    const auto found = peers_.find(message.head.session);
    if (found == peers_.end()) return;
    Peer &peer = found->second;
    if (message.head.kind == UcxKind::kProof) return Admit(found->first, peer, message.head);
    if (!peer.is_proved) return;
    if (message.head.kind == UcxKind::kOpen) return Open(found->first, peer, message.head);
    if (message.head.kind == UcxKind::kRevoked) {
        const auto region = regions_.find(message.head.region);
        if (region == regions_.end()) return;
        region->second.holders.erase(found->first);
        handed_back_.notify_all();
    }
}

void UcxServer::Greet(UcxMessage &message) {
    if (peers_.size() >= kPeersMax || message.tail.empty()) return;
    Peer peer;
    const auto on_error = [](void *self, ucx::Ep ep, ucx::Status) {
        static_cast<UcxServer *>(self)->failed_.push_back(ep);
    };
    try {
        peer.ep = worker_->Connect(message.tail, {on_error, this});
    } catch (const UcxFailure &) {
        return;  // the peer hears nothing, and gives up at its deadline
    }
    peer.since_ns = SteadyNowNs();
    std::memcpy(peer.client_nonce, message.head.nonce, kUcxNonceBytes);
    FillRandom(peer.server_nonce, kUcxNonceBytes);
    UcxHead reply;
    reply.kind = UcxKind::kChallenge;
    FillRandom(&reply.session, sizeof(reply.session));
    reply.epoch = core_->options().epoch;
    if (message.head.epoch != 0 && message.head.epoch != reply.epoch) {
        reply.answer = UcxAnswer::kEpoch;
    }
    std::memcpy(reply.nonce, peer.server_nonce, kUcxNonceBytes);
    MakeUcxProof(UcxSide::kServer, core_->options().secret, peer.client_nonce, peer.server_nonce,
                 reply.epoch, reply.proof);
    worker_->Send(peer.ep, EncodeUcx(reply));
    peers_.emplace(reply.session, peer);
}

void UcxServer::Admit(std::uint64_t session, Peer &peer, const UcxHead &head) {
    std::uint8_t wanted[kUcxProofBytes];
    MakeUcxProof(UcxSide::kClient, core_->options().secret, peer.client_nonce, peer.server_nonce,
                 core_->options().epoch, wanted);
    peer.is_proved = IsSameProof(wanted, head.proof);
    UcxHead reply;
    reply.kind = UcxKind::kWelcome;
    reply.session = session;
    reply.answer = peer.is_proved ? UcxAnswer::kOk : UcxAnswer::kSecret;
    worker_->Send(peer.ep, EncodeUcx(reply));
}

void UcxServer::Open(std::uint64_t session, Peer &peer, const UcxHead &head) {
    UcxHead reply;
    reply.kind = UcxKind::kOpened;
    reply.region = head.region;
    const auto found = regions_.find(head.region);
    if (found == regions_.end() || found->second.is_removed) {
        reply.answer = UcxAnswer::kNoRegion;
        worker_->Send(peer.ep, EncodeUcx(reply));
        return;
    }
    Region &region = found->second;
    region.holders.insert(session);
    reply.base = region.base;
    reply.bytes = region.bytes;
    reply.writable = region.writable ? 1 : 0;
    worker_->Send(peer.ep, EncodeUcx(reply, region.key.data(), region.key.size()));
}

void UcxServer::Drop(std::uint64_t session) {
    const auto found = peers_.find(session);
    if (found == peers_.end()) return;
    worker_->Close(found->second.ep);
    peers_.erase(found);
    for (auto &[id, region] : regions_) region.holders.erase(session);
    handed_back_.notify_all();
}

void UcxServer::DropFailed() {
    for (const ucx::Ep ep : std::exchange(failed_, {})) {
        const auto found = std::find_if(peers_.begin(), peers_.end(),
                                        [ep](const auto &entry) { return entry.second.ep == ep; });
        if (found != peers_.end()) Drop(found->first);
    }
}

void UcxServer::DropUnproved(std::int64_t now) {
    std::vector<std::uint64_t> late;
    for (const auto &[session, peer] : peers_) {
        if (!peer.is_proved && now - peer.since_ns > kGreetingNs) late.push_back(session);
    }
    for (const std::uint64_t session : late) Drop(session);
}

void UcxServer::Ping() {
    UcxHead head;
    head.kind = UcxKind::kPing;
    for (const auto &[session, peer] : peers_) {
        if (peer.is_proved) worker_->Send(peer.ep, EncodeUcx(head));
    }
}

// --- the thread

void UcxServer::Run() {
    std::int64_t last_event_ns = SteadyNowNs();
    std::int64_t next_tend_ns = last_event_ns + kTendNs;
    std::int64_t next_ping_ns = last_event_ns;
    while (!stopping_.load(std::memory_order_relaxed)) {
        unsigned events = 0;
        bool is_armed = false;
        std::int64_t now = 0;
        {
            std::lock_guard lock(mutex_);
            events = worker_->Progress();
            for (UcxMessage &message : std::exchange(inbox_, {})) Answer(message);
            DropFailed();
            now = SteadyNowNs();
            if (now >= next_tend_ns) DropUnproved(now);
            if (now >= next_ping_ns) {
                Ping();
                next_ping_ns = now + core_->timeout_ns() / 4;
            }
            if (events == 0 && now - last_event_ns > core_->spin_ns()) is_armed = worker_->Arm();
        }
        if (events > 0) last_event_ns = now;
        if (now >= next_tend_ns) {
            tend_();
            next_tend_ns = now + kTendNs;
        }
        const std::int64_t nap_ns = std::min(kTendNs, core_->timeout_ns() / 4);
        if (is_armed) worker_->WaitForEvents(static_cast<int>(nap_ns / 1'000'000));
    }
}

}  // namespace kvstore
