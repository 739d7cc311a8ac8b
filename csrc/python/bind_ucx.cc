// Bindings of UCX: argument checks and conversion.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/cancel.h"
#include "core/store_core.h"
#include "net/ucx_context.h"
#include "python/bind.h"

namespace py = pybind11;

namespace kvstore {
namespace {

using U64s = py::array_t<std::uint64_t, py::array::c_style>;

constexpr double kSecondsMax = 1e9;
constexpr std::size_t kSecretBytesMin = 16;

std::int64_t DeadlineNs(double timeout) {
    if (std::isnan(timeout)) throw py::value_error("timeout must be a number of seconds");
    const double seconds = std::min(std::max(timeout, 0.0), kSecondsMax);
    return SteadyNowNs() + static_cast<std::int64_t>(seconds * 1e9);
}

[[noreturn]] void Raise(const UcxFailure &failure) {
    const auto kind = [&failure] {
        switch (failure.kind) {
            case UcxFailure::Kind::kPeer:
                return PyExc_ConnectionError;
            case UcxFailure::Kind::kRefused:
                return PyExc_PermissionError;
            case UcxFailure::Kind::kTimeout:
                return PyExc_TimeoutError;
            case UcxFailure::Kind::kLibrary:
            case UcxFailure::Kind::kForked:
            case UcxFailure::Kind::kClosed:
                break;
        }
        return PyExc_RuntimeError;
    }();
    PyErr_SetString(kind, failure.what());
    throw py::error_already_set();
}

// Without the GIL; failures become Python's.
template <typename F>
auto Unlocked(F &&call) {
    std::optional<UcxFailure> failed;
    {
        const py::gil_scoped_release released;
        try {
            return call();
        } catch (const UcxFailure &failure) {
            failed.emplace(failure);
        }
    }
    Raise(*failed);
}

py::bytes Bytes(const std::vector<std::uint8_t> &data) {
    return py::bytes(reinterpret_cast<const char *>(data.data()), data.size());
}

std::vector<std::uint8_t> AddressOf(const py::bytes &bytes) {
    const std::string_view text = bytes;
    if (text.empty() || text.size() > kUcxTailBytesMax) {
        throw py::value_error("address: " + std::to_string(text.size()) + " bytes");
    }
    return {text.begin(), text.end()};
}

class PyUcxLink {
public:
    PyUcxLink(std::shared_ptr<UcxCore> core, std::shared_ptr<UcxLink> link)
        : core_(std::move(core)), link_(std::move(link)) {}
    ~PyUcxLink() {
        const py::gil_scoped_release released;
        link_.reset();
    }
    PyUcxLink(const PyUcxLink &) = delete;
    PyUcxLink &operator=(const PyUcxLink &) = delete;

    UcxLink &link() {
        core_->CheckProcess();
        return *link_;
    }

private:
    const std::shared_ptr<UcxCore> core_;
    std::shared_ptr<UcxLink> link_;
};

void CheckColumn(const char *name, const U64s &column, py::ssize_t n) {
    if (column.ndim() != 1 || column.shape(0) != n) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(n) + " elements");
    }
}

py::array_t<std::uint8_t> Move(PyUcxLink &self, UcxOp op, std::uint64_t region_id,
                               const U64s &remote_offsets, const U64s &local_addresses,
                               const U64s &lengths, const std::optional<U64s> &checksums,
                               double timeout, const CancelFlag *cancel) {
    if (lengths.ndim() != 1) throw py::value_error("lengths must have one dimension");
    const py::ssize_t n = lengths.shape(0);
    CheckColumn("remote_offsets", remote_offsets, n);
    CheckColumn("local_addresses", local_addresses, n);
    if (checksums.has_value()) CheckColumn("checksums", *checksums, n);
    UcxBatch batch;
    batch.local_addresses = local_addresses.data();
    batch.remote_offsets = remote_offsets.data();
    batch.lengths = lengths.data();
    batch.sums = checksums.has_value() ? checksums->data() : nullptr;
    batch.n = static_cast<std::size_t>(n);
    for (std::size_t i = 0; i < batch.n; ++i) {
        if (batch.local_addresses[i] == 0 && batch.lengths[i] > 0) {
            throw py::value_error("local_addresses must not be null");
        }
    }
    const std::int64_t deadline_ns = DeadlineNs(timeout);
    py::array_t<std::uint8_t> statuses(n);
    auto *out = reinterpret_cast<PieceStatus *>(statuses.mutable_data());
    Unlocked([&] { self.link().Move(op, region_id, batch, deadline_ns, cancel, out); });
    return statuses;
}

