// Bindings of the daemon's server and of the client's connection: argument checks and conversion.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/mapping.h"
#include "net/client.h"
#include "net/echo.h"
#include "net/server.h"
#include "python/bind.h"
#include "python/failures.h"

namespace py = pybind11;

namespace kvstore {

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using Hashes = Array<std::uint8_t>;
using U64s = Array<std::uint64_t>;
using Parent = std::optional<py::bytes>;

constexpr double kYearSeconds = 366.0 * 24 * 3600;

// --- failures

PyObject *remote_error = nullptr;
PyObject *protocol_error = nullptr;

[[noreturn]] void Raise(PyObject *kind, const char *message) {
    PyErr_SetString(kind, message);
    throw py::error_already_set();
}

}  // namespace

void RaiseFailure(const ClientFailure &failure) {
    using Kind = ClientFailure::Kind;
    switch (failure.kind) {
        case Kind::kTimeout:
            Raise(PyExc_TimeoutError, failure.what());
        case Kind::kConnection:
            Raise(PyExc_ConnectionError, failure.what());
        case Kind::kProtocol:
            Raise(protocol_error, failure.what());
        case Kind::kBusy:
            Raise(PyExc_RuntimeError, failure.what());
        case Kind::kInterrupted:
            if (PyErr_Occurred() != nullptr) throw py::error_already_set();
            Raise(PyExc_InterruptedError, failure.what());
        case Kind::kRemote:
            break;
    }
    const std::string text = failure.what();
    PyObject *message =
        PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "replace");
    const py::tuple values =
        py::make_tuple(failure.status, py::reinterpret_steal<py::object>(message));
    PyErr_SetObject(remote_error, values.ptr());
    throw py::error_already_set();
}

// Lets Python's signal handlers run; true when one of them raised.
bool SignalRaised() {
    const py::gil_scoped_acquire locked;
    return PyErr_CheckSignals() != 0;
}

