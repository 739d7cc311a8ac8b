// io_uring by its three system calls; liburing is not needed for plain reads and writes.
// Layout of the rings: io_uring(7) and <linux/io_uring.h>.
#include <linux/io_uring.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <vector>

#include "core/check.h"
#include "io/file.h"

namespace kvstore {
namespace {

// A request of more than 2 GiB - 4 KiB is truncated by the kernel anyway.
constexpr std::size_t kMaxTransfer = std::size_t{1} << 30;

int Setup(unsigned entries, io_uring_params *params) {
    return static_cast<int>(syscall(__NR_io_uring_setup, entries, params));
}

int Enter(int ring, unsigned submit, unsigned wait) {
    return static_cast<int>(syscall(__NR_io_uring_enter, ring, submit, wait,
                                    wait > 0 ? IORING_ENTER_GETEVENTS : 0, nullptr, 0));
}

bool SupportsReadWrite(int ring) {
    constexpr unsigned kOps = IORING_OP_WRITE + 1;
    alignas(io_uring_probe)
        std::uint8_t memory[sizeof(io_uring_probe) + kOps * sizeof(io_uring_probe_op)] = {};
    auto *probe = reinterpret_cast<io_uring_probe *>(memory);
    if (syscall(__NR_io_uring_register, ring, IORING_REGISTER_PROBE, probe, kOps) < 0) return false;
    return (probe->ops[IORING_OP_READ].flags & IO_URING_OP_SUPPORTED) != 0 &&
           (probe->ops[IORING_OP_WRITE].flags & IO_URING_OP_SUPPORTED) != 0;
}

struct Mapping {
    void *at = MAP_FAILED;
    std::size_t bytes = 0;

    Mapping() = default;
    Mapping(const Mapping &) = delete;
    Mapping &operator=(const Mapping &) = delete;
    ~Mapping() {
        if (at != MAP_FAILED) munmap(at, bytes);
    }
    bool Map(int ring, std::size_t length, std::uint64_t what) {
        bytes = length;
        at = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring,
                  static_cast<off_t>(what));
        return at != MAP_FAILED;
    }
    unsigned *Word(unsigned offset) const {
        return reinterpret_cast<unsigned *>(static_cast<std::uint8_t *>(at) + offset);
    }
};

// `mutex_` guards the rings. The kernel reads the submission tail only inside io_uring_enter (no
// polling thread), so a submission that it refuses can be taken back by resetting the tail.
class Uring : public IoQueue {
public:
    explicit Uring(unsigned depth) : depth_(depth) {}
    ~Uring() override {
        if (ring_ >= 0) close(ring_);
    }

    bool Open() {
        io_uring_params params = {};
        params.flags = IORING_SETUP_COOP_TASKRUN;
        ring_ = Setup(depth_, &params);
        if (ring_ < 0 && errno == EINVAL) {  // kernel before 5.19
            params = {};
            ring_ = Setup(depth_, &params);
        }
        if (ring_ < 0 || !SupportsReadWrite(ring_)) return false;
        const std::size_t submit_bytes = params.sq_off.array + params.sq_entries * sizeof(unsigned);
        const std::size_t complete_bytes =
            params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
        if (!submissions_.Map(ring_, submit_bytes, IORING_OFF_SQ_RING) ||
            !completions_.Map(ring_, complete_bytes, IORING_OFF_CQ_RING) ||
            !entries_.Map(ring_, params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES)) {
            return false;
        }
        sq_tail_ = submissions_.Word(params.sq_off.tail);
        sq_mask_ = *submissions_.Word(params.sq_off.ring_mask);
        sq_array_ = submissions_.Word(params.sq_off.array);
        cq_head_ = completions_.Word(params.cq_off.head);
        cq_tail_ = completions_.Word(params.cq_off.tail);
        cq_mask_ = *completions_.Word(params.cq_off.ring_mask);
        cqes_ = reinterpret_cast<io_uring_cqe *>(completions_.Word(params.cq_off.cqes));
        sqes_ = static_cast<io_uring_sqe *>(entries_.at);
        return true;
    }

    const char *kind() const override { return "uring"; }
    unsigned depth() const override { return depth_; }