void BindLink(py::module_ &m) {
    using namespace py::literals;
    const auto bind_move = [](UcxOp op) {
        return
            [op](PyUcxLink &self, std::uint64_t region_id, const U64s &remote_offsets,
                 const U64s &local_addresses, const U64s &lengths,
                 const std::optional<U64s> &checksums, double timeout, const CancelFlag *cancel) {
                return Move(self, op, region_id, remote_offsets, local_addresses, lengths,
                            checksums, timeout, cancel);
            };
    };
    py::class_<PyUcxLink>(m, "UcxLink")
        .def("read", bind_move(UcxOp::kRead), "region_id"_a, "remote_offsets"_a,
             "local_addresses"_a, "lengths"_a, "checksums"_a, "timeout"_a, "cancel"_a = nullptr)
        .def("write", bind_move(UcxOp::kWrite), "region_id"_a, "remote_offsets"_a,
             "local_addresses"_a, "lengths"_a, "checksums"_a, "timeout"_a, "cancel"_a = nullptr)
        .def("is_alive",
             [](PyUcxLink &self) { return Unlocked([&] { return self.link().is_alive(); }); })
        .def("failure",
             [](PyUcxLink &self) { return Unlocked([&] { return self.link().failure(); }); })
        .def("transports",
             [](PyUcxLink &self) { return Unlocked([&] { return self.link().transports(); }); })
        .def(
            "close",
            [](PyUcxLink &self, double timeout) {
                const std::int64_t deadline_ns = DeadlineNs(timeout);
                return Unlocked([&] { return self.link().Close(deadline_ns); });
            },
            "timeout"_a);
}

}  // namespace

void BindUcx(py::module_ &m) {
    using namespace py::literals;
    BindLink(m);
    py::class_<UcxContext>(m, "UcxContext")
        .def(py::init([](std::string library, std::string tls, std::string net_devices,
                         double timeout, const py::bytes &secret, std::uint64_t epoch,
                         std::vector<std::pair<std::string, std::string>> settings, double spin,
                         std::string modules, bool one_sided) {
                 UcxOptions options;
                 options.library = std::move(library);
                 options.tls = std::move(tls);
                 options.net_devices = std::move(net_devices);
                 options.timeout = timeout;
                 options.secret = std::string(secret);
                 options.epoch = epoch;
                 options.settings = std::move(settings);
                 options.spin = spin;
                 options.modules = std::move(modules);
                 options.one_sided = one_sided;
                 if (!(timeout >= 0.01 && timeout <= 3600)) {
                     throw py::value_error("timeout must be from 0.01 to 3600 seconds");
                 }
                 if (!(spin >= 0 && spin <= 1)) {
                     throw py::value_error("spin must be from 0 to 1 second");
                 }
                 if (options.secret.size() < kSecretBytesMin) {
                     throw py::value_error("secret must have at least 16 bytes");
                 }
                 return Unlocked([&] { return std::make_unique<UcxContext>(std::move(options)); });
             }),
             "library"_a, "tls"_a, "net_devices"_a, "timeout"_a, "secret"_a, "epoch"_a,
             "settings"_a = std::vector<std::pair<std::string, std::string>>{}, "spin"_a = 50e-6,
             "modules"_a = "", "one_sided"_a = false)
        .def_property_readonly("version", &UcxContext::version)
        .def_property_readonly("library", &UcxContext::library)
        .def("transports",
             [](UcxContext &self) { return Unlocked([&] { return self.Transports(); }); })
        .def("address",
             [](UcxContext &self) { return Bytes(Unlocked([&] { return self.Address(); })); })
        .def("num_peers",
             [](UcxContext &self) { return Unlocked([&] { return self.num_peers(); }); })
        .def(
            "register",
            [](UcxContext &self, std::uint64_t region_id, std::uint64_t address,
               std::uint64_t num_bytes, bool writable) {
                if (address == 0 || num_bytes == 0) {
                    throw py::value_error("address, num_bytes: must not be 0");
                }
                return Unlocked([&] {
                    return self.AddRegion(region_id, reinterpret_cast<void *>(address), num_bytes,
                                          writable);
                });
            },
            "region_id"_a, "address"_a, "num_bytes"_a, "writable"_a)
        .def(
            "deregister",
            [](UcxContext &self, std::uint64_t region_id, double timeout) {
                const std::int64_t deadline_ns = DeadlineNs(timeout);
                return Unlocked([&] { return self.RemoveRegion(region_id, deadline_ns); });
            },
            "region_id"_a, "timeout"_a)
        .def(
            "connect",
            [](UcxContext &self, const py::bytes &address, std::uint64_t epoch,
               const py::bytes &secret, double timeout) {
                const std::vector<std::uint8_t> to = AddressOf(address);
                const std::string known(secret);
                const std::int64_t deadline_ns = DeadlineNs(timeout);
                return Unlocked([&] {
                    auto link = self.Connect(to, epoch, known, deadline_ns);
                    return std::make_unique<PyUcxLink>(self.core(), std::move(link));
                });
            },
            "address"_a, "epoch"_a, "secret"_a, "timeout"_a)
        .def("close", [](UcxContext &self) { Unlocked([&] { self.Close(); }); });
}

}  // namespace kvstore
