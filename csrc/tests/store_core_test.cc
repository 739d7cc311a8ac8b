// Several threads put, load, lease, remove, clear, scrub and watch on one StoreCore of few slots
// and two tenants, with each policy, for the sanitizers; then another StoreCore adopts the arena.
//
// A block's bytes follow from its number and the writer's turn at it must not matter, so every load
// compares every byte; and each thread releases what it holds, so that in the end nothing is left.
#include "core/store_core.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <shared_mutex>
#include <thread>
#include <utility>
#include <vector>

#include "copy/block_io.h"
#include "copy/copy.h"
#include "copy/scrub.h"
#include "core/check.h"
#include "core/eviction.h"
#include "core/fair_mutex.h"

namespace {

using namespace kvstore;

constexpr std::size_t kBlockBytes = 4096 + 64;  // not a whole page, in slots of two
constexpr std::size_t kChains = 6;
constexpr std::size_t kChainBlocks = 7;
constexpr int kSteps = 1500;

BlockHash HashOf(std::size_t chain, std::size_t i) {
    // Chains share their first two blocks.
    const std::uint64_t number = i < 2 ? i + 1 : (chain + 1) * 1000 + i;
    BlockHash hash{};
    for (int word = 0; word < 4; ++word) {
        const std::uint64_t mixed = number * 0x9E3779B97F4A7C15ull + static_cast<unsigned>(word);
        std::memcpy(hash.bytes + 8 * word, &mixed, sizeof(mixed));
    }
    return hash;
}

std::uint8_t ByteOf(const BlockHash &hash) { return hash.bytes[0] ^ hash.bytes[3]; }

struct Engine {
    std::vector<std::uint8_t> memory = std::vector<std::uint8_t>(kBlockBytes * kChainBlocks);
    CopyPlan plan;

    Engine() {
        Run run;
        run.base = memory.data();
        run.block_stride = kBlockBytes;
        run.engine_stride = kBlockBytes;
        run.piece_stride = kBlockBytes;
        run.count = 1;
        run.bytes = kBlockBytes;
        const std::string wrong = MakePlan({run}, kBlockBytes, kChainBlocks, &plan);
        KV_CHECK(wrong.empty());
    }
    std::uint8_t *block(std::size_t i) { return memory.data() + i * kBlockBytes; }
};

class Worker {
public:
    Worker(StoreCore &core, NamespaceId ns, unsigned seed)
        : core_(core), ns_(ns), owner_(core.NewOwner()), dice_(seed) {
        for (std::size_t i = 0; i < kChainBlocks; ++i) ids_[i] = static_cast<std::int64_t>(i);
    }

    void Run() {
        for (int step = 0; step < kSteps; ++step) {
            PickChain();
            switch (dice_() % 9) {
                case 0:
                case 1:
                    Put();
                    break;
                case 2:
                case 3:
                    Load();
                    break;
                case 4:
                    Lease();
                    break;
                case 5:
                    TwoPhase();
                    break;
                case 6:
                    core_.Remove(ns_, &hashes_[dice_() % kChainBlocks], 1);
                    break;
                case 7:
                    Look();
                    break;
                default:
                    SsdSide();
            }
            if (step % 401 == 400) core_.Clear(ns_);
        }
        core_.ReleaseOwner(owner_);
    }

    std::size_t loaded() const { return loaded_; }

private:
    void PickChain() {
        const std::size_t chain = dice_() % kChains;
        for (std::size_t i = 0; i < kChainBlocks; ++i) hashes_[i] = HashOf(chain, i);
    }

    Chain Part() {
        const std::size_t first = dice_() % 3;
        const std::size_t n = 1 + dice_() % (kChainBlocks - first);
        if (dice_() % 8 == 0) return {&hashes_[first], n, -1, nullptr};
        return {&hashes_[first], n, static_cast<std::int64_t>(first),
                first > 0 ? &hashes_[first - 1] : nullptr};
    }

