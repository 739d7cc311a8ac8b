// The bulk server and its links under the sanitizers: threads read and write over shared links,
// cancel, and run out of time, while a region comes and goes and what it held is overwritten once
// its removal was granted.
//
// What a read brought is compared byte by byte; every thread writes to a part of its own and reads
// that back. Greetings are checked against RFC 4231 and with wrong secrets.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "copy/copy.h"
#include "core/check.h"
#include "core/sha256.h"
#include "core/store_core.h"
#include "net/bulk_frame.h"
#include "net/bulk_link.h"
#include "net/bulk_server.h"

namespace {

using namespace kvstore;

constexpr std::size_t kPartBytes = 256 << 10;
constexpr int kThreads = 4;
constexpr int kSteps = 40;
constexpr double kTimeout = 60.0;  // a bound, nothing passes by it
constexpr std::uint64_t kFixed = 1, kWritable = 2, kComing = 3;
constexpr std::uint64_t kEpoch = 5;
const std::string kSecret = "a secret that is long enough";

struct Listener {
    Listener() : fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
        sockaddr_in to{};
        to.sin_family = AF_INET;
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        KV_CHECK(bind(fd, reinterpret_cast<sockaddr *>(&to), sizeof(to)) == 0);
        KV_CHECK(listen(fd, 64) == 0);
        socklen_t size = sizeof(to);
        KV_CHECK(getsockname(fd, reinterpret_cast<sockaddr *>(&to), &size) == 0);
        address = "tcp:127.0.0.1:" + std::to_string(ntohs(to.sin_port));
    }
    ~Listener() { close(fd); }
    int fd;
    std::string address;
};

std::vector<std::uint8_t> Noise(std::size_t bytes, unsigned seed) {
    std::mt19937_64 random(seed);
    std::vector<std::uint8_t> noise(bytes);
    for (std::uint8_t &byte : noise) byte = static_cast<std::uint8_t>(random());
    return noise;
}

// One move of `n` pieces of `length` bytes from `offset` on.
struct Batch {
    Batch(std::uint64_t region, std::uint64_t offset, std::uint8_t *local, std::uint64_t length,
          std::size_t n)
        : offsets(n), addresses(n), lengths(n, length), sums(n), statuses(n) {
        for (std::size_t i = 0; i < n; ++i) {
            offsets[i] = offset + i * length;
            addresses[i] = reinterpret_cast<std::uint64_t>(local + i * length);
        }
        batch.region = region;
        batch.n = n;
        batch.offsets = offsets.data();
        batch.addresses = addresses.data();
        batch.lengths = lengths.data();
        batch.statuses = statuses.data();
    }
    void SumOf(const std::uint8_t *data) {
        for (std::size_t i = 0; i < sums.size(); ++i) {
            sums[i] = Xxh3(data + i * lengths[i], lengths[i]);
        }
        batch.sums = sums.data();
    }
    bool Only(std::initializer_list<PieceStatus> allowed) const {
        for (const PieceStatus status : statuses) {
            bool found = false;
            for (const PieceStatus each : allowed) found = found || status == each;
            if (!found) return false;
        }
        return true;
    }
    std::vector<std::uint64_t> offsets, addresses, lengths, sums;
    std::vector<PieceStatus> statuses;
    BulkBatch batch;
};

void TestProofs() {
    // RFC 4231, test cases 2 and 6.
    std::uint8_t out[32];
    const auto hmac = [&](const std::string &key, const std::string &message) {
        HmacSha256(reinterpret_cast<const std::uint8_t *>(key.data()), key.size(),
                   reinterpret_cast<const std::uint8_t *>(message.data()), message.size(), out);
        return static_cast<unsigned>(out[0] << 24 | out[1] << 16 | out[2] << 8 | out[3]);
    };
    KV_CHECK(hmac("Jefe", "what do ya want for nothing?") == 0x5bdcc146);
    KV_CHECK(hmac(std::string(131, '\xaa'),
                  "Test Using Larger Than Block-Size Key - Hash Key First") == 0x60e43159);
    BulkProof a{};
    BulkProof b{};
    KV_CHECK(AreSame(a, b));
    b[31] = 1;
    KV_CHECK(!AreSame(a, b));
    KV_CHECK(MakeNonce() != MakeNonce());
}

bool IsRefused(const std::string &address, const std::string &secret, std::uint64_t epoch) {
    try {
        BulkLink link(address, secret, epoch, kTimeout, 1, nullptr);
    } catch (const ClientFailure &failure) {
        return failure.kind == ClientFailure::Kind::kRemote;
    }
    return false;
}

class World {
public:
    World()
        : fixed_(Noise(4 * kPartBytes, 1)),
          writable_(kThreads * kPartBytes),
          coming_(Noise(kPartBytes, 2)),
          server_(regions_, kSecret, kEpoch, 32, 0) {
        KV_CHECK(regions_.Add(kFixed, fixed_.data(), fixed_.size(), false));
        KV_CHECK(regions_.Add(kWritable, writable_.data(), writable_.size(), true));
        KV_CHECK(server_.Listen(listener_.fd));
    }