namespace {

// A class that keeps what it was raised with, in `args` and by name.
py::object MakeRemoteError() {
    const py::object property = py::module_::import("builtins").attr("property");
    const auto item = [&](int i) {
        return property(py::cpp_function(
            [i](const py::object &self) { return self.attr("args")[py::int_(i)]; }));
    };
    py::dict names;
    names["__module__"] = "kvstore._native";
    names["__doc__"] = "A reply with a status; the connection goes on.";
    names["status"] = item(0);
    names["message"] = item(1);
    names["__str__"] = py::cpp_function(
        [](const py::object &self) { return py::str(self.attr("args")[py::int_(1)]); },
        py::is_method(py::none()));
    const py::object type = py::module_::import("builtins").attr("type");
    return type("RemoteError", py::make_tuple(py::handle(PyExc_Exception)), names);
}

// --- the server

class PyServer {
public:
    PyServer(StoreCore &core, std::size_t threads, std::size_t connections_max,
             std::size_t tasks_max)
        : core_(core), server_(core, threads, connections_max, tasks_max) {
        std::string error;
        if (!server_.Start(&error)) throw std::runtime_error(error);
    }
    StoreCore &core() { return core_; }
    Server &server() { return server_; }
    Services &services() { return server_.services(); }

private:
    StoreCore &core_;
    Server server_;
};

std::unique_ptr<PyServer> MakeServer(StoreCore &core, std::size_t threads,
                                     std::size_t connections_max, std::size_t tasks_max) {
    if (threads < 1 || threads > 64) throw std::invalid_argument("threads must be in [1, 64]");
    if (connections_max < 1) throw std::invalid_argument("connections_max must be positive");
    if (tasks_max < 1) throw std::invalid_argument("tasks_max must be positive");
    return std::make_unique<PyServer>(core, threads, connections_max, tasks_max);
}

std::int64_t DeadlineNs(double seconds) {
    if (!(seconds >= 0)) throw std::invalid_argument("timeout must not be negative");
    return DeadlineAfter(SteadyNowNs(), seconds, kYearSeconds);
}

bool AddClient(PyServer &self, std::uint64_t connection, std::uint64_t client, std::uint64_t owner,
               std::int64_t namespace_id, bool may_map, bool may_map_writable, bool notices,
               bool notice_used, const std::string &label, std::size_t block_tokens, bool may_read,
               bool may_write) {
    ClientTerms terms;
    if (client == 0) throw std::invalid_argument("client must not be 0");
    if (namespace_id >= 0) {
        if (static_cast<std::uint64_t>(namespace_id) >= self.core().num_namespaces()) {
            throw std::out_of_range("namespace_id is not registered");
        }
        terms.block_bytes = self.core().block_bytes(static_cast<NamespaceId>(namespace_id));
    }
    terms.client = client;
    terms.owner = owner;
    terms.namespace_id = namespace_id;
    terms.may_map = may_map;
    terms.may_map_writable = may_map_writable;
    terms.notices = notices;
    terms.notice_used = notice_used;
    terms.may_read = may_read;
    terms.may_write = may_write;
    terms.label = label;
    terms.block_tokens = block_tokens;
    return self.services().roster.AddClient(connection, std::move(terms));
}

py::list Clients(PyServer &self) {
    using namespace py::literals;
    const auto views = self.services().roster.Clients();
    const std::int64_t now = SteadyNowNs();
    py::list all;
    for (const auto &[client, num_connections] : views) {
        const ClientTerms &terms = client->terms;
        all.append(py::dict(
            "client"_a = terms.client, "owner"_a = terms.owner,
            "namespace_id"_a = terms.namespace_id, "label"_a = terms.label, "pid"_a = client->pid,
            "uid"_a = client->uid, "is_local"_a = client->is_local,
            "connections"_a = num_connections, "requests"_a = client->requests.load(),
            "bytes_in"_a = client->bytes_in.load(), "bytes_out"_a = client->bytes_out.load(),
            "connected_seconds"_a = static_cast<double>(now - client->since_ns) * 1e-9));
    }
    return all;
}

py::dict Stats(PyServer &self) {
    Services &services = self.services();
    const NetCounters &counters = services.counters;
    py::dict stats;
#define KV_COUNT(name) stats[#name] = counters.name.load(std::memory_order_relaxed)
    KV_COUNT(queried_blocks);
    KV_COUNT(hit_cpu_blocks);
    KV_COUNT(missed_blocks);
    KV_COUNT(missed_absent_blocks);
    KV_COUNT(missed_pending_blocks);
    KV_COUNT(missed_evicted_blocks);
    KV_COUNT(missed_ssd_blocks);
    KV_COUNT(missed_corrupt_blocks);
    KV_COUNT(queried_tokens);
    KV_COUNT(hit_cpu_tokens);
    KV_COUNT(loaded_bytes);
    KV_COUNT(stored_bytes);
    KV_COUNT(read_bytes);
    KV_COUNT(written_bytes);
    KV_COUNT(integrity_failures);
    KV_COUNT(requests);
    KV_COUNT(protocol_errors);
    KV_COUNT(refused_busy);
    KV_COUNT(notices_dropped);
    KV_COUNT(connections_refused);
    KV_COUNT(timed_out_connections);
#undef KV_COUNT
    stats["accepted_connections"] = counters.connections_total.load(std::memory_order_relaxed);
    stats["connections"] = services.roster.num_connections();
    stats["tasks"] = services.tasks.size();
    stats["parked_requests"] = services.num_parked();
    return stats;
}

py::dict Latencies(PyServer &self) {
    py::dict all;
    for (std::uint8_t op = 0; op < Services::kOps; ++op) {
        const char *name = OpName(op);
        if (name == nullptr) continue;
        const LatencyHistogram &histogram = self.services().latencies[op];
        const auto counts = histogram.Counts();
        all[name] = py::make_tuple(std::vector<std::uint64_t>(counts.begin(), counts.end()),
                                   histogram.SumSeconds());
    }
    return all;
}

py::list HotPrefixes(PyServer &self) {
    py::list all;
    for (const HotPrefix &hot : self.services().HotPrefixes()) {
        all.append(py::make_tuple(
            hot.namespace_id,
            py::bytes(reinterpret_cast<const char *>(hot.first.bytes), sizeof(hot.first)), hot.uses,
            hot.blocks));
    }
    return all;
}

void BindServer(py::module_ &m) {
    using namespace py::literals;
    py::class_<Task>(m, "Task")
        .def_property_readonly("id", [](const Task &t) { return t.id; })
        .def_property_readonly("kind", [](const Task &t) { return t.kind; })
        .def_property_readonly("connection", [](const Task &t) { return t.connection; })
        .def_property_readonly("client", [](const Task &t) { return t.client; })
        .def_property_readonly("owner", [](const Task &t) { return t.owner; })
        .def_property_readonly("namespace_id", [](const Task &t) { return t.namespace_id; })
        .def_property_readonly("body",
                               [](const Task &t) {
                                   return py::bytes(reinterpret_cast<const char *>(t.body.data()),
                                                    t.body.size());
                               })
        .def_property_readonly(
            "age_seconds",
            [](const Task &t) { return static_cast<double>(SteadyNowNs() - t.received_ns) * 1e-9; })
        .def_property_readonly("peer_uid", [](const Task &t) { return t.peer_uid; })
        .def_property_readonly("peer_pid", [](const Task &t) { return t.peer_pid; })
        .def_property_readonly("is_local", [](const Task &t) { return t.is_local; });

    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    py::class_<PyServer>(m, "NativeServer")
        .def(py::init(&MakeServer), "core"_a, "threads"_a = 2, "connections_max"_a = 1024,
             "tasks_max"_a = 4096, py::keep_alive<1, 2>())
        .def(
            "listen",
            [](PyServer &self, int fd, bool is_local) {
                if (self.server().Listen(fd, is_local)) return;
                PyErr_SetFromErrno(PyExc_OSError);
                throw py::error_already_set();
            },
            "fd"_a, "is_local"_a)
        .def(
            "serve",
            [](PyServer &self, int fd) {
                if (fd < 0) throw std::invalid_argument("fd must be a socket's");
                return self.server().Serve(fd);
            },
            "fd"_a)
        .def(
            "next_task",
            [](PyServer &self, double timeout) {
                const std::int64_t deadline = DeadlineNs(timeout);
                const py::gil_scoped_release released;
                return self.server().NextTask(deadline);
            },
            "timeout"_a)
        .def("add_client", &AddClient, "connection"_a, "client"_a, "owner"_a, "namespace_id"_a,
             py::kw_only(), "may_map"_a, "may_map_writable"_a, "notices"_a, "notice_used"_a,
             "label"_a, "block_tokens"_a = 0, "may_read"_a = true, "may_write"_a = true)
        .def(
            "join_client",
            [](PyServer &self, std::uint64_t connection, std::uint64_t client) {
                return self.services().roster.JoinClient(connection, client);
            },
            "connection"_a, "client"_a)
        .def(
            "reply",
            [](PyServer &self, std::uint64_t task, const py::bytes &body, int status) {
                if (status < 0 || status > 255) {
                    throw std::invalid_argument("status must be in [0, 255]");
                }
                const auto *data =
                    reinterpret_cast<const std::uint8_t *>(PyBytes_AS_STRING(body.ptr()));
                const auto size = static_cast<std::size_t>(PyBytes_GET_SIZE(body.ptr()));
                if (size > kBodyBytesMax) {
                    throw std::invalid_argument("body has more than " +
                                                std::to_string(kBodyBytesMax) + " bytes");
                }
                std::vector<std::uint8_t> copy(data, data + size);
                const py::gil_scoped_release released;
                return self.server().Reply(task, static_cast<std::uint8_t>(status),
                                           std::move(copy));
            },
            "task_id"_a, "body"_a, "status"_a = 0)
        .def(
            "hang_up",
            [](PyServer &self, std::uint64_t connection) { self.server().HangUp(connection); },
            "connection"_a, unlocked)
        .def("clients", &Clients)
        .def("stats", &Stats)
        .def("latencies", &Latencies)
        .def("hot_prefixes", &HotPrefixes)
        .def(
            "drain",
            [](PyServer &self, double timeout) {
                const std::int64_t deadline = DeadlineNs(timeout);
                const py::gil_scoped_release released;
                return self.server().Drain(deadline);
            },
            "timeout"_a)
        .def("stop", [](PyServer &self) { self.server().Stop(); }, unlocked);
    m.attr("LATENCY_BOUNDS") = py::cast(
        std::vector<double>(LatencyHistogram::kBounds.begin(), LatencyHistogram::kBounds.end()));
}

// --- the client

// The parts of a request: small values in a head, the rest where it lies in Python's memory, which
// the caller's arguments keep alive.
class Request {
public:
    template <typename T>
    Request &Put(T value) {
        static_assert(sizeof(T) == 8);
        std::memcpy(head_ + head_bytes_, &value, sizeof(value));
        parts_.push_back({head_ + head_bytes_, sizeof(value)});
        head_bytes_ += sizeof(value);
        return *this;
    }
    Request &PutArray(const void *data, std::size_t bytes) {
        if (bytes > 0) parts_.push_back({const_cast<void *>(data), bytes});
        return *this;
    }
    Request &PutU64s(const U64s &values, const char *name) {
        if (values.ndim() != 1) {
            throw std::invalid_argument(std::string(name) + " must have one dimension");
        }
        return PutArray(values.data(), static_cast<std::size_t>(values.nbytes()));
    }
    Request &PutChain(const Hashes &hashes, std::int64_t start, const Parent &parent) {
        if (hashes.ndim() != 2 || hashes.shape(1) != 32) {
            throw std::invalid_argument("hashes must have shape (n, 32) and dtype uint8");
        }
        if (parent && PyBytes_GET_SIZE(parent->ptr()) != 32) {
            throw std::invalid_argument("parent must be 32 bytes");
        }
        if (start > 0 && !parent) throw std::invalid_argument("parent is needed when start > 0");
        Chain chain;
        chain.hashes = reinterpret_cast<const BlockHash *>(hashes.data());
        chain.n = static_cast<std::size_t>(hashes.shape(0));
        chain.start = start;
        if (parent) {
            chain.parent = reinterpret_cast<const BlockHash *>(PyBytes_AS_STRING(parent->ptr()));
        }
        if (chain.n > kBodyBytesMax / sizeof(BlockHash)) {
            throw std::invalid_argument("hashes: too many for a frame");
        }
        EncodeChainHead(chain, chain_head_);
        parts_.push_back({chain_head_, kChainHeadBytes});
        return PutArray(chain.hashes, chain.n * sizeof(BlockHash));
    }
    std::vector<iovec> Take() { return std::move(parts_); }

private:
    std::uint8_t head_[64];
    std::size_t head_bytes_ = 0;
    std::uint8_t chain_head_[kChainHeadBytes];
    std::vector<iovec> parts_;
};

double CheckTimeout(double timeout) {
    if (!(timeout >= 0)) throw std::invalid_argument("timeout must not be negative");
    return timeout;
}

using Body = ClientConnection::Body;

[[noreturn]] void BadReply(ClientConnection &self, const char *what) {
    self.Close();
    Raise(protocol_error, what);
}

// Calls without the GIL and hands the reply to `decode` with it.
template <typename Decode>
auto Exchange(ClientConnection &self, Op op, Request &request, double timeout, Decode decode) {
    CheckTimeout(timeout);
    try {
        std::optional<ClientConnection::Lock> lock;
        Body body;
        {
            const py::gil_scoped_release released;
            lock.emplace(self);
            body = self.Call(static_cast<std::uint8_t>(op), request.Take(), timeout);
        }
        return decode(Reader(body.data, body.bytes), body.bytes);
    } catch (const ClientFailure &failure) {
        RaiseFailure(failure);
    }
}

std::uint64_t OneU64(ClientConnection &self, Reader reader) {
    std::uint64_t value = 0;
    if (!reader.Take(&value) || reader.left() != 0) BadReply(self, "the reply is not one number");
    return value;
}

template <typename T>
py::array_t<T> TakeColumn(ClientConnection &self, Reader &reader, std::uint64_t n) {
    const std::uint8_t *data = reader.TakeArray(n, sizeof(T));
    if (data == nullptr) BadReply(self, "the reply is too short");
    py::array_t<T> column(static_cast<py::ssize_t>(n));
    if (n > 0) std::memcpy(column.mutable_data(), data, static_cast<std::size_t>(n) * sizeof(T));
    return column;
}

py::bytes Call(ClientConnection &self, int op, const py::buffer &buffer, double timeout) {
    if (op < 0 || op > 255) throw std::invalid_argument("op must be in [0, 255]");
    const py::buffer_info info = buffer.request();
    if (!PyBuffer_IsContiguous(info.view(), 'C')) {
        throw std::invalid_argument("body must be contiguous");
    }
    Request request;
    request.PutArray(info.ptr, static_cast<std::size_t>(info.size * info.itemsize));
    return Exchange(
        self, static_cast<Op>(op), request, timeout, [](Reader reader, std::size_t bytes) {
            return py::bytes(reinterpret_cast<const char *>(reader.TakeArray(bytes, 1)), bytes);
        });
}

std::uint64_t Match(ClientConnection &self, const Hashes &hashes, std::int64_t start,
                    const Parent &parent, double timeout) {
    Request request;
    request.PutChain(hashes, start, parent);
    return Exchange(self, Op::kMatch, request, timeout,
                    [&](Reader reader, std::size_t) { return OneU64(self, reader); });
}

py::tuple Lookup(ClientConnection &self, std::uint64_t flags, const Hashes &hashes,
                 std::int64_t start, const Parent &parent, double timeout) {
    Request request;
    request.Put(flags).PutChain(hashes, start, parent);
    return Exchange(self, Op::kLookup, request, timeout, [&](Reader reader, std::size_t) {
        std::uint64_t num = 0;
        if (!reader.Take(&num)) BadReply(self, "the reply is too short");
        return py::make_tuple(num, OneU64(self, reader));
    });
}

py::array Residency(ClientConnection &self, const Hashes &hashes, std::int64_t start,
                    const Parent &parent, double timeout) {
    Request request;
    request.PutChain(hashes, start, parent);
    return Exchange(self, Op::kResidency, request, timeout, [&](Reader reader, std::size_t bytes) {
        if (bytes != static_cast<std::size_t>(hashes.shape(0))) {
            BadReply(self, "the reply is not one byte for each block");
        }
        return py::array(TakeColumn<std::uint8_t>(self, reader, bytes));
    });
}

py::tuple Acquire(ClientConnection &self, double ttl, double wait, std::uint64_t flags,
                  const Hashes &hashes, std::int64_t start, const Parent &parent, double timeout) {
    Request request;
    request.Put(ttl).Put(wait).Put(flags).PutChain(hashes, start, parent);
    return Exchange(self, Op::kAcquire, request, timeout, [&](Reader reader, std::size_t) {
        std::uint64_t lease = 0;
        std::uint64_t n = 0;
        if (!reader.Take(&lease) || !reader.Take(&n)) BadReply(self, "the reply is too short");
        const auto offsets = TakeColumn<std::uint64_t>(self, reader, n);
        const auto headers = TakeColumn<std::uint64_t>(self, reader, n);
        const auto sequences = TakeColumn<std::uint64_t>(self, reader, n);
        const auto checksums = TakeColumn<std::uint64_t>(self, reader, n);
        if (reader.left() != 0 || n > static_cast<std::uint64_t>(hashes.shape(0))) {
            BadReply(self, "the reply grants more than was asked for");
        }
        return py::make_tuple(lease, offsets, headers, sequences, checksums);
    });
}

py::array Release(ClientConnection &self, const U64s &leases, double timeout) {
    Request request;
    request.Put(static_cast<std::uint64_t>(leases.size())).PutU64s(leases, "leases");
    return Exchange(self, Op::kRelease, request, timeout, [&](Reader reader, std::size_t bytes) {
        if (bytes != static_cast<std::size_t>(leases.size())) {
            BadReply(self, "the reply is not one byte for each lease");
        }
        return py::array(TakeColumn<bool>(self, reader, bytes));
    });
}

py::tuple Reserve(ClientConnection &self, double wait, const Hashes &hashes, std::int64_t start,
                  const Parent &parent, double timeout) {
    Request request;
    request.Put(wait).PutChain(hashes, start, parent);
    return Exchange(self, Op::kReserve, request, timeout, [&](Reader reader, std::size_t) {
        std::uint64_t reservation = 0;
        std::uint64_t n = 0;
        if (!reader.Take(&reservation) || !reader.Take(&n) ||
            n != static_cast<std::uint64_t>(hashes.shape(0))) {
            BadReply(self, "the reply is not one slot for each block");
        }
        const auto offsets = TakeColumn<std::uint64_t>(self, reader, n);
        const auto statuses = TakeColumn<std::uint8_t>(self, reader, n);
        return py::make_tuple(reservation, offsets, statuses);
    });
}

Request &PutCommit(Request &request, std::uint64_t reservation, std::uint64_t ack,
                   const U64s &checksums, const Hashes &hashes, std::int64_t start,
                   const Parent &parent) {
    return request.Put(reservation)
        .Put(ack)
        .Put(static_cast<std::uint64_t>(checksums.size()))
        .PutU64s(checksums, "checksums")
        .PutChain(hashes, start, parent);
}

std::uint64_t Commit(ClientConnection &self, std::uint64_t reservation, std::uint64_t ack,
                     const U64s &checksums, const Hashes &hashes, std::int64_t start,
                     const Parent &parent, double timeout) {
    Request request;
    PutCommit(request, reservation, ack, checksums, hashes, start, parent);
    return Exchange(self, Op::kCommit, request, timeout,
                    [&](Reader reader, std::size_t) { return OneU64(self, reader); });
}

void Abort(ClientConnection &self, std::uint64_t reservation, double timeout) {
    Request request;
    request.Put(reservation);
    Exchange(self, Op::kAbort, request, timeout, [](Reader, std::size_t) {});
}

std::uint64_t WaitFor(ClientConnection &self, double wait, std::uint64_t want, const Hashes &hashes,
                      std::int64_t start, const Parent &parent, double timeout) {
    Request request;
    request.Put(wait).Put(want).PutChain(hashes, start, parent);
    return Exchange(self, Op::kWaitFor, request, timeout,
                    [&](Reader reader, std::size_t) { return OneU64(self, reader); });
}

std::vector<iovec> PayloadParts(const U64s &addresses, std::size_t block_bytes) {
    if (addresses.ndim() != 1) throw std::invalid_argument("addresses must have one dimension");
    const auto n = static_cast<std::size_t>(addresses.size());
    if (n > 0 && (block_bytes == 0 || block_bytes > UINT32_MAX / n)) {
        throw std::invalid_argument("block_bytes: " + std::to_string(n) + " blocks of " +
                                    std::to_string(block_bytes) + " bytes do not fit in a frame");
    }
    std::vector<iovec> parts(n);
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint64_t address = addresses.data()[i];
        if (address == 0) throw std::invalid_argument("addresses must not be 0");
        parts[i] = {reinterpret_cast<void *>(static_cast<std::uintptr_t>(address)), block_bytes};
    }
    return parts;
}

