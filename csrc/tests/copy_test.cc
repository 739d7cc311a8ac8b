// Proves that copies are exact and free of data races with several caller threads at once, in the
// parent and in a child of fork(). Run under TSan and ASan.
//
//   g++ -std=c++20 -fsanitize=thread -Icsrc csrc/tests/copy_test.cc csrc/copy/*.cc csrc/core/*.cc
#include "copy/copy.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "copy/plan.h"
#include "copy/workers.h"
#include "core/check.h"

namespace kvstore {
namespace {

constexpr std::int64_t kBlocks = 12;
constexpr int kCallers = 4;

// Two tensors of `piece` bytes a token and block, so that a block falls into many pieces.
struct Engine {
    std::vector<std::uint8_t> memory;
    CopyPlan plan;
    std::size_t half;

    Engine(std::size_t piece, std::uint32_t pieces) : half(piece * pieces) {
        memory.resize(2 * kBlocks * half);
        for (std::size_t i = 0; i < memory.size(); ++i) {
            memory[i] = static_cast<std::uint8_t>((i * 2654435761U) >> 13);
        }
        std::vector<Run> runs;
        for (std::size_t part = 0; part < 2; ++part) {
            // Pieces lie in reverse, so that they cannot be merged.
            std::uint8_t *last = memory.data() + part * kBlocks * half + (pieces - 1) * piece;
            runs.push_back({last, static_cast<std::int64_t>(half),
                            -static_cast<std::int64_t>(piece), part * half, piece, pieces,
                            static_cast<std::uint32_t>(piece)});
        }
        const std::string wrong = MakePlan(runs, 2 * half, kBlocks, &plan);
        KV_CHECK(wrong.empty());
    }

    // The same memory as pieces that lie elsewhere in every block.
    Engine Scattered(std::size_t piece) const {
        Engine made = *this;
        const std::size_t pieces = 2 * half / piece;
        std::vector<std::uint64_t> addresses;
        for (std::size_t b = 0; b < kBlocks; ++b) {
            for (std::size_t p = 0; p < pieces; ++p) {
                const std::size_t place = b * pieces + (p * 7 + b) % pieces;
                addresses.push_back(
                    reinterpret_cast<std::uintptr_t>(made.memory.data() + place * piece));
            }
        }
        const std::vector<std::uint64_t> sizes(pieces, piece);
        const std::string wrong =
            MakeScatteredPlan(addresses.data(), kBlocks, sizes.data(), pieces, true, &made.plan);
        KV_CHECK(wrong.empty() && !made.plan.addresses.empty());
        return made;
    }
};

void RoundTrips(const Engine &source, std::uint32_t seed) {
    const std::size_t bytes = source.plan.block_bytes;
    std::vector<std::uint8_t> arena(kBlocks * bytes);
    std::vector<std::uint8_t *> blocks;
    std::vector<std::int64_t> ids;
    for (std::int64_t i = 0; i < kBlocks; ++i) {
        blocks.push_back(arena.data() + static_cast<std::size_t>(i) * bytes);
        ids.push_back((i * 5 + seed) % kBlocks);
    }
    std::vector<std::uint64_t> sums(kBlocks), again(kBlocks);
    Engine target = source;
    for (std::size_t r = 0; r < target.plan.runs.size(); ++r) {
        Run &run = target.plan.runs[r];
        if (run.base != nullptr)
            run.base = target.memory.data() + (run.base - source.memory.data());
    }
    for (std::uint8_t *&address : target.plan.addresses) {
        address = target.memory.data() + (address - source.memory.data());
    }
    for (int threads = 1; threads <= 4; ++threads) {
        std::fill(arena.begin(), arena.end(), std::uint8_t{0});
        std::fill(target.memory.begin(), target.memory.end(), std::uint8_t{0});
        GatherBlocks(source.plan, ids.data(), blocks.data(), kBlocks, sums.data(), threads);
        ChecksumBlocks(blocks.data(), kBlocks, bytes, again.data(), threads);
        KV_CHECK(sums == again);
        ScatterBlocks(target.plan, ids.data(), blocks.data(), kBlocks, again.data(), threads);
        KV_CHECK(sums == again);
        KV_CHECK(target.memory == source.memory);
        std::fill(arena.begin(), arena.end(), std::uint8_t{0});
        GatherRange(source.plan, ids.data(), blocks.data(), kBlocks, 0, bytes / 3, threads);
        GatherRange(source.plan, ids.data(), blocks.data(), kBlocks, bytes / 3, bytes, threads);
        ChecksumBlocks(blocks.data(), kBlocks, bytes, again.data(), threads);
        KV_CHECK(sums == again);
    }
}

void AllCallers() {
    const Engine whole_stripes(1024, 64), odd(777, 81), big(64 << 10, 2), tiny(3, 20);
    const Engine scattered = whole_stripes.Scattered(1024), odd_scattered = odd.Scattered(777);
    std::vector<std::thread> callers;
    for (std::uint32_t caller = 0; caller < kCallers; ++caller) {
        callers.emplace_back([&, caller] {
            for (const Engine *engine :
                 {&whole_stripes, &odd, &big, &tiny, &scattered, &odd_scattered}) {
                RoundTrips(*engine, caller);
            }
        });
    }
    for (std::thread &caller : callers) caller.join();
}

// Every item is visited exactly once, however many threads are asked for.
void ParallelForVisitsAll() {
    for (const std::size_t items : {1U, 7U, 1000U}) {
        for (const int threads : {1, 2, 64}) {
            std::vector<int> seen(items);
            ParallelFor(
                items, 3, threads,
                [](void *context, std::size_t begin, std::size_t end) {
                    auto &visits = *static_cast<std::vector<int> *>(context);
                    for (std::size_t i = begin; i < end; ++i) ++visits[i];
                },
                &seen);
            KV_CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
        }
    }
}

// TSan does not follow a threaded process through fork(), so this part is left out under it.
void ChildOfFork() {
#if !defined(__SANITIZE_THREAD__)
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);  // a child that hangs dies, and so fails the test
        RoundTrips(Engine(1024, 64), 1);
        _exit(0);
    }
    int status = -1;
    KV_CHECK(waitpid(child, &status, 0) == child && status == 0);
#endif
}

}  // namespace
}  // namespace kvstore

int main() {
    kvstore::ParallelForVisitsAll();
    kvstore::AllCallers();
    kvstore::ChildOfFork();
    std::puts("copy_test: ok");
}
