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

}  // namespace kvstore
