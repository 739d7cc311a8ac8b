// The server under the sanitizers: several clients on threads of their own put, load, wait and
// leave in the middle of things, on a core of few slots, while one thread answers what would be
// Python's tasks.
//
// A block's bytes follow from its hash, so every read compares every byte; and when all have left
// nothing may be leased, reserved or parked.
#include "net/server.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "copy/copy.h"
#include "core/check.h"
#include "net/client.h"
#include "net/connection.h"

namespace {

using namespace kvstore;

constexpr std::size_t kBlockBytes = 8192 + 64;
constexpr std::size_t kBlocks = 5;
constexpr int kClients = 4;
constexpr int kSteps = 150;
constexpr double kTimeout = 60.0;  // a bound, nothing passes by it

BlockHash HashOf(std::size_t chain, std::size_t i) {
    const std::uint64_t number = i < 2 ? i + 1 : (chain + 1) * 1000 + i;
    BlockHash hash{};
    for (int word = 0; word < 4; ++word) {
        const std::uint64_t mixed = number * 0x9E3779B97F4A7C15ull + static_cast<unsigned>(word);
        std::memcpy(hash.bytes + 8 * word, &mixed, sizeof(mixed));
    }
    return hash;
}

std::vector<std::uint8_t> BytesOf(const BlockHash &hash) {
    return std::vector<std::uint8_t>(kBlockBytes, hash.bytes[0] ^ hash.bytes[3]);
}

std::string MakeDirectory() {
    std::string name = "/tmp/kvstore-server-test-" + std::string(6, 'X');
    KV_CHECK(mkdtemp(name.data()) != nullptr);
    return name;
}

int Listen(const std::string &path) {
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    unlink(path.c_str());
    KV_CHECK(bind(fd, reinterpret_cast<sockaddr *>(&address), sizeof(address)) == 0);
    KV_CHECK(listen(fd, 64) == 0);
    return fd;
}

// Admits everybody, as a client of its own or, where the greeting names one, as more of it.
void AnswerTasks(Server &server, StoreCore &core, std::atomic<int> *gone) {
    static std::atomic<std::uint64_t> next{1000};
    while (auto task = server.NextTask(SteadyNowNs() + 60'000'000'000)) {
        std::vector<std::uint8_t> body(8);
        if (task->kind == kGone) ++*gone;
        if (task->id == 0) continue;
        if (task->kind == static_cast<std::uint8_t>(Op::kHello)) {
            std::uint64_t joined = 0;
            if (task->body.size() == 8) std::memcpy(&joined, task->body.data(), 8);
            if (joined != 0) {
                server.services().roster.JoinClient(task->connection, joined);
            } else {
                ClientTerms terms;
                terms.client = joined = next++;
                terms.owner = core.NewOwner();
                terms.namespace_id = 0;
                terms.block_bytes = kBlockBytes;
                terms.notices = true;
                terms.notice_used = true;
                if (!server.services().roster.AddClient(task->connection, terms)) {
                    core.ReleaseOwner(terms.owner);
                }
            }
            std::memcpy(body.data(), &joined, 8);
        }
        server.Reply(task->id, 0, std::move(body));
    }
}

class TestClient {
public:
    TestClient(const std::string &path, std::uint64_t join) : connection_(path, kTimeout, nullptr) {
        ClientConnection::Lock lock(connection_);
        const auto body =
            connection_.Call(static_cast<std::uint8_t>(Op::kHello), {{&join, 8}}, kTimeout);
        number = U64At(body.data, 0);
    }

    std::vector<std::uint8_t> Call(Op op, std::vector<iovec> parts) {
        ClientConnection::Lock lock(connection_);
        const auto body =
            connection_.Call(static_cast<std::uint8_t>(op), std::move(parts), kTimeout);
        return {body.data, body.data + body.bytes};
    }

    void Put(std::size_t chain_number, bool by_write, bool wrong, bool leave) {
        Load(chain_number);
        double wait = wrong ? 0.001 : 0.0;
        MakeChain(chain_number);
        const auto reply =
            Call(Op::kReserve, {{&wait, 8}, {head_, sizeof(head_)}, {hashes_, sizeof(hashes_)}});
        std::uint64_t reservation = U64At(reply.data(), 0);
        if (reservation == 0) return;
        if (!by_write || leave) {
            if (!leave) Call(Op::kAbort, {{&reservation, 8}});
            return;
        }
        const std::uint8_t *statuses = reply.data() + 16 + 8 * kBlocks;
        std::vector<std::vector<std::uint8_t>> blocks;
        std::vector<std::uint64_t> sums;
        for (std::size_t i = 0; i < kBlocks; ++i) {
            if (statuses[i] != 0) continue;
            blocks.push_back(BytesOf(hashes_[i]));
            sums.push_back(Xxh3(blocks.back().data(), kBlockBytes) + (wrong ? 1 : 0));
        }
        std::uint64_t words[3] = {reservation, 0, sums.size()};
        std::vector<iovec> parts = {{words, sizeof(words)},
                                    {sums.data(), sums.size() * 8},
                                    {head_, sizeof(head_)},
                                    {hashes_, sizeof(hashes_)}};
        for (auto &block : blocks) parts.push_back({block.data(), block.size()});
        const auto written = Call(Op::kWrite, std::move(parts));
        KV_CHECK(written.size() == 8 + sums.size());
        for (std::size_t i = 0; i < sums.size(); ++i) KV_CHECK(written[8 + i] == (wrong ? 0 : 1));
    }

    void Load(std::size_t chain_number) {
        MakeChain(chain_number);
        double times[2] = {10.0, 0.0};
        std::uint64_t flags = 0;
        const auto granted = Call(Op::kAcquire, {{times, sizeof(times)},
                                                 {&flags, 8},
                                                 {head_, sizeof(head_)},
                                                 {hashes_, sizeof(hashes_)}});
        std::uint64_t words[3] = {U64At(granted.data(), 0), 0, U64At(granted.data(), 1)};
        const std::uint64_t held = words[2];
        if (held == 0) return;
        std::vector<std::vector<std::uint8_t>> blocks(held);
        std::vector<iovec> into;
        for (auto &block : blocks) {
            block.resize(kBlockBytes);
            into.push_back({block.data(), block.size()});
        }
        {
            ClientConnection::Lock lock(connection_);
            connection_.CallInto(static_cast<std::uint8_t>(Op::kRead), {{words, sizeof(words)}},
                                 std::move(into), kTimeout);
        }
        for (std::uint64_t i = 0; i < held; ++i) KV_CHECK(blocks[i] == BytesOf(hashes_[i]));
        std::uint64_t release[2] = {1, words[0]};
        KV_CHECK(Call(Op::kRelease, {{release, sizeof(release)}})[0] == 1);
    }

    void Wait(std::size_t chain_number) {
        MakeChain(chain_number);
        double wait = 0.002;
        std::uint64_t want = kBlocks;
        Call(Op::kWaitFor,
             {{&wait, 8}, {&want, 8}, {head_, sizeof(head_)}, {hashes_, sizeof(hashes_)}});
    }

    // Half a WRITE, and no more of it.
    void LeaveInside() {
        std::uint8_t header[kHeaderBytes];
        EncodeHeader({static_cast<std::uint8_t>(Op::kWrite), 0, 100000, 1}, header);
        KV_CHECK(send(connection_.fd(), header, sizeof(header), MSG_NOSIGNAL) > 0);
        connection_.Close();
    }

    std::uint64_t number = 0;

private:
    void MakeChain(std::size_t chain_number) {
        for (std::size_t i = 0; i < kBlocks; ++i) hashes_[i] = HashOf(chain_number, i);
        EncodeChainHead({hashes_, kBlocks, 0, nullptr}, head_);
    }

    ClientConnection connection_;
    BlockHash hashes_[kBlocks];
    std::uint8_t head_[kChainHeadBytes];
};

void RunClient(const std::string &address, unsigned seed) {
    std::mt19937 random(seed);
    auto session = std::make_unique<TestClient>(address, 0);
    auto client = std::make_unique<TestClient>(address, session->number);
    for (int step = 0; step < kSteps; ++step) {
        const std::size_t chain = random() % 6;
        switch (random() % 8) {
            case 0:
            case 1:
            case 2:
                client->Put(chain, true, random() % 8 == 0, false);
                break;
            case 3:
            case 4:
                client->Load(chain);
                break;
            case 5:
                client->Wait(chain);
                break;
            case 6:
                client->Put(chain, random() % 2 == 0, false, random() % 8 == 0);
                break;
            default:
                if (random() % 2 == 0) client->LeaveInside();
                client.reset();
                if (random() % 2 == 0) {
                    session.reset();
                    session = std::make_unique<TestClient>(address, 0);
                }
                client = std::make_unique<TestClient>(address, session->number);
        }
    }
}

void TestClients() {
    std::string error;
    auto arena = Arena::Create(20 * 12288, 5 * 12288, false, &error);
    KV_CHECK(arena != nullptr);
    StoreCore core(std::move(arena), "lru");
    NamespaceId ns = 0;
    KV_CHECK(core.AddNamespace(kBlockBytes, &ns));
    Server server(core, 2, 64, 256);
    KV_CHECK(server.Start(&error));
    const std::string directory = MakeDirectory();
    const std::string path = directory + "/s";
    const int listener = Listen(path);
    KV_CHECK(server.Listen(listener, true));
    std::atomic<int> gone{0};
    std::vector<std::thread> python;
    for (int i = 0; i < 2; ++i) {
        python.emplace_back([&] { AnswerTasks(server, core, &gone); });
    }
    std::vector<std::thread> clients;
    for (unsigned i = 0; i < kClients; ++i) {
        clients.emplace_back([&, i] { RunClient("unix:" + path, i + 1); });
    }
    for (std::thread &client : clients) client.join();
    while (server.services().roster.num_connections() > 0) std::this_thread::yield();
    KV_CHECK(server.Drain(SteadyNowNs() + 60'000'000'000));
    const CoreStats stats = core.Stats();
    KV_CHECK(stats.leases == 0 && stats.reservations == 0);
    KV_CHECK(server.services().num_parked() == 0);
    KV_CHECK(server.services().counters.protocol_errors.load() == 0 || gone.load() > 0);
    server.Stop();
    server.Stop();
    for (std::thread &thread : python) thread.join();
    close(listener);
    unlink(path.c_str());
    rmdir(directory.c_str());
}

// Stop while clients are connected, wait and receive.
void TestStopUnderLoad() {
    std::string error;
    StoreCore core(Arena::Create(20 * 12288, 5 * 12288, false, &error), "lru");
    NamespaceId ns = 0;
    KV_CHECK(core.AddNamespace(kBlockBytes, &ns));
    auto server = std::make_unique<Server>(core, 2, 64, 256);
    KV_CHECK(server->Start(&error));
    const std::string directory = MakeDirectory();
    const std::string path = directory + "/s";
    const int listener = Listen(path);
    KV_CHECK(server->Listen(listener, true));
    std::atomic<int> gone{0};
    std::thread python([&] { AnswerTasks(*server, core, &gone); });
    std::atomic<int> steps{0};
    std::vector<std::thread> clients;
    for (unsigned i = 0; i < 3; ++i) {
        clients.emplace_back([&, i] {
            try {
                TestClient client("unix:" + path, 0);
                while (true) {
                    client.Put(i, true, false, false);
                    client.Wait(i + 1);
                    ++steps;
                }
            } catch (const ClientFailure &) {
                return;
            }
        });
    }
    while (steps.load() < 20) std::this_thread::yield();
    server->Stop();
    // What still waits to be accepted is closed with the listening socket.
    close(listener);
    for (std::thread &client : clients) client.join();
    python.join();
    server.reset();
    const CoreStats stats = core.Stats();
    KV_CHECK(stats.leases == 0 && stats.reservations == 0);
    unlink(path.c_str());
    rmdir(directory.c_str());
}

// A channel that gives what it was told to and takes everything.
class ScriptedChannel final : public Channel {
public:
    ssize_t Receive(const iovec *parts, std::size_t n) override {
        KV_CHECK(n == 1);
        if (script.empty()) {
            errno = EAGAIN;
            return -1;
        }
        const std::size_t bytes = std::min(parts[0].iov_len, script.size());
        std::memcpy(parts[0].iov_base, script.data(), bytes);
        script.erase(script.begin(), script.begin() + static_cast<std::ptrdiff_t>(bytes));
        return static_cast<ssize_t>(bytes);
    }
    ssize_t Send(const iovec *parts, std::size_t n, int) override {
        std::size_t total = 0;
        for (std::size_t i = 0; i < n; ++i) total += parts[i].iov_len;
        return static_cast<ssize_t>(total);
    }
    std::vector<std::uint8_t> script;
};

// When a connection is given up: greeting not over in time, or stuck within a frame; never while
// it is idle or waits for us.
void TestDeadlines() {
    std::string error;
    StoreCore core(Arena::Create(20 * 12288, 5 * 12288, false, &error), "lru");
    Services services(core, 8);
    ScriptedChannel channel;
    Peer peer;
    peer.connection = services.roster.NextConnection();
    Connection connection(services, channel, peer);
    const auto send = [&](Op op, std::uint32_t length, std::size_t sent) {
        channel.script.resize(kHeaderBytes + sent);
        EncodeHeader({static_cast<std::uint8_t>(op), 0, length, 1}, channel.script.data());
        connection.OnReadable();
    };
    const std::int64_t begin = SteadyNowNs();
    KV_CHECK(connection.deadline_ns() <= begin + Connection::kGreetingNs);
    send(Op::kHello, 10, 3);
    KV_CHECK(connection.deadline_ns() <= begin + Connection::kGreetingNs);  // bytes do not help
    channel.script.assign(7, 0);
    connection.OnReadable();
    KV_CHECK(connection.state() == Connection::State::kWaiting);
    KV_CHECK(connection.deadline_ns() == StoreCore::kNever);
    ClientTerms terms;
    terms.client = 1;
    terms.owner = core.NewOwner();
    KV_CHECK(services.roster.AddClient(peer.connection, terms));
    connection.Answer(services.tasks.Pop(0)->id, 0, {});
    KV_CHECK(connection.state() == Connection::State::kReceiving);
    KV_CHECK(connection.deadline_ns() == StoreCore::kNever);
    send(Op::kPing, 10, 3);
    const std::int64_t stalled = connection.deadline_ns();
    KV_CHECK(stalled > SteadyNowNs() && stalled <= SteadyNowNs() + Connection::kStallNs);
    connection.CloseOverdue();
    KV_CHECK(connection.state() == Connection::State::kClosed);
    KV_CHECK(services.counters.timed_out_connections.load() == 1);
    KV_CHECK(services.tasks.Pop(0)->kind == kGone);
}

}  // namespace

int main() {
    TestDeadlines();
    TestClients();
    TestStopUnderLoad();
    std::puts("server_test: ok");
}