    void Put() {
        const Chain chain = Part();
        for (std::size_t i = 0; i < chain.n; ++i) {
            std::memset(engine_.block(i), ByteOf(chain.hashes[i]), kBlockBytes);
        }
        const PutResult result = PutBlocks(core_, owner_, ns_, chain, engine_.plan, ids_, 2);
        KV_CHECK(result.num_stored + result.num_present + result.num_pending + result.num_no_space +
                     result.num_orphan ==
                 chain.n);
    }

    void Load() {
        const LoadResult result = LoadBlocks(core_, owner_, ns_, hashes_, kChainBlocks,
                                             engine_.plan, ids_, dice_() % 2 == 0, 2);
        KV_CHECK(!result.corrupt);
        for (std::size_t i = 0; i < result.num_loaded; ++i) {
            CheckBytes(engine_.block(i), hashes_[i]);
        }
        loaded_ += result.num_loaded;
    }

    void Lease() {
        LeaseId lease = 0;
        Grant grants[kChainBlocks];
        // Some end at once by time, others when they are released.
        const bool expires = dice_() % 4 == 0;
        const std::size_t held =
            core_.Acquire(owner_, ns_, hashes_, kChainBlocks, expires ? 0 : StoreCore::kNever, true,
                          &lease, grants);
        if (!expires) {
            for (std::size_t i = 0; i < held; ++i) {
                CheckBytes(core_.arena().base() + grants[i].payload_offset, hashes_[i]);
            }
        }
        if (held > 0 && dice_() % 8 != 0) core_.Release(owner_, lease);  // else ReleaseOwner does
        if (leftover_++ % 64 == 63) {
            core_.ReleaseOwner(owner_);
            owner_ = core_.NewOwner();
        }
    }

    void TwoPhase() {
        const Chain chain = Part();
        ReserveStatus statuses[kChainBlocks];
        Grant grants[kChainBlocks];
        const std::uint64_t id = core_.Reserve(owner_, ns_, chain, false, statuses, grants);
        if (id == 0) return;
        std::vector<std::uint64_t> checksums;
        bool ok[kChainBlocks];
        for (std::size_t i = 0; i < chain.n; ++i) {
            if (statuses[i] != ReserveStatus::kReserved) continue;
            std::uint8_t *slot = core_.arena().base() + grants[i].payload_offset;
            std::memset(slot, ByteOf(chain.hashes[i]), kBlockBytes);
            ok[checksums.size()] = dice_() % 4 != 0;
            checksums.push_back(Xxh3(slot, kBlockBytes));
        }
        KV_CHECK(core_.ReservationSize(owner_, id) == checksums.size());
        switch (dice_() % 3) {
            case 0:
                core_.Abort(owner_, id);
                break;
            case 1:
                KV_CHECK(core_.Commit(owner_, id, checksums.data(), ok, checksums.size()));
                break;
            default:
                KV_CHECK(core_.Commit(owner_, id, checksums.data(), nullptr, checksums.size()));
        }
    }

    void Look() {
        std::uint8_t residency[kChainBlocks];
        KV_CHECK(core_.Match(ns_, hashes_, kChainBlocks, 0) <= kChainBlocks);
        core_.Residency(ns_, hashes_, kChainBlocks, residency);
        core_.WaitFor(ns_, hashes_, kChainBlocks, 0, 1, SteadyNowNs());
        core_.EventsAfter(ns_, core_.EventSequence(ns_) / 2);
        core_.Stats();
        core_.StatsOf(1);
        core_.Why(ns_, hashes_[dice_() % kChainBlocks]);
        core_.WaitForChange(core_.ChangeCount() - dice_() % 2, SteadyNowNs() + 1000);
        core_.ExpireLeases();
    }

