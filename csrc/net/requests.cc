// What a connection does for each operation; see connection.h.
#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "copy/verify.h"
#include "core/check.h"
#include "net/connection.h"

namespace kvstore {

namespace {

// What one look at an ACQUIRE checks of blocks that were adopted: some milliseconds, in which this
// thread's other connections wait.
constexpr std::size_t kVerifyBytes = 64 << 20;
constexpr double kTtlSecondsMax = 366.0 * 24 * 3600;

// Room for the results of one call into the core. Of the thread, not of the connection, since no
// two of its requests are in the core at once; given back when a giant of a request made it large.
template <typename T>
std::vector<T> &Scratch(std::size_t n) {
    constexpr std::size_t kKept = 16384;
    thread_local std::vector<T> scratch;
    if (scratch.size() < n) scratch.resize(n);
    if (scratch.size() > kKept && n <= kKept) {
        scratch.resize(kKept);
        scratch.shrink_to_fit();
    }
    return scratch;
}

void PutU64(std::uint8_t *out, std::uint64_t value) { std::memcpy(out, &value, sizeof(value)); }

}  // namespace

template <typename Request>
bool Connection::ParseBody(Request *request) {
    if (Parse(body(), header_.length, request)) return true;
    BreakProtocol(std::string(OpName(header_.op)) + ": a body of " +
                  std::to_string(header_.length) + " bytes that is no such request");
    return false;
}

void Connection::Dispatch() {
    const auto op = static_cast<Op>(header_.op);
    if (op == Op::kHello || op == Op::kAuth || op == Op::kCall || op == Op::kQuiesced) {
        SubmitOrRefuse();
        return;
    }
    if (op == Op::kPing) {
        std::uint8_t *reply = StartReply(header_.length);
        if (header_.length > 0) std::memcpy(reply, body(), header_.length);
        FinishReply();
        return;
    }
    if (op == Op::kMap) {
        HandleMap();
        return;
    }
    if (client_->terms.block_bytes == 0) {
        Refuse(Status::kConfig, std::string(OpName(header_.op)) + ": this client has no namespace");
        return;
    }
    switch (op) {
        case Op::kMatch:
            return HandleMatch();
        case Op::kLookup:
            return HandleLookup();
        case Op::kResidency:
            return HandleResidency();
        case Op::kAcquire:
            return HandleAcquire();
        case Op::kRelease:
            return HandleRelease();
        case Op::kReserve:
            return HandleReserve();
        case Op::kCommit:
            return HandleCommit();
        case Op::kAbort:
            return HandleAbort();
        case Op::kWaitFor:
            return HandleWaitFor();
        case Op::kRead:
            return HandleRead();
        default:
            KV_CHECK(false);
    }
}

// --- looking

void Connection::HandleMatch() {
    ChainRequest request;
    if (!ParseBody(&request)) return;
    const Chain &chain = request.chain;
    const std::size_t num = core_.Match(ns(), chain.hashes, chain.n, chain.start);
    PutU64(StartReply(8), num);
    FinishReply();
}

void Connection::HandleLookup() {
    LookupRequest request;
    if (!ParseBody(&request)) return;
    const Chain &chain = request.chain;
    const std::size_t num = core_.Match(ns(), chain.hashes, chain.n, chain.start);
    std::size_t num_cpu = num;
    if (client_->terms.notices) {  // else there is no other tier
        std::vector<std::uint8_t> &residency = Scratch<std::uint8_t>(num);
        core_.Residency(ns(), chain.hashes, num, residency.data());
        const auto end = residency.begin() + static_cast<std::ptrdiff_t>(num);
        num_cpu = static_cast<std::size_t>(
            std::find_if(residency.begin(), end, [](std::uint8_t r) { return (r & 1) == 0; }) -
            residency.begin());
    }
    const bool prefetch = (request.flags & LookupRequest::kPrefetch) != 0;
    if (prefetch && num_cpu < num && client_->terms.notices) {
        Notice(kNoticePrefetch, chain, num);
    }
    std::uint8_t *reply = StartReply(16);
    PutU64(reply, num);
    PutU64(reply + 8, num_cpu);
    FinishReply();
}

void Connection::HandleResidency() {
    ChainRequest request;
    if (!ParseBody(&request)) return;
    core_.Residency(ns(), request.chain.hashes, request.chain.n, StartReply(request.chain.n));
    FinishReply();
}

void Connection::HandleWaitFor() {
    WaitForRequest request;
    if (!ParseBody(&request)) return;
    const Chain &chain = request.chain;
    const std::size_t num = core_.Match(ns(), chain.hashes, chain.n, chain.start);
    if (num < std::min<std::uint64_t>(request.want, chain.n) && KeepWaiting(request.wait_seconds)) {
        return;
    }
    PutU64(StartReply(8), num);
    FinishReply();
}

// --- reading

void Connection::HandleAcquire() {
    AcquireRequest request;
    if (!ParseBody(&request)) return;
    const Chain &chain = request.chain;
    const bool use = (request.flags & AcquireRequest::kPin) == 0;
    const std::int64_t expires =
        request.ttl_seconds < 0 ? StoreCore::kNever
                                : DeadlineAfter(started_ns_, request.ttl_seconds, kTtlSecondsMax);
    std::vector<Grant> &grants = Scratch<Grant>(chain.n);
    LeaseId lease = 0;
    std::size_t num_damaged = 0;
    bool is_left = false;
    const auto acquire = [&] {
        const std::size_t granted =
            AcquireVerified(core_, owner(), ns(), chain.hashes, chain.n, expires, use, &lease,
                            grants.data(), &num_damaged, kVerifyBytes, &is_left);
        AddTo(services_.counters.integrity_failures, num_damaged);
        return granted;
    };
    std::size_t held = acquire();
    if (is_left) {
        ParkForATurn();
        return;
    }
    if (held < chain.n && request.wait_seconds > 0 && client_->terms.notices &&
        core_.Match(ns(), chain.hashes, chain.n, chain.start) > held) {
        if (lease != 0) core_.Release(owner(), lease);
        Unpark();
        if (SubmitTask(body(), header_.length)) return;
        held = acquire();
        if (is_left) {
            ParkForATurn();
            return;
        }
    }
    if (use) CountAcquire(chain, held, num_damaged > 0);
    std::uint8_t *reply = StartReply(16 + 32 * held);
    PutU64(reply, lease);
    PutU64(reply + 8, held);
    reply += 16;
    const std::size_t column = 8 * held;
    for (std::size_t i = 0; i < held; ++i, reply += 8) {
        PutU64(reply, grants[i].payload_offset);
        PutU64(reply + column, grants[i].header_offset);
        PutU64(reply + 2 * column, grants[i].sequence);
        PutU64(reply + 3 * column, grants[i].checksum);
    }
    FinishReply();
}

// Misses have the reason of the first of them: what continues it cannot be had without it.
void Connection::CountAcquire(const Chain &chain, std::size_t held, bool damaged) {
    NetCounters &counters = services_.counters;
    AddTo(counters.queried_blocks, chain.n);
    AddTo(counters.hit_cpu_blocks, held);
    AddTo(counters.queried_tokens, chain.n * client_->terms.block_tokens);
    AddTo(counters.hit_cpu_tokens, held * client_->terms.block_tokens);
    AddTo(counters.loaded_bytes, held * client_->terms.block_bytes);
    if (held > 0 && chain.start <= 0) services_.AddUse(ns(), chain.hashes[0], held);
    if (held > 0 && client_->terms.notice_used) Notice(kNoticeUsed, chain, held);
    const std::size_t missed = chain.n - held;
    if (missed == 0) return;
    AddTo(counters.missed_blocks, missed);
    if (damaged) return AddTo(counters.missed_corrupt_blocks, missed);
    switch (core_.Why(ns(), chain.hashes[held])) {
        case MissReason::kAbsent:
            return AddTo(counters.missed_absent_blocks, missed);
        case MissReason::kPending:
            return AddTo(counters.missed_pending_blocks, missed);
        case MissReason::kEvicted:
            return AddTo(counters.missed_evicted_blocks, missed);
        case MissReason::kAvailable:
            return AddTo(counters.missed_ssd_blocks, missed);
    }
}

void Connection::HandleRelease() {
    ReleaseRequest request;
    if (!ParseBody(&request)) return;
    if (request.n > StoreCore::kLeasedMax / StoreCore::kLeaseCost) {
        Refuse(Status::kConfig,
               "release: " + std::to_string(request.n) + " are more leases than a client may have");
        return;
    }
    std::uint8_t *reply = StartReply(static_cast<std::size_t>(request.n));
    for (std::size_t i = 0; i < request.n; ++i) {
        reply[i] = core_.Release(owner(), U64At(request.leases, i)) ? 1 : 0;
    }
    FinishReply();
}

void Connection::HandleRead() {
    ReadRequest request;
    if (!ParseBody(&request)) return;
    if (!client_->terms.may_read) {
        Refuse(Status::kConfig, "read: this client may not read payload through its connection");
        return;
    }
    const std::size_t block_bytes = client_->terms.block_bytes;
    if (request.n > UINT32_MAX / block_bytes) {
        Refuse(Status::kConfig, "read: " + std::to_string(request.n) + " blocks of " +
                                    std::to_string(block_bytes) + " bytes are more than a frame");
        return;
    }
    const auto n = static_cast<std::size_t>(request.n);
    StartReply(0);
    if (n == 0) {
        FinishReply();
        return;
    }
    std::vector<Grant> grants;
    outgoing_.pin = core_.ShareLease(owner(), request.lease, request.first, request.n,
                                     services_.reader, &grants);
    if (outgoing_.pin == 0) {
        Refuse(Status::kStoreClosed, "read: the lease has ended, or does not have blocks " +
                                         std::to_string(request.first) + " to " +
                                         std::to_string(request.first + request.n));
        return;
    }
    outgoing_.blocks.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
        outgoing_.blocks[i] = core_.arena().base() + grants[i].payload_offset;
    }
    outgoing_.block_bytes = block_bytes;
    AddTo(services_.counters.read_bytes, n * block_bytes);
    SendReply(0, static_cast<std::uint64_t>(n) * block_bytes);
}

