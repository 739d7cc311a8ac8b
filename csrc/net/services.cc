#include "net/services.h"

#include <utility>

namespace kvstore {

void Services::EndClient(const Client &client, bool was_cut) {
    // While we stop, which connection of a client was the last is chance.
    if (was_cut || stopping.load()) {
        core.AbandonOwner(client.terms.owner);
    } else {
        core.ReleaseOwner(client.terms.owner);
    }
    auto task = std::make_unique<Task>();
    task->kind = kGone;
    task->client = client.terms.client;
    task->owner = client.terms.owner;
    task->namespace_id = client.terms.namespace_id;
    task->received_ns = SteadyNowNs();
    task->peer_uid = client.uid;
    task->peer_pid = client.pid;
    task->is_local = client.is_local;
    tasks.Push(std::move(task), true);
}

void Services::AddParked() {
    {
        std::lock_guard lock(parked_mutex_);
        ++parked_;
    }
    parked_changed_.notify_one();
}

void Services::RemoveParked() {
    std::lock_guard lock(parked_mutex_);
    --parked_;
}

std::uint64_t Services::num_parked() const {
    std::lock_guard lock(parked_mutex_);
    return parked_;
}

bool Services::WaitForParked() {
    std::unique_lock lock(parked_mutex_);
    parked_changed_.wait(lock, [&] { return parked_ > 0 || stopped_waiting_; });
    return !stopped_waiting_;
}

void Services::StopWaiting() {
    {
        std::lock_guard lock(parked_mutex_);
        stopped_waiting_ = true;
    }
    parked_changed_.notify_one();
}

}  // namespace kvstore
