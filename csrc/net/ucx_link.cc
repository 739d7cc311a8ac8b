#include "net/ucx_link.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "copy/copy.h"
#include "core/store_core.h"

namespace kvstore {
namespace {

using Kind = UcxFailure::Kind;

constexpr std::int64_t kMs = 1'000'000;
// How often a sleeping thread looks at its cancel flag.
constexpr std::int64_t kNapNs = 10 * kMs;
// How long a move that has to end waits for what is under way, which keeps the link.
constexpr std::int64_t kGraceNs = 100 * kMs;
constexpr std::size_t kInboxMax = 1024;
constexpr std::size_t kRepliesMax = 256;
constexpr int kTendMax = 16;

}  // namespace

// --- connecting

UcxLink::UcxLink(std::shared_ptr<UcxCore> core, const std::vector<std::uint8_t> &address,
                 std::uint64_t epoch, const std::string &secret, std::int64_t deadline_ns)
    : core_(std::move(core)), last_event_ns_(SteadyNowNs()) {
    worker_ = std::make_unique<UcxWorker>(
        core_->library(), core_->context(),
        [this](UcxMessage &message) {
            if (inbox_.size() < kInboxMax) inbox_.push_back(std::move(message));
        },
        [this](const UcxPartHead &head, const void *data, std::size_t bytes) {
            messages_->OnPart(head, data, bytes);
        });
    messages_ = std::make_unique<UcxMessages>(*worker_);
    const auto on_error = [](void *self, ucx::Ep, ucx::Status status) {
        auto *link = static_cast<UcxLink *>(self);
        link->Fail(link->core_->library().Text(status));
    };
    ep_ = worker_->Connect(address, {on_error, this});
    Lock lock(mutex_);
    Greet(lock, epoch, secret, deadline_ns);
    transports_ = NameOfTransports();
    StopDriving();
}

UcxLink::~UcxLink() {
    if (core_->is_forked()) {
        (void)worker_.release();  // the parent's
        return;
    }
    for (const auto &[id, remote] : remotes_) {
        if (remote->key != nullptr && worker_ != nullptr)
            core_->api().ucp_rkey_destroy(remote->key);
    }
}

void UcxLink::Greet(Lock &lock, std::uint64_t epoch, const std::string &secret,
                    std::int64_t deadline_ns) {
    UcxHead hello;
    hello.epoch = epoch;
    FillRandom(hello.nonce, kUcxNonceBytes);
    const std::vector<std::uint8_t> address = worker_->Address();
    worker_->Send(ep_, EncodeUcx(hello, address.data(), address.size()));
    UcxMessage reply;
    AwaitReply(lock, UcxKind::kChallenge, deadline_ns, &reply);
    std::uint8_t wanted[kUcxProofBytes];
    MakeUcxProof(UcxSide::kServer, secret, hello.nonce, reply.head.nonce, reply.head.epoch, wanted);
    if (!IsSameProof(wanted, reply.head.proof)) {
        throw UcxFailure(Kind::kRefused, "ucx: the peer does not know the secret");
    }
    if (reply.head.answer != UcxAnswer::kOk) {
        throw UcxFailure(Kind::kRefused, "ucx: the peer's epoch is " +
                                             std::to_string(reply.head.epoch) + ", not " +
                                             std::to_string(epoch));
    }
    session_ = reply.head.session;
    epoch_ = reply.head.epoch;
    UcxHead proof;
    proof.kind = UcxKind::kProof;
    proof.session = session_;
    MakeUcxProof(UcxSide::kClient, secret, hello.nonce, reply.head.nonce, epoch_, proof.proof);
    worker_->Send(ep_, EncodeUcx(proof));
    AwaitReply(lock, UcxKind::kWelcome, deadline_ns, &reply);
    if (reply.head.answer != UcxAnswer::kOk) {
        throw UcxFailure(Kind::kRefused, "ucx: the peer refuses our secret");
    }
    one_sided_ = core_->options().one_sided && reply.head.one_sided != 0;
    messages_->set_session(session_);
}

void UcxLink::AwaitReply(Lock &lock, UcxKind kind, std::int64_t deadline_ns, UcxMessage *reply) {
    for (;;) {
        const auto found =
            std::find_if(replies_.begin(), replies_.end(),
                         [kind](const UcxMessage &m) { return m.head.kind == kind; });
        if (found != replies_.end()) {
            *reply = std::move(*found);
            replies_.erase(found);
            return;
        }
        if (is_failed_) throw UcxFailure(Kind::kPeer, "ucx: " + failure_);
        if (SteadyNowNs() >= deadline_ns) {
            throw UcxFailure(Kind::kTimeout, "ucx: the peer did not answer in time");
        }
        Advance(lock, deadline_ns);
    }
}

std::string UcxLink::NameOfTransports() {
    ucx::TransportEntry entries[8] = {};
    ucx::EpAttr attr = {};
    attr.field_mask = ucx::kEpAttrTransports;
    attr.transports = {entries, 8, sizeof(entries[0])};
    if (core_->api().ucp_ep_query(ep_, &attr) != ucx::kOk) return "";
    std::string names;
    for (unsigned i = 0; i < std::min(attr.transports.num_entries, 8u); ++i) {
        if (entries[i].transport_name == nullptr || entries[i].device_name == nullptr) break;
        const std::string name =
            std::string(entries[i].transport_name) + "/" + entries[i].device_name;
        if (names.find(name) == std::string::npos) names += (names.empty() ? "" : " ") + name;
    }
    return names;
}

// --- moving

void UcxLink::Move(UcxOp op, std::uint64_t region, const UcxBatch &batch, std::int64_t deadline_ns,
                   const CancelFlag *cancel, PieceStatus *statuses) {
    Lock lock(mutex_);
    const auto all = [&](PieceStatus status) { std::fill(statuses, statuses + batch.n, status); };
    if (is_failed_ || is_closing_) return all(PieceStatus::kLost);
    if (batch.n == 0) return;
    if (moving_++ == 0) last_event_ns_ = SteadyNowNs();
    const auto make = [&](const UcxRemote &remote) {
        return std::make_unique<UcxMove>(core_->api(), ep_, one_sided_ ? nullptr : messages_.get(),
                                         remote, op, batch, statuses, &has_done_);
    };
    if (one_sided_) {
        UcxRemote *remote = nullptr;
        const PieceStatus opened = Open(lock, region, deadline_ns, cancel, &remote);
        if (opened != PieceStatus::kOk) {
            all(opened);
        } else {
            ++remote->users;
            MoveBy(lock, remote, make(*remote), batch, deadline_ns, cancel, statuses);
        }
    } else {
        UcxRemote remote;
        remote.id = region;
        MoveBy(lock, nullptr, make(remote), batch, deadline_ns, cancel, statuses);
    }
    StopDriving();
    --moving_;
}

void UcxLink::MoveBy(Lock &lock, UcxRemote *remote, std::unique_ptr<UcxMove> move,
                     const UcxBatch &batch, std::int64_t deadline_ns, const CancelFlag *cancel,
                     PieceStatus *statuses) {
    const PieceStatus ended = Run(lock, *move, batch, deadline_ns, cancel, statuses);
    move->Abandon(ended);
    messages_->Forget(*move);
    if (move->in_flight() > 0) Drain(lock, *move);
    if (move->in_flight() > 0) {
        Fail("a move was ended before the peer did");
        orphans_.emplace_back(std::move(move), remote);
        AfterProgress();
    } else {
        Release(remote);
    }
}

// The status of what is not whole in the end.
PieceStatus UcxLink::Run(Lock &lock, UcxMove &move, const UcxBatch &batch, std::int64_t deadline_ns,
                         const CancelFlag *cancel, PieceStatus *statuses) {
    const UcxQuiet quiet;
    for (;;) {
        if (!is_failed_ && !move.Issue()) Fail("a request failed (" + LastUcxLog() + ")");
        if (move.has_arrived()) {
            const std::vector<std::uint32_t> arrived = move.TakeArrived();
            const bool checked = batch.sums != nullptr && move.op() == UcxOp::kRead;
            if (checked) {
                StopDriving();
                lock.unlock();
            }
            for (const std::uint32_t i : arrived) {
                const void *at = reinterpret_cast<const void *>(batch.local_addresses[i]);
                const bool same = !checked || Xxh3(at, batch.lengths[i]) == batch.sums[i];
                statuses[i] = same ? PieceStatus::kOk : PieceStatus::kDamaged;
            }
            if (checked) lock.lock();
            continue;
        }
        if (move.is_complete()) return PieceStatus::kLost;  // of parts that failed
        if (is_failed_ || is_closing_) return PieceStatus::kLost;
        const std::int64_t now = SteadyNowNs();
        if (now >= deadline_ns) return PieceStatus::kLate;
        if (cancel != nullptr && cancel->is_set()) return PieceStatus::kCancelled;
        if (now - last_event_ns_ > core_->timeout_ns()) {
            Fail("nothing came for " + std::to_string(core_->timeout_ns() / kMs) + " ms");
            continue;
        }
        Advance(lock, deadline_ns);
        // Others get a turn.
        lock.unlock();
        lock.lock();
    }
}

void UcxLink::Drain(Lock &lock, UcxMove &move) {
    const std::int64_t end = SteadyNowNs() + kGraceNs;
    while (move.in_flight() > 0 && SteadyNowNs() < end) Advance(lock, end);
}

PieceStatus UcxLink::Open(Lock &lock, std::uint64_t region, std::int64_t deadline_ns,
                          const CancelFlag *cancel, UcxRemote **remote) {
    const auto known = remotes_.find(region);
    if (known != remotes_.end()) {
        *remote = known->second.get();
        return known->second->is_revoked ? PieceStatus::kRefused : PieceStatus::kOk;
    }
    UcxHead head;
    head.kind = UcxKind::kOpen;
    head.session = session_;
    head.region = region;
    worker_->Send(ep_, EncodeUcx(head));
    for (;;) {
        const auto opened = remotes_.find(region);
        if (opened != remotes_.end()) {
            *remote = opened->second.get();
            return opened->second->is_revoked ? PieceStatus::kRefused : PieceStatus::kOk;
        }
        const auto refused =
            std::find_if(replies_.begin(), replies_.end(), [region](const UcxMessage &m) {
                return m.head.kind == UcxKind::kOpened && m.head.region == region;
            });
        if (refused != replies_.end()) {
            replies_.erase(refused);
            return PieceStatus::kRefused;
        }
        if (is_failed_ || is_closing_) return PieceStatus::kLost;
        const std::int64_t now = SteadyNowNs();
        if (now >= deadline_ns) return PieceStatus::kLate;
        if (cancel != nullptr && cancel->is_set()) return PieceStatus::kCancelled;
        if (now - last_event_ns_ > core_->timeout_ns()) Fail("the peer does not answer");
        Advance(lock, deadline_ns);
    }
}

// --- progress

void UcxLink::Advance(Lock &lock, std::int64_t deadline_ns) {
    const std::thread::id self = std::this_thread::get_id();
    const std::int64_t nap_ns = std::min(kNapNs, deadline_ns - SteadyNowNs());
    if (driver_ != std::thread::id() && driver_ != self) {
        if (is_asleep_) worker_->Wake();  // what we just began may need it
        ++waiting_;
        changed_.wait_for(lock, std::chrono::nanoseconds(nap_ns));
        --waiting_;
        return;
    }
    driver_ = self;
    has_done_ = false;
    const unsigned events = worker_->Progress();
    AfterProgress();
    if (has_done_ && waiting_ > 0) changed_.notify_all();
    const std::int64_t now = SteadyNowNs();
    if (events > 0) {
        last_event_ns_ = now;
    } else if (now - last_event_ns_ > core_->spin_ns() && worker_->Arm()) {
        is_asleep_ = true;
        lock.unlock();
        worker_->WaitForEvents(static_cast<int>(std::max(nap_ns / kMs, std::int64_t{1})));
        lock.lock();
        is_asleep_ = false;
    }
}

void UcxLink::StopDriving() {
    if (driver_ == std::this_thread::get_id()) driver_ = std::thread::id();
    if (waiting_ > 0) changed_.notify_all();
}

void UcxLink::AfterProgress() {
    const UcxQuiet quiet;
    for (UcxMessage &message : std::exchange(inbox_, {})) Take(message);
    if (is_failed_ && ep_ != nullptr) worker_->Close(std::exchange(ep_, nullptr));
    for (std::size_t i = orphans_.size(); i-- > 0;) {
        if (orphans_[i].first->in_flight() > 0) continue;
        Release(orphans_[i].second);
        orphans_.erase(orphans_.begin() + static_cast<std::ptrdiff_t>(i));
    }
}

void UcxLink::Take(UcxMessage &message) {
    const UcxHead &head = message.head;
    if (head.kind == UcxKind::kPing) return;  // an event, which is all that it is for
    if (head.kind == UcxKind::kAnswered) return messages_->OnAnswer(head.part, head.answer);
    const bool is_key = head.kind == UcxKind::kOpened && head.answer == UcxAnswer::kOk;
    if (head.kind == UcxKind::kRevoke) {
        const auto found = remotes_.find(head.region);
        if (found != remotes_.end()) found->second->is_revoked = true;
        if (found == remotes_.end() || found->second->users == 0) HandBack(head.region);
    } else if (is_key && ep_ != nullptr && !remotes_.contains(head.region)) {
        auto remote = std::make_unique<UcxRemote>();
        remote->id = head.region;
        remote->base = head.base;
        remote->bytes = head.bytes;
        remote->writable = head.writable != 0;
        const ucx::Status status =
            core_->api().ucp_ep_rkey_unpack(ep_, message.tail.data(), &remote->key);
        if (status != ucx::kOk) return Fail("a key of the peer: " + core_->library().Text(status));
        remotes_.emplace(head.region, std::move(remote));
    } else if (!is_key) {
        if (replies_.size() >= kRepliesMax) replies_.erase(replies_.begin());
        replies_.push_back(std::move(message));
    }
}

void UcxLink::Release(UcxRemote *remote) {
    if (remote != nullptr && --remote->users == 0 && remote->is_revoked) HandBack(remote->id);
}

void UcxLink::HandBack(std::uint64_t region) {
    const auto found = remotes_.find(region);
    if (found != remotes_.end()) {
        core_->api().ucp_rkey_destroy(found->second->key);
        remotes_.erase(found);
    }
    UcxHead head;
    head.kind = UcxKind::kRevoked;
    head.session = session_;
    head.region = region;
    if (ep_ != nullptr) worker_->Send(ep_, EncodeUcx(head));
}

void UcxLink::Fail(const std::string &why) {
    if (!is_failed_) failure_ = why;
    is_failed_ = true;
}

bool UcxLink::is_alive() {
    Tend();
    Lock lock(mutex_);
    return !is_failed_ && !is_closing_;
}

std::string UcxLink::failure() {
    Lock lock(mutex_);
    return failure_;
}

void UcxLink::Tend() {
    Lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || moving_ > 0 || worker_ == nullptr) return;
    for (int i = 0; i < kTendMax && worker_->Progress() > 0; ++i) {
    }
    AfterProgress();
}

bool UcxLink::Close(std::int64_t deadline_ns) {
    Lock lock(mutex_);
    is_closing_ = true;
    while (moving_ > 0) {
        if (SteadyNowNs() >= deadline_ns) return false;
        if (is_asleep_) worker_->Wake();
        ++waiting_;
        changed_.wait_for(lock, std::chrono::nanoseconds(kNapNs));
        --waiting_;
    }
    if (worker_ == nullptr) return true;
    Fail("closed");
    AfterProgress();
    const auto is_mine = [this] {  // else another thread may be asleep in the worker
        return driver_ == std::thread::id() || driver_ == std::this_thread::get_id();
    };
    while (!is_mine() || !orphans_.empty() || messages_->in_flight() > 0 || !worker_->IsFlushed()) {
        if (SteadyNowNs() >= deadline_ns) {
            StopDriving();
            return false;
        }
        Advance(lock, deadline_ns);
        if (worker_ == nullptr) return true;  // another thread closed it meanwhile
    }
    StopDriving();
    for (const auto &[id, remote] : remotes_) core_->api().ucp_rkey_destroy(remote->key);
    remotes_.clear();
    worker_.reset();
    return true;
}

}  // namespace kvstore