void Connection::HandleMap() {
    std::uint64_t writable = 0;
    if (!ParseBody(&writable)) return;
    const ClientTerms &terms = client_->terms;
    if (!peer_.is_local || !(writable != 0 ? terms.may_map_writable : terms.may_map)) {
        Refuse(Status::kConfig, "map: this client may not map the arena");
        return;
    }
    // Opened anew, since a duplicate would have the daemon's own rights.
    const std::string path = "/proc/self/fd/" + std::to_string(core_.arena().fd());
    const int fd = open(path.c_str(), (writable != 0 ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (fd < 0) {
        Refuse(Status::kStorage, "map: " + path + ": " + std::strerror(errno));
        return;
    }
    PutU64(StartReply(8), core_.arena().bytes());
    outgoing_.fd = fd;
    FinishReply();
}

// --- writing

void Connection::HandleReserve() {
    ReserveRequest request;
    if (!ParseBody(&request)) return;
    if (!client_->terms.may_write) {
        Refuse(Status::kConfig, "reserve: this client may read only");
        return;
    }
    const Chain &chain = request.chain;
    std::vector<ReserveStatus> &statuses = Scratch<ReserveStatus>(chain.n);
    std::vector<Grant> &grants = Scratch<Grant>(chain.n);
    std::uint64_t reservation = 0;
    const std::uint64_t before = core_.ChangeCount();
    if (services_.draining.load(std::memory_order_relaxed)) {
        std::fill_n(statuses.begin(), chain.n, ReserveStatus::kNoSpace);
    } else {
        reservation = core_.Reserve(owner(), ns(), chain, false, statuses.data(), grants.data());
        const auto end = statuses.begin() + static_cast<std::ptrdiff_t>(chain.n);
        const bool full = std::find(statuses.begin(), end, ReserveStatus::kNoSpace) != end;
        if (full && KeepWaiting(request.wait_seconds)) {
            // Two that each hold half of the room would wait for each other. Giving it back is no
            // reason to try again; what others did meanwhile is.
            seen_change_ = before;
            if (reservation == 0) return;
            const std::uint64_t between = core_.ChangeCount();
            core_.Abort(owner(), reservation);
            if (between == before && core_.ChangeCount() == between + 1) ++seen_change_;
            return;
        }
    }
    std::uint8_t *reply = StartReply(16 + 9 * chain.n);
    PutU64(reply, reservation);
    PutU64(reply + 8, chain.n);
    reply += 16;
    for (std::size_t i = 0; i < chain.n; ++i) {
        const bool reserved = statuses[i] == ReserveStatus::kReserved;
        PutU64(reply + 8 * i, reserved ? grants[i].payload_offset : 0);
        reply[8 * chain.n + i] = static_cast<std::uint8_t>(statuses[i]);
    }
    FinishReply();
}

void Connection::HandleCommit() {
    CommitRequest request;
    if (!ParseBody(&request)) return;
    if (request.reservation != 0) {
        if (!client_->Claim(request.reservation)) {
            Refuse(Status::kInUse, "commit: another connection writes to the reservation");
            return;
        }
        std::vector<std::uint64_t> &sums = Scratch<std::uint64_t>(request.m);
        if (request.m > 0) std::memcpy(sums.data(), request.checksums, 8 * request.m);
        // Claimed, so the size cannot change in between.
        const bool known =
            request.m > 0 && core_.ReservationSize(owner(), request.reservation) == request.m;
        const bool may = client_->terms.may_map_writable;
        const bool whole =
            known && may &&
            core_.Commit(owner(), request.reservation, sums.data(), nullptr, request.m);
        client_->Unclaim(request.reservation);
        if (known && !may) {
            // What lies in the slots is what somebody else's blocks left there.
            Refuse(Status::kConfig, "commit: this client may not write in place; it has to WRITE");
            return;
        }
        if (!whole) {
            Refuse(Status::kStoreClosed, "commit: there is no reservation of " +
                                             std::to_string(request.m) + " blocks of that number");
            return;
        }
    }
    Committed(request, request.reservation != 0 ? static_cast<std::size_t>(request.m) : 0);
}

// Answers COMMIT and WRITE once the blocks are published.
void Connection::Committed(const CommitRequest &request, std::size_t num_stored) {
    AddTo(services_.counters.stored_bytes, num_stored * client_->terms.block_bytes);
    if (client_->terms.notices && request.ack > 0) {
        // Python sees to the level only: what was reserved is committed already.
        const std::size_t prefix = kCommitHeadBytes + 8 * static_cast<std::size_t>(request.m) +
                                   kChainHeadBytes + sizeof(BlockHash) * request.chain.n;
        std::vector<std::uint8_t> told(body(), body() + prefix);
        PutU64(told.data(), 0);
        if (SubmitTask(told.data(), told.size())) return;
    }
    if (client_->terms.notices && num_stored > 0) {
        Notice(kNoticeStored, request.chain, request.chain.n);
    }
    const std::vector<std::uint8_t> &matched = incoming_.matched;
    std::uint8_t *reply = StartReply(8 + matched.size());
    PutU64(reply, 0);
    if (!matched.empty()) std::memcpy(reply + 8, matched.data(), matched.size());
    incoming_.matched.clear();
    FinishReply();
}

void Connection::HandleAbort() {
    std::uint64_t reservation = 0;
    if (!ParseBody(&reservation)) return;
    if (!client_->Claim(reservation)) {
        Refuse(Status::kInUse, "abort: another connection writes to the reservation");
        return;
    }
    core_.Abort(owner(), reservation);
    client_->Unclaim(reservation);
    StartReply(0);
    FinishReply();
}

}  // namespace kvstore
