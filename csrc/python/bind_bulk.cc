// Bindings of regions, the bulk server and the bulk link: argument checks and conversion.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/store_core.h"
#include "net/bulk_link.h"
#include "net/bulk_server.h"
#include "net/regions.h"
#include "python/bind.h"
#include "python/failures.h"

namespace kvstore {
namespace {

namespace py = pybind11;

using U64Array = py::array_t<std::uint64_t, py::array::c_style>;

constexpr double kYearSeconds = 366.0 * 24 * 3600;
constexpr std::size_t kSecretBytesMin = 16;
constexpr std::size_t kConnectionsMax = 64;

std::string CheckSecret(const py::bytes &secret) {
    std::string bytes = secret;
    if (bytes.size() < kSecretBytesMin) {
        throw py::value_error("secret must have " + std::to_string(kSecretBytesMin) +
                              " bytes or more");
    }
    return bytes;
}

double CheckTimeout(double timeout) {
    if (!(timeout >= 0)) throw py::value_error("timeout must not be negative");
    return timeout;
}

void AddRegion(Regions &self, std::uint64_t id, std::uint64_t address, std::uint64_t bytes,
               bool writable) {
    if (address == 0) throw py::value_error("address must not be 0");
    if (bytes == 0 || bytes > UINT64_MAX - address) {
        throw py::value_error("num_bytes must be positive, and within the address space");
    }
    if (!self.Add(id, reinterpret_cast<std::uint8_t *>(address), bytes, writable)) {
        throw py::value_error("region_id: there is a region " + std::to_string(id) + " already");
    }
}

void CheckColumn(const U64Array &values, const char *name, py::ssize_t n) {
    if (values.ndim() != 1 || values.shape(0) != n) {
        throw py::value_error(std::string(name) + " must have one dimension and " +
                              std::to_string(n) + " elements");
    }
}

py::array_t<std::uint8_t> Move(BulkLink &self, bool is_write, std::uint64_t region_id,
                               const U64Array &remote_offsets, const U64Array &local_addresses,
                               const U64Array &lengths, const std::optional<U64Array> &checksums,
                               double timeout, const CancelFlag *cancel) {
    CheckTimeout(timeout);
    if (lengths.ndim() != 1) throw py::value_error("lengths must have one dimension");
    const py::ssize_t n = lengths.shape(0);
    CheckColumn(remote_offsets, "remote_offsets", n);
    CheckColumn(local_addresses, "local_addresses", n);
    if (checksums.has_value()) CheckColumn(*checksums, "checksums", n);
    for (py::ssize_t i = 0; i < n; ++i) {
        if (local_addresses.data()[i] == 0 && lengths.data()[i] > 0) {
            throw py::value_error("local_addresses must not be 0");
        }
    }
    py::array_t<std::uint8_t> statuses(n);
    BulkBatch batch;
    batch.is_write = is_write;
    batch.region = region_id;
    batch.n = static_cast<std::size_t>(n);
    batch.offsets = remote_offsets.data();
    batch.addresses = local_addresses.data();
    batch.lengths = lengths.data();
    batch.sums = checksums.has_value() ? checksums->data() : nullptr;
    batch.statuses = reinterpret_cast<PieceStatus *>(statuses.mutable_data());
    try {
        const py::gil_scoped_release released;
        self.Move(batch, timeout, cancel);
    } catch (const ClientFailure &failure) {
        RaiseFailure(failure);
    }
    return statuses;
}

std::unique_ptr<BulkLink> Connect(const std::string &address, const py::bytes &secret,
                                  std::uint64_t epoch, double timeout, std::size_t connections) {
    CheckTimeout(timeout);
    if (connections > kConnectionsMax) {
        throw py::value_error("connections must be at most " + std::to_string(kConnectionsMax));
    }
    if (address.rfind("unix:", 0) == 0) throw py::value_error("address must be host:port");
    std::string key = CheckSecret(secret);
    const std::string whole = address.rfind("tcp:", 0) == 0 ? address : "tcp:" + address;
    try {
        const py::gil_scoped_release released;
        return std::make_unique<BulkLink>(whole, std::move(key), epoch, timeout, connections,
                                          &SignalRaised);
    } catch (const ClientFailure &failure) {
        RaiseFailure(failure);
    }
}

py::dict Counters(BulkServer &self) {
    py::dict all;
    std::size_t connections;
    {
        const py::gil_scoped_release released;
        connections = self.num_connections();
    }
    all["connections"] = connections;
    const BulkCounters &counters = self.services().counters;
#define KV_COUNT(name) all[#name] = counters.name.load(std::memory_order_relaxed)
    KV_COUNT(accepted_connections);
    KV_COUNT(refused_connections);
    KV_COUNT(refused_greetings);
    KV_COUNT(protocol_errors);
    KV_COUNT(cut_connections);
    KV_COUNT(stalled_connections);
    KV_COUNT(read_pieces);
    KV_COUNT(read_bytes);
    KV_COUNT(written_pieces);
    KV_COUNT(written_bytes);
    KV_COUNT(refused_pieces);
    KV_COUNT(damaged_pieces);
#undef KV_COUNT
    return all;
}

}  // namespace

void BindBulk(py::module_ &m) {
    using namespace py::literals;
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    py::class_<Regions>(m, "Regions")
        .def(py::init<>())
        .def("add", &AddRegion, "region_id"_a, "address"_a, "num_bytes"_a, "writable"_a)
        .def(
            "remove",
            [](Regions &self, std::uint64_t id, double timeout) {
                const std::int64_t deadline =
                    DeadlineAfter(SteadyNowNs(), CheckTimeout(timeout), kYearSeconds);
                const py::gil_scoped_release released;
                return self.Remove(id, deadline);
            },
            "region_id"_a, "timeout"_a)
        .def("__len__", &Regions::size);

    py::class_<BulkServer>(m, "BulkServer")
        .def(py::init([](Regions &regions, const py::bytes &secret, std::uint64_t epoch,
                         std::size_t connections_max, std::uint64_t bytes_per_second) {
                 if (connections_max < 1) {
                     throw py::value_error("connections_max must be positive");
                 }
                 return std::make_unique<BulkServer>(regions, CheckSecret(secret), epoch,
                                                     connections_max, bytes_per_second);
             }),
             "regions"_a, "secret"_a, "epoch"_a, "connections_max"_a = 256,
             "bytes_per_second"_a = 0, py::keep_alive<1, 2>())
        .def(
            "listen",
            [](BulkServer &self, int fd) {
                if (self.Listen(fd)) return;
                PyErr_SetFromErrno(PyExc_OSError);
                throw py::error_already_set();
            },
            "fd"_a)
        .def(
            "set_info",
            [](BulkServer &self, const std::string &info) {
                if (info.size() > kBulkInfoBytesMax) {
                    throw py::value_error("info has more than " +
                                          std::to_string(kBulkInfoBytesMax) + " bytes");
                }
                self.services().SetInfo({info.begin(), info.end()});
            },
            "info"_a)
        .def("counters", &Counters)
        .def("stop", &BulkServer::Stop, unlocked);

    // No conversions: a wrong dtype is an error that is seen, not a silent copy.
    const auto move = [](bool is_write) {
        return [is_write](BulkLink &self, std::uint64_t region_id, const U64Array &remote_offsets,
                          const U64Array &local_addresses, const U64Array &lengths,
                          const std::optional<U64Array> &checksums, double timeout,
                          const CancelFlag *cancel) {
            return Move(self, is_write, region_id, remote_offsets, local_addresses, lengths,
                        checksums, timeout, cancel);
        };
    };
    py::class_<BulkLink>(m, "BulkLink")
        .def(py::init(&Connect), "address"_a, "secret"_a, "epoch"_a, "timeout"_a,
             "connections"_a = 0)
        .def(
            "info",
            [](BulkLink &self, double timeout) {
                CheckTimeout(timeout);
                try {
                    BulkBytes info;
                    {
                        const py::gil_scoped_release released;
                        info = self.Info(timeout);
                    }
                    return py::bytes(reinterpret_cast<const char *>(info.data()), info.size());
                } catch (const ClientFailure &failure) {
                    RaiseFailure(failure);
                }
            },
            "timeout"_a)
        .def("read", move(false), "region_id"_a, "remote_offsets"_a, "local_addresses"_a,
             "lengths"_a, "checksums"_a.none(true), "timeout"_a, "cancel"_a = nullptr)
        .def("write", move(true), "region_id"_a, "remote_offsets"_a, "local_addresses"_a,
             "lengths"_a, "checksums"_a.none(true), "timeout"_a, "cancel"_a = nullptr)
        .def("is_alive", &BulkLink::is_alive, unlocked)
        .def("is_settled", &BulkLink::is_settled)
        .def("close", &BulkLink::Close, unlocked);
}

}  // namespace kvstore
