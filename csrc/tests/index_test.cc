// BlockIndex against a map: finds, longest prefixes and frees under random inserts and removals,
// and readers that run side by side, for ThreadSanitizer.
#include "core/index.h"

#include <cstdio>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "core/check.h"

namespace {

using kvstore::BlockHash;
using kvstore::BlockIndex;
using kvstore::EntryId;

BlockHash HashOf(std::uint64_t number) {
    // A hash with few distinct prefixes and tags, so that tables collide.
    BlockHash hash{};
    const std::uint64_t word = number % 97;
    std::memcpy(hash.bytes, &word, sizeof(word));
    std::memcpy(hash.bytes + 16, &number, sizeof(number));
    return hash;
}

void TestAgainstMap(unsigned seed) {
    std::mt19937_64 dice(seed);
    BlockIndex index;
    std::map<std::uint64_t, EntryId> model;
    for (int step = 0; step < 20000; ++step) {
        const std::uint64_t number = dice() % 700;
        const auto it = model.find(number);
        if (it == model.end()) {
            KV_CHECK(index.Find(number % 3, HashOf(number)) == kvstore::kNoEntry);
            model[number] = index.Insert(number % 3, HashOf(number));
        } else if (dice() % 2 == 0) {
            index.Unmap(it->second);
            index.Free(it->second);
            model.erase(it);
        }
        KV_CHECK(index.size() == model.size());
    }
    for (const auto &[number, id] : model) {
        KV_CHECK(index.Find(number % 3, HashOf(number)) == id);
        KV_CHECK(index.Find(number % 3 + 3, HashOf(number)) == kvstore::kNoEntry);
    }
    KV_CHECK(index.Ids().size() == model.size());
}

void TestReadersSideBySide() {
    constexpr std::size_t kBlocks = 3000;
    BlockIndex index;
    std::vector<BlockHash> hashes;
    EntryId parent = kvstore::kNoEntry;
    for (std::size_t i = 0; i < kBlocks; ++i) {
        hashes.push_back(HashOf(i));
        const EntryId id = index.Insert(0, hashes.back());
        if (parent != kvstore::kNoEntry) index.LinkChild(parent, id);
        index[id].depth = static_cast<std::uint32_t>(i + 1);
        index[id].cpu = kvstore::CpuState::kReady;
        index[id].rooted = true;
        parent = id;
    }
    std::vector<std::thread> readers;
    for (unsigned seed = 0; seed < 3; ++seed) {
        readers.emplace_back([&, seed] {
            std::mt19937_64 dice(seed);
            for (int i = 0; i < 100; ++i) {
                const std::size_t n = 1 + dice() % kBlocks;
                KV_CHECK(index.MatchPrefix(0, hashes.data(), n, 0) == n);
                KV_CHECK(index.MatchPrefix(0, hashes.data(), n, -1) == n);
                KV_CHECK(index.MatchPrefix(1, hashes.data(), n, 0) == 0);
                std::vector<EntryId> found(n);
                index.FindMany(0, hashes.data(), n, found.data());
                KV_CHECK(index[found[n - 1]].depth == n);
            }
        });
    }
    for (auto &reader : readers) reader.join();
}

}  // namespace

int main() {
    for (unsigned seed = 0; seed < 5; ++seed) TestAgainstMap(seed);
    TestReadersSideBySide();
    std::puts("index_test: ok");
}
