#include "net/roster.h"

#include <algorithm>
#include <utility>

namespace kvstore {

bool Client::Claim(std::uint64_t reservation) {
    std::lock_guard lock(mutex_);
    if (std::find(claimed_.begin(), claimed_.end(), reservation) != claimed_.end()) return false;
    claimed_.push_back(reservation);
    return true;
}

void Client::Unclaim(std::uint64_t reservation) {
    std::lock_guard lock(mutex_);
    std::erase(claimed_, reservation);
}

void Roster::Add(const Peer &peer) {
    std::lock_guard lock(mutex_);
    connections_.emplace(peer.connection, Place{peer, nullptr, 0});
}

std::shared_ptr<Client> Roster::Remove(std::uint64_t connection) {
    std::lock_guard lock(mutex_);
    const auto it = connections_.find(connection);
    if (it == connections_.end()) return nullptr;
    const std::shared_ptr<Client> client = std::move(it->second.client);
    if (it->second.pending != 0) pending_.erase(it->second.pending);
    connections_.erase(it);
    if (client == nullptr || --client->num_connections > 0) return nullptr;
    clients_.erase(client->terms.client);
    return client;
}

bool Roster::AddClient(std::uint64_t connection, ClientTerms terms) {
    std::lock_guard lock(mutex_);
    const auto it = connections_.find(connection);
    if (it == connections_.end() || it->second.client != nullptr) return false;
    const std::uint64_t number = terms.client;
    if (clients_.contains(number)) return false;
    auto client = std::make_shared<Client>(std::move(terms));
    client->uid = it->second.peer.uid;
    client->pid = it->second.peer.pid;
    client->is_local = it->second.peer.is_local;
    client->since_ns = SteadyNowNs();
    client->num_connections = 1;
    clients_.emplace(number, client);
    it->second.client = std::move(client);
    return true;
}

bool Roster::JoinClient(std::uint64_t connection, std::uint64_t number) {
    std::lock_guard lock(mutex_);
    const auto it = connections_.find(connection);
    const auto client = clients_.find(number);
    if (it == connections_.end() || it->second.client != nullptr || client == clients_.end()) {
        return false;
    }
    ++client->second->num_connections;
    it->second.client = client->second;
    return true;
}

std::shared_ptr<Client> Roster::ClientOf(std::uint64_t connection) const {
    std::lock_guard lock(mutex_);
    const auto it = connections_.find(connection);
    return it == connections_.end() ? nullptr : it->second.client;
}

std::uint64_t Roster::AddPending(std::uint64_t connection) {
    const std::uint64_t task = next_.fetch_add(1, std::memory_order_relaxed);
    std::lock_guard lock(mutex_);
    const auto it = connections_.find(connection);
    if (it == connections_.end()) return task;
    it->second.pending = task;
    pending_.emplace(task, connection);
    return task;
}

void Roster::CancelPending(std::uint64_t task) {
    Peer peer;
    TakePending(task, &peer);
}

bool Roster::IsPending(std::uint64_t task) const {
    std::lock_guard lock(mutex_);
    return pending_.contains(task);
}

bool Roster::TakePending(std::uint64_t task, Peer *peer) {
    std::lock_guard lock(mutex_);
    const auto it = pending_.find(task);
    if (it == pending_.end()) return false;
    Place &place = connections_.at(it->second);
    place.pending = 0;
    *peer = place.peer;
    pending_.erase(it);
    return true;
}

bool Roster::Find(std::uint64_t connection, Peer *peer) const {
    std::lock_guard lock(mutex_);
    const auto it = connections_.find(connection);
    if (it == connections_.end()) return false;
    *peer = it->second.peer;
    return true;
}

std::vector<Roster::ClientView> Roster::Clients() const {
    std::lock_guard lock(mutex_);
    std::vector<ClientView> views;
    views.reserve(clients_.size());
    for (const auto &[number, client] : clients_) {
        views.push_back({client, client->num_connections});
    }
    return views;
}

std::size_t Roster::num_connections() const {
    std::lock_guard lock(mutex_);
    return connections_.size();
}

}  // namespace kvstore