void Read(ClientConnection &self, std::uint64_t lease, std::uint64_t first, const U64s &addresses,
          std::size_t block_bytes, double timeout) {
    CheckTimeout(timeout);
    Request request;
    request.Put(lease).Put(first).Put(static_cast<std::uint64_t>(addresses.size()));
    std::vector<iovec> into = PayloadParts(addresses, block_bytes);
    try {
        const py::gil_scoped_release released;
        const ClientConnection::Lock lock(self);
        self.CallInto(static_cast<std::uint8_t>(Op::kRead), request.Take(), std::move(into),
                      timeout);
    } catch (const ClientFailure &failure) {
        RaiseFailure(failure);
    }
}

py::tuple Write(ClientConnection &self, std::uint64_t reservation, std::uint64_t ack,
                const U64s &checksums, const Hashes &hashes, std::int64_t start,
                const Parent &parent, const U64s &addresses, std::size_t block_bytes,
                double timeout) {
    if (addresses.size() != checksums.size()) {
        throw std::invalid_argument("checksums must have one element for each of addresses");
    }
    Request request;
    PutCommit(request, reservation, ack, checksums, hashes, start, parent);
    for (const iovec &part : PayloadParts(addresses, block_bytes)) {
        request.PutArray(part.iov_base, part.iov_len);
    }
    return Exchange(self, Op::kWrite, request, timeout, [&](Reader reader, std::size_t) {
        std::uint64_t level = 0;
        const auto m = static_cast<std::uint64_t>(checksums.size());
        if (!reader.Take(&level) || reader.left() != m) {
            BadReply(self, "the reply is not one byte for each block");
        }
        return py::make_tuple(level, TakeColumn<bool>(self, reader, m));
    });
}

