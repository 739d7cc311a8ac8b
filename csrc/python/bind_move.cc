#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "copy/move.h"
#include "core/cancel.h"
#include "core/store_core.h"
#include "python/bind.h"

namespace kvstore {
namespace {

namespace py = pybind11;

using U64Array = py::array_t<std::uint64_t, py::array::c_style>;

constexpr int kThreadsMax = 1024;
constexpr double kSecondsMax = 1e9;

void CheckLength(const char *name, const U64Array &array, py::ssize_t n) {
    if (array.ndim() != 1 || array.shape(0) != n) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(n) + " elements");
    }
}

void CheckThreads(int threads) {
    if (threads < 1 || threads > kThreadsMax) {
        throw py::value_error("threads must be from 1 to " + std::to_string(kThreadsMax));
    }
}

py::array_t<std::uint8_t> Move(const U64Array &to, const U64Array &from, const U64Array &lengths,
                               const std::optional<U64Array> &checksums, int threads,
                               double timeout, const CancelFlag *cancel) {
    if (lengths.ndim() != 1) throw py::value_error("lengths must have one dimension");
    const py::ssize_t n = lengths.shape(0);
    CheckLength("to", to, n);
    CheckLength("from_", from, n);
    if (checksums.has_value()) CheckLength("checksums", *checksums, n);
    CheckThreads(threads);
    if (std::isnan(timeout)) throw py::value_error("timeout must be a number of seconds");
    const double seconds = std::min(std::max(timeout, 0.0), kSecondsMax);
    const std::int64_t deadline_ns = SteadyNowNs() + static_cast<std::int64_t>(seconds * 1e9);
    std::vector<Piece> pieces(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        pieces[i] = {reinterpret_cast<std::uint8_t *>(to.data()[i]),
                     reinterpret_cast<const std::uint8_t *>(from.data()[i]), lengths.data()[i]};
        if ((to.data()[i] == 0 || from.data()[i] == 0) && pieces[i].bytes > 0) {
            throw py::value_error("to and from_ must not be null");
        }
    }
    py::array_t<std::uint8_t> statuses(n);
    auto *out = reinterpret_cast<PieceStatus *>(statuses.mutable_data());
    const std::uint64_t *sums = checksums.has_value() ? checksums->data() : nullptr;
    {
        const py::gil_scoped_release released;
        MovePieces(pieces.data(), sums, out, pieces.size(), threads, cancel, deadline_ns);
    }
    return statuses;
}

py::array_t<std::uint64_t> Checksums(const U64Array &addresses, const U64Array &lengths,
                                     int threads) {
    if (lengths.ndim() != 1) throw py::value_error("lengths must have one dimension");
    const py::ssize_t n = lengths.shape(0);
    CheckLength("addresses", addresses, n);
    CheckThreads(threads);
    std::vector<Piece> pieces(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        pieces[i] = {nullptr, reinterpret_cast<const std::uint8_t *>(addresses.data()[i]),
                     lengths.data()[i]};
        if (addresses.data()[i] == 0 && pieces[i].bytes > 0) {
            throw py::value_error("addresses must not be null");
        }
    }
    py::array_t<std::uint64_t> sums(n);
    std::uint64_t *out = sums.mutable_data();
    {
        const py::gil_scoped_release released;
        ChecksumPieces(pieces.data(), out, pieces.size(), threads);
    }
    return sums;
}

}  // namespace

void BindMove(py::module_ &m) {
    using namespace py::literals;
    py::class_<CancelFlag>(m, "CancelFlag")
        .def(py::init<>())
        .def("set", &CancelFlag::Set)
        .def("is_set", &CancelFlag::is_set);
    m.def("move_pieces", &Move, "to"_a, "from_"_a, "lengths"_a, "checksums"_a, "threads"_a,
          "timeout"_a, "cancel"_a = nullptr);
    m.def("checksum_pieces", &Checksums, "addresses"_a, "lengths"_a, "threads"_a);
}

}  // namespace kvstore
