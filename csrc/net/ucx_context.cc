#include "net/ucx_context.h"

#include <cstdlib>
#include <unordered_set>

#include "core/store_core.h"

namespace kvstore {
namespace {

using Kind = UcxFailure::Kind;

constexpr std::int64_t kCloseNs = 1'000'000'000;

// Servers whose threads must end before the process's libraries do, which is when exit() unloads
// them: UCX would be called after its own end. Never destroyed.
struct Running {
    std::mutex mutex;
    std::unordered_set<UcxServer *> servers;
};

Running &AllRunning() {
    static Running *running = [] {
        std::atexit([] {
            Running &all = AllRunning();
            const std::unique_lock lock(all.mutex, std::try_to_lock);
            if (!lock.owns_lock()) return;  // in a forked child, for ever another thread's
            for (UcxServer *server : all.servers) server->Stop();
        });
        return new Running;
    }();
    return *running;
}

}  // namespace

UcxContext::UcxContext(UcxOptions options) : core_(std::make_shared<UcxCore>(std::move(options))) {
    server_ = std::make_shared<UcxServer>(core_, [this] { TendLinks(); });
    Running &all = AllRunning();
    std::lock_guard lock(all.mutex);
    all.servers.insert(server_.get());
}

UcxContext::~UcxContext() {
    if (core_->is_forked()) {
        new auto(server_);  // the parent's: its thread is not here, so nothing of it can be ended
    } else {
        Close();
    }
}

std::shared_ptr<UcxServer> UcxContext::Server() {
    core_->CheckProcess();
    std::lock_guard lock(mutex_);
    if (server_ == nullptr) throw UcxFailure(Kind::kClosed, "ucx: closed");
    return server_;
}

const std::string &UcxContext::version() const { return core_->library().version(); }
const std::string &UcxContext::library() const { return core_->library().path(); }

std::vector<std::pair<std::string, std::string>> UcxContext::Transports() {
    Server();
    return core_->Transports();
}

std::vector<std::uint8_t> UcxContext::Address() { return Server()->Address(); }

bool UcxContext::AddRegion(std::uint64_t id, void *address, std::size_t bytes, bool writable) {
    return Server()->Add(id, address, bytes, writable);
}

bool UcxContext::RemoveRegion(std::uint64_t id, std::int64_t deadline_ns) {
    return Server()->Remove(id, deadline_ns);
}

std::size_t UcxContext::num_peers() { return Server()->num_peers(); }

std::shared_ptr<UcxLink> UcxContext::Connect(const std::vector<std::uint8_t> &address,
                                             std::uint64_t epoch, const std::string &secret,
                                             std::int64_t deadline_ns) {
    const auto server = Server();
    auto link = std::make_shared<UcxLink>(core_, address, epoch, secret, deadline_ns);
    std::lock_guard lock(mutex_);
    if (server_ == nullptr) throw UcxFailure(Kind::kClosed, "ucx: closed");
    std::erase_if(links_, [](const auto &known) { return known.expired(); });
    links_.push_back(link);
    return link;
}

std::vector<std::shared_ptr<UcxLink>> UcxContext::Links() {
    std::vector<std::shared_ptr<UcxLink>> links;
    std::lock_guard lock(mutex_);
    for (const auto &known : links_) {
        if (auto link = known.lock()) links.push_back(std::move(link));
    }
    return links;
}

void UcxContext::TendLinks() {
    for (const auto &link : Links()) link->Tend();
}

void UcxContext::Close() {
    core_->CheckProcess();
    std::shared_ptr<UcxServer> server;
    {
        std::lock_guard lock(mutex_);
        server = std::exchange(server_, nullptr);
    }
    if (server == nullptr) return;
    for (const auto &link : Links()) link->Close(SteadyNowNs() + kCloseNs);
    {
        Running &all = AllRunning();
        std::lock_guard lock(all.mutex);
        all.servers.erase(server.get());
    }
    server->Stop();
}

}  // namespace kvstore
