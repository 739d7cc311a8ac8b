// Who is connected: connections, the clients they belong to, and the requests that Python has yet
// to answer.
//
// A client is admitted by Python after its greeting and ends with its last connection: what it
// held in the core is released at once, and a kGone task tells Python.
//
// Thread safety: all methods may be called from any thread; the roster's mutex guards its maps and
// Client::num_connections. It is never held while the core is called.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/store_core.h"
#include "core/types.h"

namespace kvstore {

// What Python says of a client that it admits.
struct ClientTerms {
    std::uint64_t client = 0;
    OwnerId owner = 0;
    std::int64_t namespace_id = -1;  // < 0: none, and only CALL and PING work
    std::size_t block_bytes = 0;     // of the namespace
    std::size_t block_tokens = 0;    // the same
    bool may_map = false;
    bool may_map_writable = false;
    bool notices = false;      // there is an ssd tier to tell
    bool notice_used = false;  // and it wants to know of uses
    bool may_read = true;      // payload through this connection, by READ
    bool may_write = true;     // or RESERVE
    std::string label;
};

struct Client {
    explicit Client(ClientTerms given) : terms(std::move(given)) {}

    const ClientTerms terms;
    int uid = -1;
    int pid = -1;
    bool is_local = false;
    std::int64_t since_ns = 0;
    std::atomic<std::uint64_t> requests{0};
    std::atomic<std::uint64_t> bytes_in{0};
    std::atomic<std::uint64_t> bytes_out{0};
    std::size_t num_connections = 0;

    // A reservation into which a connection is receiving, or that it is ending. While one has it
    // claimed no other connection may end it, or its slots would be somebody else's while bytes
    // still arrive. False when another has.
    bool Claim(std::uint64_t reservation);
    void Unclaim(std::uint64_t reservation);

private:
    std::mutex mutex_;
    std::vector<std::uint64_t> claimed_;
};

struct Peer {
    std::uint64_t connection = 0;
    std::size_t thread = 0;
    bool is_local = false;
    int uid = -1;
    int pid = -1;
};

class Roster {
public:
    std::uint64_t NextConnection() { return next_.fetch_add(1, std::memory_order_relaxed); }

    void Add(const Peer &peer);
    // The connection is closed. Returns its client when this was the last connection of it.
    std::shared_ptr<Client> Remove(std::uint64_t connection);

    // False when the connection is gone or belongs to a client already, or the client exists.
    bool AddClient(std::uint64_t connection, ClientTerms terms);
    // False when the connection is gone or belongs to a client already, or there is no such client.
    bool JoinClient(std::uint64_t connection, std::uint64_t client);
    std::shared_ptr<Client> ClientOf(std::uint64_t connection) const;

    // A request of the connection that Python is to answer; its number.
    std::uint64_t AddPending(std::uint64_t connection);
    void CancelPending(std::uint64_t task);
    bool IsPending(std::uint64_t task) const;
    // False when nobody waits for that answer any more; else where to send it.
    bool TakePending(std::uint64_t task, Peer *peer);
    bool Find(std::uint64_t connection, Peer *peer) const;

    struct ClientView {
        std::shared_ptr<const Client> client;
        std::size_t num_connections = 0;
    };
    std::vector<ClientView> Clients() const;
    std::size_t num_connections() const;

private:
    struct Place {
        Peer peer;
        std::shared_ptr<Client> client;
        std::uint64_t pending = 0;
    };

    mutable std::mutex mutex_;
    std::unordered_map<std::uint64_t, Place> connections_;
    std::unordered_map<std::uint64_t, std::shared_ptr<Client>> clients_;
    std::unordered_map<std::uint64_t, std::uint64_t> pending_;  // task -> connection
    std::atomic<std::uint64_t> next_{1};
};

}  // namespace kvstore