    void Run(const IoRequest *requests, std::size_t n, const OnDone &done) override {
        std::lock_guard<std::mutex> lock(mutex_);
        std::vector<std::size_t> moved(n, 0);  // bytes transferred so far
        std::vector<std::size_t> again;        // to be continued or redone
        // Nothing below may throw while the kernel holds pointers into the caller's memory.
        again.reserve(2 * depth_);
        batch_.reserve(depth_);
        std::size_t next = 0;
        unsigned in_flight = 0;
        while (next < n || in_flight > 0 || !again.empty()) {
            batch_.clear();
            while (in_flight + batch_.size() < depth_ && (next < n || !again.empty())) {
                std::size_t index;
                if (again.empty()) {
                    index = next++;
                } else {
                    index = again.back();
                    again.pop_back();
                }
                batch_.push_back(index);
            }
            in_flight += Submit(requests, moved.data(), in_flight, &again, done);
            in_flight -= Reap(requests, moved.data(), &again, done);
        }
    }

private:
    // Queues batch_ and waits for at least one completion. Returns how many are now in flight on
    // top of `in_flight`; those that the kernel refuses go to `again`, or are done with its error.
    unsigned Submit(const IoRequest *requests, const std::size_t *moved, unsigned in_flight,
                    std::vector<std::size_t> *again, const OnDone &done) {
        const unsigned start = *sq_tail_;
        for (std::size_t i = 0; i < batch_.size(); ++i) {
            const IoRequest &request = requests[batch_[i]];
            const unsigned slot = (start + static_cast<unsigned>(i)) & sq_mask_;
            io_uring_sqe *entry = &sqes_[slot];
            std::memset(entry, 0, sizeof(*entry));
            entry->opcode = request.write ? IORING_OP_WRITE : IORING_OP_READ;
            entry->fd = request.fd;
            entry->off = request.offset + moved[batch_[i]];
            entry->addr = reinterpret_cast<std::uint64_t>(request.data + moved[batch_[i]]);
            entry->len =
                static_cast<unsigned>(std::min(request.bytes - moved[batch_[i]], kMaxTransfer));
            entry->user_data = batch_[i];
            sq_array_[slot] = slot;
        }
        const unsigned total = static_cast<unsigned>(batch_.size());
        std::atomic_ref<unsigned>(*sq_tail_).store(start + total, std::memory_order_release);
        unsigned submitted = 0;
        int error = 0;
        while (submitted < total || total == 0) {
            const int result = Enter(ring_, total - submitted, 1);
            if (result > 0) {
                submitted += static_cast<unsigned>(result);
            } else if (result == 0 && total == 0) {
                return 0;
            } else if (result == 0 || errno == EAGAIN || errno == EBUSY) {
                // Out of kernel resources: what is in flight will land and free some.
                if (in_flight + submitted > 0) break;
                sched_yield();
            } else if (errno != EINTR) {
                error = errno;
                break;
            }
        }
        if (submitted < total || error != 0) Withdraw(start, submitted, error, again, done);
        return submitted;
    }

    // Takes back what the kernel did not accept: to be redone, or reported as failed.
    void Withdraw(unsigned start, unsigned submitted, int error, std::vector<std::size_t> *again,
                  const OnDone &done) {
        std::atomic_ref<unsigned>(*sq_tail_).store(start + submitted, std::memory_order_release);
        for (std::size_t i = submitted; i < batch_.size(); ++i) {
            if (error == 0) {
                again->push_back(batch_[i]);
            } else {
                done(batch_[i], error);
            }
        }
        if (submitted == 0) sched_yield();
    }

    unsigned Reap(const IoRequest *requests, std::size_t *moved, std::vector<std::size_t> *again,
                  const OnDone &done) {
        unsigned reaped = 0;
        unsigned head = *cq_head_;
        while (head != std::atomic_ref<unsigned>(*cq_tail_).load(std::memory_order_acquire)) {
            const io_uring_cqe completion = cqes_[head & cq_mask_];
            ++head;
            std::atomic_ref<unsigned>(*cq_head_).store(head, std::memory_order_release);
            ++reaped;
            const std::size_t index = completion.user_data;
            const IoRequest &request = requests[index];
            if (completion.res == -EINTR || completion.res == -EAGAIN) {
                again->push_back(index);
            } else if (completion.res < 0) {
                done(index, -completion.res);
            } else if (completion.res == 0 && request.bytes > 0) {
                done(index, request.write ? EIO : ENODATA);
            } else {
                moved[index] += static_cast<std::size_t>(completion.res);
                KV_CHECK(moved[index] <= request.bytes);
                if (moved[index] == request.bytes) {
                    done(index, 0);
                } else {
                    again->push_back(index);
                }
            }
        }
        return reaped;
    }

    const unsigned depth_;
    std::mutex mutex_;
    int ring_ = -1;
    Mapping submissions_, completions_, entries_;
    unsigned *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
    unsigned sq_mask_ = 0, cq_mask_ = 0;
    io_uring_cqe *cqes_ = nullptr;
    io_uring_sqe *sqes_ = nullptr;
    std::vector<std::size_t> batch_;
};

}  // namespace

std::unique_ptr<IoQueue> OpenUring(unsigned depth) {
    auto queue = std::make_unique<Uring>(depth);
    if (!queue->Open()) return nullptr;
    return queue;
}

}  // namespace kvstore
