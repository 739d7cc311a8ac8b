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
// How long before its deadline a removal cuts off those whom it waits for.
constexpr std::int64_t kCutNs = 100'000'000;
constexpr std::int64_t kMinWaitNs = 1'000'000;
constexpr std::size_t kInboxMax = 4 * UcxServer::kPeersMax;

}  // namespace

UcxServer::UcxServer(std::shared_ptr<UcxCore> core, std::function<void()> tend)
    : core_(std::move(core)), tend_(std::move(tend)) {
    worker_ = std::make_unique<UcxWorker>(
        core_->library(), core_->context(),
        [this](UcxMessage &message) {
            if (inbox_.size() < kInboxMax) inbox_.push_back(std::move(message));
        },
        [this](const UcxPartHead &head, const void *data, std::size_t bytes) {
            OnPart(head, data, bytes);
        });
    thread_ = std::thread([this] { Run(); });
}

UcxServer::~UcxServer() {
    Stop();
    worker_.reset();
    for (const auto &[id, region] : regions_) {
        if (region.memory != nullptr) core_->Unmap(region.memory);
    }
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
    if (core_->options().one_sided) {
        region.memory = core_->Map(address, bytes, writable);
        try {
            region.key = core_->Key(region.memory);
            if (region.key.size() > kUcxTailBytesMax) {
                throw UcxFailure(UcxFailure::Kind::kLibrary, "ucx: a region's key is too long");
            }
        } catch (...) {
            core_->Unmap(region.memory);
            throw;
        }
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
    for (auto &[session, peer] : peers_) peer.outbox->DropRegion(id);
    worker_->Wake();
    const auto is_used = [this, id] {
        const auto found = regions_.find(id);
        return found != regions_.end() &&
               (found->second.uses > 0 || !found->second.holders.empty());
    };
    bool is_cut = false;
    while (is_used()) {
        const std::int64_t left = deadline_ns - SteadyNowNs();
        if (left <= 0) return false;
        if (!is_cut && left <= kCutNs) {
            CutOff(id);
            is_cut = true;
            worker_->Wake();
        }
        const std::int64_t until = is_cut ? left : left - kCutNs;
        handed_back_.wait_for(lock, std::chrono::nanoseconds(std::max(until, kMinWaitNs)));
    }
    const auto found = regions_.find(id);
    if (found == regions_.end()) return true;  // another thread removed it too
    if (found->second.memory != nullptr) core_->Unmap(found->second.memory);
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
    const std::uint64_t session = reply.session;
    peer.outbox = std::make_unique<UcxOutbox>(
        *worker_, [this, session](const UcxPartHead &head) { OnSent(session, head); });
    peers_.emplace(session, std::move(peer));
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
    reply.one_sided = core_->options().one_sided ? 1 : 0;
    worker_->Send(peer.ep, EncodeUcx(reply));
}

void UcxServer::Open(std::uint64_t session, Peer &peer, const UcxHead &head) {
    UcxHead reply;
    reply.kind = UcxKind::kOpened;
    reply.region = head.region;
    const auto found = regions_.find(head.region);
    if (found == regions_.end() || found->second.is_removed || found->second.key.empty()) {
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
    std::unique_ptr<UcxOutbox> outbox = std::move(found->second.outbox);
    peers_.erase(found);
    busy_.erase(session);
    outbox->DropAll();
    ending_.push_back(std::move(outbox));
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

// --- moves by messages

void UcxServer::OnPart(const UcxPartHead &head, const void *data, std::size_t bytes) {
    const auto found = peers_.find(head.session);
    if (found == peers_.end() || !found->second.is_proved) return;
    if (head.kind == UcxPartKind::kRead) OnRead(found->second, head);
    if (head.kind == UcxPartKind::kWrite) OnWrite(found->second, head, data, bytes);
}

UcxServer::Region *UcxServer::Find(const UcxPartHead &head, std::uint64_t here_bytes) {
    const auto found = regions_.find(head.region);
    if (found == regions_.end() || found->second.is_removed) return nullptr;
    return IsInside(head, found->second.bytes, here_bytes) ? &found->second : nullptr;
}

void UcxServer::OnRead(Peer &peer, const UcxPartHead &head) {
    Region *region = Find(head, head.bytes);
    if (region == nullptr || head.bytes == 0) {
        const UcxAnswer answer = region == nullptr ? UcxAnswer::kNoRegion : UcxAnswer::kOk;
        answers_.push_back({head.session, head.part, answer});
        return;
    }
    UcxPartHead reply = head;
    reply.kind = UcxPartKind::kData;
    ++region->uses;
    peer.outbox->Push(reply,
                      reinterpret_cast<const std::uint8_t *>(region->base) + head.offset + head.at);
    busy_.insert(head.session);
}

void UcxServer::OnWrite(Peer &peer, const UcxPartHead &head, const void *data, std::size_t bytes) {
    Region *region = Find(head, bytes);
    if (region == nullptr || !region->writable) {
        peer.writing.erase(head.part);
        answers_.push_back({head.session, head.part, UcxAnswer::kNoRegion});
        return;
    }
    if (bytes > 0) {
        std::memcpy(reinterpret_cast<std::uint8_t *>(region->base) + head.offset + head.at, data,
                    bytes);
    }
    const auto [writing, is_first] = peer.writing.try_emplace(head.part, head.bytes);
    writing->second -= std::min<std::uint64_t>(bytes, writing->second);
    if (writing->second > 0) return;
    peer.writing.erase(writing);
    answers_.push_back({head.session, head.part, UcxAnswer::kOk});
}

void UcxServer::OnSent(std::uint64_t session, const UcxPartHead &head) {
    const auto found = regions_.find(head.region);
    if (found == regions_.end()) return;
    --found->second.uses;
    if (!found->second.is_removed) return;
    answers_.push_back({session, head.part, UcxAnswer::kNoRegion});
    handed_back_.notify_all();
}

// Ends the peers that do not take what was sent to them of a region.
void UcxServer::CutOff(std::uint64_t region) {
    std::vector<std::uint64_t> slow;
    for (const auto &[session, peer] : peers_) {
        if (peer.outbox->has_region(region)) slow.push_back(session);
    }
    for (const std::uint64_t session : slow) Drop(session);
}

void UcxServer::Pump() {
    for (const Answered &answered : std::exchange(answers_, {})) {
        const auto found = peers_.find(answered.session);
        if (found == peers_.end()) continue;
        UcxHead head;
        head.kind = UcxKind::kAnswered;
        head.part = answered.part;
        head.answer = answered.answer;
        worker_->Send(found->second.ep, EncodeUcx(head));
    }
    for (auto session = busy_.begin(); session != busy_.end();) {
        Peer &peer = peers_.at(*session);
        if (!peer.outbox->Pump(peer.ep)) failed_.push_back(peer.ep);
        session = peer.outbox->is_empty() ? busy_.erase(session) : std::next(session);
    }
    std::erase_if(ending_, [](const auto &outbox) { return outbox->in_flight() == 0; });
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
            Pump();
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