    void Run() {
        KV_CHECK(IsRefused(listener_.address, std::string(32, 'x'), kEpoch));
        KV_CHECK(IsRefused(listener_.address, kSecret, kEpoch + 1));
        BulkLink shared(listener_.address, kSecret, kEpoch, kTimeout, 2, nullptr);
        std::thread owner([&] { ComeAndGo(); });
        std::vector<std::thread> threads;
        for (int i = 0; i < kThreads; ++i) {
            threads.emplace_back([&, i] { Work(shared, i); });
        }
        for (std::thread &thread : threads) thread.join();
        done_.store(true);
        owner.join();
        KV_CHECK(shared.is_alive());
        KV_CHECK(shared.Close());
        // Links that are in use when everything ends.
        BulkLink last(listener_.address, kSecret, kEpoch, kTimeout, 1, nullptr);
        std::vector<std::uint8_t> here(fixed_.size());
        std::thread reader([&] {
            while (true) {
                Batch read(kFixed, 0, here.data(), here.size(), 1);
                last.Move(read.batch, kTimeout, nullptr);
                if (read.statuses[0] != PieceStatus::kOk) return;
            }
        });
        server_.Stop();
        reader.join();
        KV_CHECK(!last.is_alive());
        KV_CHECK(regions_.Remove(kFixed, 0) && regions_.Remove(kWritable, 0));
    }

private:
    void Work(BulkLink &shared, int number) {
        std::mt19937_64 random(static_cast<unsigned>(number));
        std::vector<std::uint8_t> here(fixed_.size());
        BulkLink own(listener_.address, kSecret, 0, kTimeout, 1, nullptr);
        for (int step = 0; step < kSteps; ++step) {
            BulkLink &link = random() % 2 == 0 ? shared : own;
            switch (random() % 5) {
                case 0: {
                    Batch read(kFixed, 0, here.data(), kPartBytes / 8, 32);
                    read.SumOf(fixed_.data());
                    link.Move(read.batch, kTimeout, nullptr);
                    KV_CHECK(read.Only({PieceStatus::kOk}));
                    KV_CHECK(here == fixed_);
                    break;
                }
                case 1: {
                    const std::size_t at = static_cast<std::size_t>(number) * kPartBytes;
                    const std::vector<std::uint8_t> mine =
                        Noise(kPartBytes, static_cast<unsigned>(random()));
                    std::vector<std::uint8_t> copy = mine;
                    Batch write(kWritable, at, copy.data(), kPartBytes / 16, 16);
                    write.SumOf(mine.data());
                    write.batch.is_write = true;
                    link.Move(write.batch, kTimeout, nullptr);
                    KV_CHECK(write.Only({PieceStatus::kOk}));
                    std::vector<std::uint8_t> back(kPartBytes);
                    Batch read(kWritable, at, back.data(), kPartBytes, 1);
                    link.Move(read.batch, kTimeout, nullptr);
                    KV_CHECK(read.Only({PieceStatus::kOk}) && back == mine);
                    break;
                }
                case 2: {
                    // What is not refused is what the region held.
                    Batch read(kComing, 0, here.data(), kPartBytes, 1);
                    read.sums[0] = coming_sum_;
                    read.batch.sums = read.sums.data();
                    link.Move(read.batch, kTimeout, nullptr);
                    KV_CHECK(
                        read.Only({PieceStatus::kOk, PieceStatus::kRefused, PieceStatus::kLost}));
                    break;
                }
                case 3: {
                    CancelFlag flag;
                    std::thread canceller([&] { flag.Set(); });
                    Batch read(kFixed, 0, here.data(), kPartBytes, 4);
                    link.Move(read.batch, kTimeout, &flag);
                    canceller.join();
                    KV_CHECK(read.Only({PieceStatus::kOk, PieceStatus::kCancelled}));
                    break;
                }
                default: {
                    Batch read(kFixed, 0, here.data(), kPartBytes, 4);
                    link.Move(read.batch, 1e-5, nullptr);
                    KV_CHECK(read.Only({PieceStatus::kOk, PieceStatus::kLate}));
                }
            }
        }
    }

    void ComeAndGo() {
        const std::vector<std::uint8_t> held = coming_;
        while (!done_.load()) {
            KV_CHECK(regions_.Add(kComing, coming_.data(), coming_.size(), false));
            std::this_thread::yield();
            KV_CHECK(regions_.Remove(kComing, SteadyNowNs() + 60'000'000'000));
            std::memset(coming_.data(), 0, coming_.size());
            coming_ = held;
        }
    }

    Listener listener_;
    std::vector<std::uint8_t> fixed_;
    std::vector<std::uint8_t> writable_;
    std::vector<std::uint8_t> coming_;
    const std::uint64_t coming_sum_ = Xxh3(coming_.data(), coming_.size());
    Regions regions_;
    BulkServer server_;
    std::atomic<bool> done_{false};
};

}  // namespace

int main() {
    TestProofs();
    World().Run();
    std::puts("bulk_test: ok");
}