    // As the write-behind thread and reclaim would: copies come, move and go.
    void SsdSide() {
        const std::vector<SsdRecord> known = core_.Describe(ns_, hashes_, kChainBlocks);
        for (const SsdRecord &record : known) {
            SsdPlace place = record.place;
            place.segment = static_cast<std::uint32_t>(dice_() % 4);
            place.page = static_cast<std::uint32_t>(dice_() % 64);
            if (record.place.segment == kNotOnSsd) {
                core_.SetSsd(ns_, &record.hash, &place, 1);
            } else if (dice_() % 2 == 0) {
                core_.MoveSsd(&record, &place, 1);
            } else if (dice_() % 2 == 0) {
                core_.DropSsd(ns_, record.hash, record.place.segment, record.place.page);
            }
        }
        std::vector<char> keep(known.size() + 1);
        core_.Survivors(known.data(), known.size(), reinterpret_cast<bool *>(keep.data()));
        core_.SsdGap(ns_, hashes_[kChainBlocks - 1]);
        core_.TakeGarbage();
    }

    static void CheckBytes(const std::uint8_t *bytes, const BlockHash &hash) {
        for (std::size_t i = 0; i < kBlockBytes; ++i) KV_CHECK(bytes[i] == ByteOf(hash));
    }

    StoreCore &core_;
    const NamespaceId ns_;
    OwnerId owner_;
    std::mt19937_64 dice_;
    Engine engine_;
    BlockHash hashes_[kChainBlocks];
    std::int64_t ids_[kChainBlocks];
    std::size_t loaded_ = 0;
    std::size_t leftover_ = 0;
};

// Every block that a new process finds in the arena has its bytes.
void CheckAdopted(int fd, const std::string &policy, std::size_t expected) {
    std::string error;
    auto arena = Arena::Adopt(fd, &error);
    KV_CHECK(arena != nullptr);
    StoreCore core(std::move(arena), policy);
    NamespaceId large = 0;
    NamespaceId same = 0;
    KV_CHECK(core.AddNamespace(kBlockBytes, &same) && core.AddNamespace(kBlockBytes, &large));
    const RecoverResult found = core.Recover({{0, large}, {1, same}});
    KV_CHECK(found.adopted == expected && found.quarantined == 0);
    KV_CHECK(Scrub(core, 0, SIZE_MAX).num_damaged == 0);
    const OwnerId owner = core.NewOwner();
    Engine engine;
    std::int64_t ids[kChainBlocks];
    for (std::size_t i = 0; i < kChainBlocks; ++i) ids[i] = static_cast<std::int64_t>(i);
    for (const NamespaceId ns : {large, same}) {
        for (std::size_t chain = 0; chain < kChains; ++chain) {
            BlockHash hashes[kChainBlocks];
            for (std::size_t i = 0; i < kChainBlocks; ++i) hashes[i] = HashOf(chain, i);
            const LoadResult result =
                LoadBlocks(core, owner, ns, hashes, kChainBlocks, engine.plan, ids, true, 1);
            KV_CHECK(!result.corrupt);
            for (std::size_t i = 0; i < result.num_loaded; ++i) {
                KV_CHECK(engine.block(i)[kBlockBytes / 2] == ByteOf(hashes[i]));
            }
        }
    }
    core.Clear(large);
    core.Clear(same);
    const CoreStats stats = core.Stats();
    KV_CHECK(stats.leases == 0 && stats.blocks == 0 && stats.cpu_blocks == 0);
    KV_CHECK(stats.cpu_used_bytes == 0 && stats.unverified == 0);
}

// Returns how many blocks are left in the arena.
std::size_t TestThreads(std::unique_ptr<Arena> arena, const std::string &policy) {
    StoreCore core(std::move(arena), policy);
    const TenantId guest = core.AddTenant(6 * 8192, 3 * 8192);
    NamespaceId large = 0;
    NamespaceId same = 0;
    KV_CHECK(core.AddNamespace(kBlockBytes, &large) &&
             core.AddNamespace(kBlockBytes, &same, guest));
    core.EnableEvents(64);
    std::vector<Worker> workers;
    workers.reserve(3);
    for (unsigned seed = 0; seed < 3; ++seed) {
        workers.emplace_back(core, seed == 2 ? same : large, seed + 7);
    }
    std::vector<std::thread> threads;
    for (Worker &worker : workers) threads.emplace_back(&Worker::Run, &worker);
    std::atomic<bool> done{false};
    std::thread scrubber([&] {
        std::uint64_t cursor = 0;
        while (!done.load()) {
            const ScrubResult result = Scrub(core, cursor, 3 * kBlockBytes);
            KV_CHECK(result.num_damaged == 0);
            KV_CHECK(core.StatsOf(guest).cpu_used_bytes <= 6 * 8192);
            cursor = result.cursor;
        }
    });
    for (std::thread &thread : threads) thread.join();
    done.store(true);
    scrubber.join();
    std::size_t loaded = 0;
    for (const Worker &worker : workers) loaded += worker.loaded();
    KV_CHECK(loaded > 0);
    // The copies on ssd were only records, so what stands behind them alone is no block for the
    // next process, which has no ssd.
    for (const NamespaceId ns : {large, same}) {
        for (std::size_t chain = 0; chain < kChains; ++chain) {
            for (std::size_t i = 0; i < kChainBlocks; ++i) {
                const BlockHash hash = HashOf(chain, i);
                for (const SsdRecord &known : core.Describe(ns, &hash, 1)) {
                    if (known.place.segment == kNotOnSsd) continue;
                    core.DropSsd(ns, hash, known.place.segment, known.place.page);
                }
            }
        }
    }
    const CoreStats stats = core.Stats();
    KV_CHECK(stats.leases == 0 && stats.reservations == 0);
    KV_CHECK(stats.ssd_blocks == 0 && stats.blocks == stats.cpu_blocks);
    KV_CHECK(stats.cpu_used_bytes == stats.cpu_blocks * 8192);
    return stats.cpu_blocks;
}

void TestThreadsThenAdopt(const std::string &policy) {
    std::string error;
    auto arena = Arena::Create(20 * 8192, 5 * 8192, false, &error);
    KV_CHECK(arena != nullptr);
    const int fd = dup(arena->fd());
    CheckAdopted(fd, policy, TestThreads(std::move(arena), policy));
    close(fd);
}

void TestWaitersWakeUp() {
    std::string error;
    auto arena = Arena::Create(20 * 8192, 5 * 8192, false, &error);
    StoreCore core(std::move(arena), "lru");
    NamespaceId ns = 0;
    KV_CHECK(core.AddNamespace(kBlockBytes, &ns));
    BlockHash hashes[kChainBlocks];
    for (std::size_t i = 0; i < kChainBlocks; ++i) hashes[i] = HashOf(0, i);
    std::thread waiter([&] {
        KV_CHECK(core.WaitFor(ns, hashes, kChainBlocks, 0, kChainBlocks,
                              SteadyNowNs() + 60'000'000'000) == kChainBlocks);
    });
    Engine engine;
    std::int64_t ids[kChainBlocks] = {};
    const OwnerId owner = core.NewOwner();
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(kChainBlocks); ++i) {
        const Chain one{&hashes[i], 1, i, i > 0 ? &hashes[i - 1] : nullptr};
        KV_CHECK(PutBlocks(core, owner, ns, one, engine.plan, ids, 1).num_stored == 1);
    }
    waiter.join();
}

// Who comes to read does not pass one who waits to write.
void TestReadersLetWritersIn() {
    FairMutex mutex;
    std::atomic<int> reads{0};
    std::atomic<bool> done{false};
    mutex.lock_shared();  // until readers no longer come in
    std::thread writer([&] {
        const std::unique_lock<FairMutex> lock(mutex);
        done.store(true);
    });
    std::thread reader([&] {
        while (!done.load()) {
            const std::shared_lock<FairMutex> lock(mutex);
            KV_CHECK(++reads < 10'000'000);
        }
    });
    for (int seen = -1, still = 0; still < 10000; ++still) {
        if (std::exchange(seen, reads.load()) != seen) still = 0;
        std::this_thread::yield();
    }
    mutex.unlock_shared();
    writer.join();
    reader.join();
}

}  // namespace

int main() {
    for (const std::string &policy : EvictionPolicyNames()) TestThreadsThenAdopt(policy);
    TestWaitersWakeUp();
    TestReadersLetWritersIn();
    std::puts("store_core_test: ok");
}
