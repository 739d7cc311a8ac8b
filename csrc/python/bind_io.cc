#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "copy/copy.h"
#include "io/extent_io.h"
#include "io/file.h"
#include "python/bind.h"

namespace py = pybind11;

namespace kvstore {
namespace {

template <typename T>
using Column = py::array_t<T, py::array::c_style>;

constexpr unsigned kDepthMax = 4096;

// Releases the GIL around I/O. A hung disk may hold a call up until the interpreter is ending;
// taking the GIL then ends the thread by an exception, which no destructor lets pass. So the thread
// stays here, for as long as the process does.
class WithoutGil {
public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    WithoutGil(const WithoutGil &) = delete;
    WithoutGil &operator=(const WithoutGil &) = delete;
    ~WithoutGil() {
        while (IsEnding()) pause();
        PyEval_RestoreThread(state_);
    }

private:
    static bool IsEnding() {
#if PY_VERSION_HEX >= 0x030D0000
        return Py_IsFinalizing() != 0;
#else
        return _Py_IsFinalizing() != 0;
#endif
    }

    PyThreadState *state_;
};

std::unique_ptr<IoQueue> OpenQueue(const std::string &kind, unsigned depth) {
    if (kind != "auto" && kind != "uring" && kind != "threads") {
        throw py::value_error("kind: must be 'auto', 'uring' or 'threads', not '" + kind + "'");
    }
    if (depth < 1 || depth > kDepthMax) {
        throw py::value_error("depth: must be between 1 and " + std::to_string(kDepthMax));
    }
    if (kind != "threads") {
        if (auto queue = OpenUring(depth)) return queue;
        if (kind == "uring") throw std::runtime_error("kind: this kernel does not offer io_uring");
    }
    return OpenThreadIo(depth);
}

template <typename T>
void CheckColumn(const Column<T> &column, std::size_t n, const char *name) {
    if (column.ndim() != 1 || static_cast<std::size_t>(column.shape(0)) != n) {
        throw py::value_error(std::string(name) + ": must be a vector as long as fds");
    }
}

std::vector<Extent> Extents(const Column<int> &fds, const Column<std::uint64_t> &offsets,
                            const Column<std::uint64_t> &addrs,
                            const Column<std::uint64_t> &bytes) {
    if (fds.ndim() != 1) throw py::value_error("fds: must be a vector");
    const std::size_t n = static_cast<std::size_t>(fds.shape(0));
    CheckColumn(offsets, n, "offsets");
    CheckColumn(addrs, n, "addrs");
    CheckColumn(bytes, n, "bytes");
    std::vector<Extent> extents(n);
    for (std::size_t i = 0; i < n; ++i) {
        if (offsets.data()[i] % kPageBytes != 0) {
            throw py::value_error("offsets: must be multiples of 4096");
        }
        if (addrs.data()[i] == 0 || bytes.data()[i] == 0) {
            throw py::value_error("addrs, bytes: must not be 0");
        }
        extents[i] = {fds.data()[i], offsets.data()[i],
                      reinterpret_cast<std::uint8_t *>(addrs.data()[i]), bytes.data()[i]};
    }
    return extents;
}

Column<int> Write(IoQueue &queue, const Column<int> &fds, const Column<std::uint64_t> &offsets,
                  const Column<std::uint64_t> &addrs, const Column<std::uint64_t> &bytes) {
    const std::vector<Extent> extents = Extents(fds, offsets, addrs, bytes);
    Column<int> errors(static_cast<py::ssize_t>(extents.size()));
    int *out = errors.mutable_data();
    {
        WithoutGil released;
        WriteExtents(queue, extents.data(), extents.size(), out);
    }
    return errors;
}

Column<int> Read(IoQueue &queue, const Column<int> &fds, const Column<std::uint64_t> &offsets,
                 const Column<std::uint64_t> &addrs, const Column<std::uint64_t> &bytes,
                 const std::optional<Column<std::uint64_t>> &checksums) {
    const std::vector<Extent> extents = Extents(fds, offsets, addrs, bytes);
    if (checksums) CheckColumn(*checksums, extents.size(), "checksums");
    const std::uint64_t *expected = checksums ? checksums->data() : nullptr;
    Column<int> errors(static_cast<py::ssize_t>(extents.size()));
    int *out = errors.mutable_data();
    {
        WithoutGil released;
        ReadExtents(queue, extents.data(), extents.size(), expected, out);
    }
    return errors;
}

std::uint64_t Checksum(const py::buffer &buffer) {
    const py::buffer_info info = buffer.request();
    const std::size_t bytes = static_cast<std::size_t>(info.size * info.itemsize);
    if (PyBuffer_IsContiguous(info.view(), 'C') == 0) {
        throw py::value_error("buffer: must be contiguous");
    }
    py::gil_scoped_release released;
    return Xxh3(info.ptr, bytes);
}

Column<std::uint64_t> ChecksumRows(const Column<std::uint8_t> &rows, std::size_t covered) {
    if (rows.ndim() != 2) throw py::value_error("rows: must be a matrix of bytes");
    const std::size_t n = static_cast<std::size_t>(rows.shape(0));
    const std::size_t width = static_cast<std::size_t>(rows.shape(1));
    if (covered > width) throw py::value_error("covered: must not exceed the width of rows");
    Column<std::uint64_t> checksums(static_cast<py::ssize_t>(n));
    const std::uint8_t *row = rows.data();
    std::uint64_t *out = checksums.mutable_data();
    py::gil_scoped_release released;
    for (std::size_t i = 0; i < n; ++i) out[i] = Xxh3(row + i * width, covered);
    return checksums;
}

Column<std::uint64_t> ChecksumAt(const Column<std::uint64_t> &addrs,
                                 const Column<std::uint64_t> &bytes) {
    if (addrs.ndim() != 1) throw py::value_error("addrs: must be a vector");
    const std::size_t n = static_cast<std::size_t>(addrs.shape(0));
    if (bytes.ndim() != 1 || static_cast<std::size_t>(bytes.shape(0)) != n) {
        throw py::value_error("bytes: must be a vector as long as addrs");
    }
    for (std::size_t i = 0; i < n; ++i) {
        if (addrs.data()[i] == 0) throw py::value_error("addrs: must not be 0");
    }
    Column<std::uint64_t> checksums(static_cast<py::ssize_t>(n));
    const std::uint64_t *at = addrs.data();
    const std::uint64_t *length = bytes.data();
    std::uint64_t *out = checksums.mutable_data();
    py::gil_scoped_release released;
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = Xxh3(reinterpret_cast<const void *>(at[i]), length[i]);
    }
    return checksums;
}

}  // namespace

void BindIo(py::module_ &m) {
    py::class_<IoQueue>(m, "IoQueue")
        .def(py::init(&OpenQueue), py::arg("kind") = "auto", py::arg("depth") = 16)
        .def_property_readonly("kind", [](const IoQueue &queue) { return queue.kind(); })
        .def_property_readonly("depth", &IoQueue::depth)
        .def("write", &Write, py::arg("fds").noconvert(), py::arg("offsets").noconvert(),
             py::arg("addrs").noconvert(), py::arg("bytes").noconvert())
        .def("read", &Read, py::arg("fds").noconvert(), py::arg("offsets").noconvert(),
             py::arg("addrs").noconvert(), py::arg("bytes").noconvert(),
             py::arg("checksums").noconvert() = py::none());
    m.def("io_checksum", &Checksum, py::arg("buffer"));
    m.def("io_checksum_rows", &ChecksumRows, py::arg("rows").noconvert(), py::arg("covered"));
    m.def("io_checksum_at", &ChecksumAt, py::arg("addrs").noconvert(),
          py::arg("bytes").noconvert());
}

}  // namespace kvstore