py::tuple Map(ClientConnection &self, bool writable, double timeout) {
    CheckTimeout(timeout);
    Request request;
    request.Put(static_cast<std::uint64_t>(writable ? 1 : 0));
    int fd = -1;
    try {
        std::optional<ClientConnection::Lock> lock;
        Body body;
        {
            const py::gil_scoped_release released;
            lock.emplace(self);
            body =
                self.CallForFd(static_cast<std::uint8_t>(Op::kMap), request.Take(), timeout, &fd);
        }
        Reader reader(body.data, body.bytes);
        std::uint64_t bytes = 0;
        if (fd < 0 || !reader.Take(&bytes) || reader.left() != 0) {
            if (fd >= 0) close(fd);
            BadReply(self, "no descriptor came with the reply");
        }
        return py::make_tuple(fd, bytes);
    } catch (const ClientFailure &failure) {
        RaiseFailure(failure);
    }
}

std::unique_ptr<ClientConnection> Connect(const std::string &address, double timeout) {
    CheckTimeout(timeout);
    try {
        const py::gil_scoped_release released;
        return std::make_unique<ClientConnection>(address, timeout, &SignalRaised);
    } catch (const ClientFailure &failure) {
        RaiseFailure(failure);
    }
}

void BindClient(py::module_ &m) {
    using namespace py::literals;
    // No conversions: a wrong dtype is an error that is seen, not a silent copy.
    py::class_<ClientConnection>(m, "Connection")
        .def(py::init(&Connect), "address"_a, "timeout"_a)
        .def_static(
            "over",
            [](int fd, const std::string &address) {
                if (fd < 0) throw std::invalid_argument("fd must be a socket's");
                return std::make_unique<ClientConnection>(fd, address, &SignalRaised);
            },
            "fd"_a, "address"_a)
        .def("call", &Call, "op"_a, "body"_a, "timeout"_a)
        .def("map", &Map, "writable"_a, "timeout"_a)
        .def("match", &Match, "hashes"_a, "start"_a, "parent"_a, "timeout"_a)
        .def("lookup", &Lookup, "flags"_a, "hashes"_a, "start"_a, "parent"_a, "timeout"_a)
        .def("residency", &Residency, "hashes"_a, "start"_a, "parent"_a, "timeout"_a)
        .def("acquire", &Acquire, "ttl"_a, "wait"_a, "flags"_a, "hashes"_a, "start"_a, "parent"_a,
             "timeout"_a)
        .def("release", &Release, "leases"_a, "timeout"_a)
        .def("reserve", &Reserve, "wait"_a, "hashes"_a, "start"_a, "parent"_a, "timeout"_a)
        .def("commit", &Commit, "reservation"_a, "ack"_a, "checksums"_a, "hashes"_a, "start"_a,
             "parent"_a, "timeout"_a)
        .def("abort", &Abort, "reservation"_a, "timeout"_a)
        .def("wait_for", &WaitFor, "wait"_a, "want"_a, "hashes"_a, "start"_a, "parent"_a,
             "timeout"_a)
        .def(
            "ping",
            [](ClientConnection &self, const py::bytes &data, double timeout) {
                return Call(self, static_cast<int>(Op::kPing),
                            py::reinterpret_borrow<py::buffer>(data), timeout);
            },
            "data"_a, "timeout"_a)
        .def("read", &Read, "lease"_a, "first"_a, "addresses"_a, "block_bytes"_a, "timeout"_a)
        .def("write", &Write, "reservation"_a, "ack"_a, "checksums"_a, "hashes"_a, "start"_a,
             "parent"_a, "addresses"_a, "block_bytes"_a, "timeout"_a)
        .def("fileno", &ClientConnection::fd)
        .def("close", &ClientConnection::Close, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

namespace {

using namespace py::literals;

// The mapping lives as long as the array or any view of it.
py::array_t<std::uint8_t> MapShared(int fd, std::size_t bytes, bool writable) {
    if (fd < 0 || bytes == 0) throw std::invalid_argument("fd and bytes must name a file's bytes");
    auto *base = static_cast<std::uint8_t *>(MapOnHugeEdge(bytes, fd, writable));
    if (base == nullptr) {
        PyErr_SetFromErrno(PyExc_OSError);
        throw py::error_already_set();
    }
    struct Mapping {
        void *base;
        std::size_t bytes;
    };
    const py::capsule owner(new Mapping{base, bytes}, [](void *pointer) {
        const std::unique_ptr<Mapping> mapping(static_cast<Mapping *>(pointer));
        munmap(mapping->base, mapping->bytes);
    });
    py::array_t<std::uint8_t> array(static_cast<py::ssize_t>(bytes), base, owner);
    if (!writable) array.attr("setflags")("write"_a = false);
    return array;
}

}  // namespace

void BindNet(py::module_ &m) {
    using namespace py::literals;
    m.def("map_shared", &MapShared, "fd"_a, "bytes"_a, "writable"_a);
    remote_error = MakeRemoteError().release().ptr();
    protocol_error = PyErr_NewExceptionWithDoc(
        "kvstore._native.ProtocolError",
        "Bytes that are no frame of ours; the connection is closed.", nullptr, nullptr);
    m.attr("RemoteError") = py::handle(remote_error);
    m.attr("ProtocolError") = py::handle(protocol_error);
    BindServer(m);
    BindClient(m);
    py::class_<EchoServer>(m, "EchoServer")
        .def(py::init<int>(), "fd"_a)
        .def("stop", &EchoServer::Stop, py::call_guard<py::gil_scoped_release>());
    m.def(
        "refusal",
        [](const py::bytes &header, int status,
           const py::bytes &message) -> std::optional<py::bytes> {
            const auto *data =
                reinterpret_cast<const std::uint8_t *>(PyBytes_AS_STRING(header.ptr()));
            FrameHeader asked;
            if (PyBytes_GET_SIZE(header.ptr()) != static_cast<Py_ssize_t>(kHeaderBytes) ||
                status < 1 || status > 255 || !DecodeHeader(data, &asked)) {
                return std::nullopt;
            }
            const auto length = static_cast<std::uint32_t>(PyBytes_GET_SIZE(message.ptr()));
            std::string frame(kHeaderBytes, '\0');
            EncodeHeader({asked.op, static_cast<std::uint8_t>(status), length, asked.id},
                         reinterpret_cast<std::uint8_t *>(frame.data()));
            return py::bytes(frame + std::string(message));
        },
        "header"_a, "status"_a, "message"_a);
    m.def(
        "echo_round_trips",
        [](const std::string &address, std::size_t request_bytes, std::size_t reply_bytes,
           std::size_t count) {
            std::vector<double> seconds;
            {
                const py::gil_scoped_release released;
                seconds = EchoRoundTrips(address, request_bytes, reply_bytes, count);
            }
            return py::array_t<double>(static_cast<py::ssize_t>(seconds.size()), seconds.data());
        },
        "address"_a, "request_bytes"_a, "reply_bytes"_a, "count"_a);
}

}  // namespace kvstore
