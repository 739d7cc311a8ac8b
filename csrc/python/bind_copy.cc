#include <pybind11/numpy.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "copy/copy.h"
#include "copy/dlpack.h"
#include "copy/plan.h"
#include "copy/xxh3.h"
#include "python/bind.h"

namespace kvstore {
namespace {

namespace py = pybind11;

constexpr int kThreadsMax = 1024;

// Takes a C-contiguous numpy array of exactly this type and rank; never converts, so never copies.
template <typename T>
py::array_t<T> TakeArray(const py::object &object, const char *name, const char *dtype, int rank) {
    if (!py::isinstance<py::array>(object)) {
        throw py::type_error(std::string(name) + " must be a numpy array of " + dtype);
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    if (!py::isinstance<py::array_t<T>>(array)) {
        throw py::type_error(std::string(name) + " must be an array of " + dtype + ", not of " +
                             py::str(array.dtype()).cast<std::string>());
    }
    if (array.ndim() != rank || (array.flags() & py::array::c_style) == 0) {
        throw py::value_error(std::string(name) + " must be a contiguous array with " +
                              std::to_string(rank) + " dimension(s)");
    }
    return py::reinterpret_borrow<py::array_t<T>>(array);
}

py::array_t<std::int64_t> TakeIds(const py::object &object) {
    return TakeArray<std::int64_t>(object, "block_ids", "int64", 1);
}

py::array_t<std::uint64_t> TakeAddresses(const py::object &object) {
    return TakeArray<std::uint64_t>(object, "addrs", "uint64", 1);
}

// The checksums' memory, or null where none were asked for.
std::uint64_t *TakeChecksums(const py::object &object, py::ssize_t n) {
    if (object.is_none()) return nullptr;
    auto array = TakeArray<std::uint64_t>(object, "checksums", "uint64", 1);
    if (array.shape(0) != n) {
        throw py::value_error("checksums has " + std::to_string(array.shape(0)) +
                              " elements, expected " + std::to_string(n));
    }
    if (!array.writeable()) throw py::value_error("checksums must be writable");
    return array.mutable_data();
}

void CheckThreads(int threads) {
    if (threads < 1 || threads > kThreadsMax) {
        throw py::value_error("threads must be from 1 to " + std::to_string(kThreadsMax));
    }
}

void CheckDistinct(const std::int64_t *ids, std::size_t n) {
    if (n < 2 || std::is_sorted(ids, ids + n, [](auto a, auto b) { return a <= b; })) return;
    std::vector<std::int64_t> sorted(ids, ids + n);
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) {
        throw py::value_error("block_ids: overlapping destination, block " +
                              std::to_string(*twice) + " appears twice");
    }
}

void CheckDisjoint(const std::uint64_t *addrs, std::size_t n, std::uint64_t block_bytes) {
    if (n < 2) return;
    std::vector<std::uint64_t> copy;
    const std::uint64_t *sorted = addrs;
    if (!std::is_sorted(addrs, addrs + n)) {
        copy.assign(addrs, addrs + n);
        std::sort(copy.begin(), copy.end());
        sorted = copy.data();
    }
    for (std::size_t i = 1; i < n; ++i) {
        if (sorted[i] - sorted[i - 1] < block_bytes) {
            throw py::value_error("addrs: canonical blocks overlap, two start " +
                                  std::to_string(sorted[i] - sorted[i - 1]) +
                                  " bytes apart and a block has " + std::to_string(block_bytes));
        }
    }
}

// One checked call: the arrays keep the memory alive while the GIL is released.
struct Call {
    py::array_t<std::int64_t> ids;
    py::array_t<std::uint64_t> addrs;
    std::size_t n;

    Call(const CopyPlan &plan, const py::object &block_ids, const py::object &addresses,
         int threads)
        : ids(TakeIds(block_ids)), addrs(TakeAddresses(addresses)) {
        CheckThreads(threads);
        n = static_cast<std::size_t>(ids.shape(0));
        if (addrs.shape(0) != ids.shape(0)) {
            throw py::value_error("block_ids has " + std::to_string(n) + " elements and addrs " +
                                  std::to_string(addrs.shape(0)));
        }
        for (std::size_t i = 0; i < n; ++i) {
            if (ids.data()[i] < 0 || ids.data()[i] >= plan.num_blocks) {
                throw py::index_error("block id " + std::to_string(ids.data()[i]) +
                                      " is out of range: the buffers have " +
                                      std::to_string(plan.num_blocks) + " blocks");
            }
            const std::uint64_t address = addrs.data()[i];
            if (address == 0 || address > UINT64_MAX - plan.block_bytes) {
                throw py::value_error("addrs: null or impossible address");
            }
            if (TouchesEngine(plan, address, plan.block_bytes)) {
                throw py::value_error("addrs: a canonical block overlaps the engine's memory");
            }
        }
    }

    void CheckGather(const CopyPlan &plan) const {
        CheckDisjoint(addrs.data(), n, plan.block_bytes);
    }
    void CheckScatter(const CopyPlan &plan) const {
        if (!plan.writable) throw py::value_error("plan: the engine's buffers are read-only");
        CheckDistinct(ids.data(), n);
    }
    std::uint8_t *const *blocks() const {
        return reinterpret_cast<std::uint8_t *const *>(addrs.data());
    }
};

void CheckRange(const CopyPlan &plan, std::uint64_t begin, std::uint64_t end) {
    if (begin > end || end > plan.block_bytes) {
        throw py::value_error("offset_begin and offset_end must satisfy 0 <= begin <= end <= " +
                              std::to_string(plan.block_bytes));
    }
}

CopyPlan NewPlan(const py::object &runs, std::int64_t block_bytes, std::int64_t num_blocks,
                 bool writable) {
    const auto rows = TakeArray<std::int64_t>(runs, "runs", "int64", 2);
    if (rows.shape(1) != 7) {
        throw py::value_error(
            "runs must have 7 columns: base, block_stride, engine_stride, block_offset, "
            "piece_stride, count, bytes");
    }
    if (block_bytes <= 0) throw py::value_error("block_bytes must be positive");
    std::vector<Run> list;
    const auto r = rows.unchecked<2>();
    for (py::ssize_t i = 0; i < r.shape(0); ++i) {
        const std::string name = "runs[" + std::to_string(i) + "]: ";
        if (r(i, 0) <= 0) throw py::value_error(name + "base must be an address");
        if (r(i, 3) < 0 || r(i, 4) < 0) {
            throw py::value_error(name + "block_offset and piece_stride must not be negative");
        }
        if (r(i, 5) <= 0 || r(i, 5) > UINT32_MAX || r(i, 6) <= 0 || r(i, 6) > UINT32_MAX) {
            throw py::value_error(name + "count and bytes must be from 1 to 2**32 - 1");
        }
        list.push_back({reinterpret_cast<std::uint8_t *>(r(i, 0)), r(i, 1), r(i, 2),
                        static_cast<std::uint64_t>(r(i, 3)), static_cast<std::uint64_t>(r(i, 4)),
                        static_cast<std::uint32_t>(r(i, 5)), static_cast<std::uint32_t>(r(i, 6))});
    }
    CopyPlan plan;
    const std::string wrong =
        MakePlan(list, static_cast<std::uint64_t>(block_bytes), num_blocks, &plan);
    if (!wrong.empty()) throw py::value_error("runs: " + wrong);
    plan.writable = writable;
    return plan;
}

CopyPlan NewScatteredPlan(const py::object &addresses, const py::object &sizes, bool writable) {
    const auto rows = TakeArray<std::uint64_t>(addresses, "addresses", "uint64", 2);
    const auto bytes = TakeArray<std::uint64_t>(sizes, "sizes", "uint64", 1);
    if (rows.shape(1) != bytes.shape(0)) {
        throw py::value_error("addresses has " + std::to_string(rows.shape(1)) +
                              " pieces a block, sizes " + std::to_string(bytes.shape(0)));
    }
    const auto num_pieces = static_cast<std::size_t>(bytes.shape(0));
    CopyPlan plan;
    std::string wrong;
    {
        py::gil_scoped_release released;
        wrong = MakeScatteredPlan(rows.data(), rows.shape(0), bytes.data(), num_pieces, writable,
                                  &plan);
    }
    if (!wrong.empty()) throw py::value_error(wrong);
    return plan;
}

py::array_t<std::int64_t> RunsArray(const CopyPlan &plan) {
    py::array_t<std::int64_t> out({static_cast<py::ssize_t>(plan.runs.size()), py::ssize_t{7}});
    std::int64_t *row = out.mutable_data();
    for (const Run &run : plan.runs) {
        *row++ = reinterpret_cast<std::int64_t>(run.base);
        *row++ = run.block_stride;
        *row++ = run.engine_stride;
        *row++ = static_cast<std::int64_t>(run.block_offset);
        *row++ = static_cast<std::int64_t>(run.piece_stride);
        *row++ = run.count;
        *row++ = run.bytes;
    }
    return out;
}

// Of scattered blocks: (num_blocks, num_runs), else no rows.
py::array_t<std::uint64_t> AddressesArray(const CopyPlan &plan) {
    const auto columns = static_cast<py::ssize_t>(plan.runs.size());
    const auto rows = static_cast<py::ssize_t>(plan.addresses.size()) / columns;
    py::array_t<std::uint64_t> out({rows, columns});
    std::uint64_t *to = out.mutable_data();
    for (std::uint8_t *address : plan.addresses) *to++ = reinterpret_cast<std::uintptr_t>(address);
    return out;
}

void Gather(const CopyPlan &plan, const py::object &block_ids, const py::object &addrs,
            const py::object &checksums, int threads) {
    const Call call(plan, block_ids, addrs, threads);
    std::uint64_t *sums = TakeChecksums(checksums, call.ids.shape(0));
    call.CheckGather(plan);
    py::gil_scoped_release released;
    GatherBlocks(plan, call.ids.data(), call.blocks(), call.n, sums, threads);
}

void Scatter(const CopyPlan &plan, const py::object &block_ids, const py::object &addrs,
             const py::object &checksums, int threads) {
    const Call call(plan, block_ids, addrs, threads);
    std::uint64_t *sums = TakeChecksums(checksums, call.ids.shape(0));
    call.CheckScatter(plan);
    py::gil_scoped_release released;
    ScatterBlocks(plan, call.ids.data(), call.blocks(), call.n, sums, threads);
}

void BindGatherRange(const CopyPlan &plan, const py::object &block_ids, const py::object &addrs,
                     std::uint64_t begin, std::uint64_t end, int threads) {
    const Call call(plan, block_ids, addrs, threads);
    CheckRange(plan, begin, end);
    call.CheckGather(plan);
    py::gil_scoped_release released;
    GatherRange(plan, call.ids.data(), call.blocks(), call.n, begin, end, threads);
}

void BindScatterRange(const CopyPlan &plan, const py::object &block_ids, const py::object &addrs,
                      std::uint64_t begin, std::uint64_t end, int threads) {
    const Call call(plan, block_ids, addrs, threads);
    CheckRange(plan, begin, end);
    call.CheckScatter(plan);
    py::gil_scoped_release released;
    ScatterRange(plan, call.ids.data(), call.blocks(), call.n, begin, end, threads);
}

void BindChecksumBlocks(const py::object &addresses, std::uint64_t bytes,
                        const py::object &checksums, int threads) {
    const auto addrs = TakeAddresses(addresses);
    CheckThreads(threads);
    if (checksums.is_none()) throw py::type_error("checksums must be a numpy array of uint64");
    std::uint64_t *sums = TakeChecksums(checksums, addrs.shape(0));
    const auto n = static_cast<std::size_t>(addrs.shape(0));
    if (bytes > 0 && std::find(addrs.data(), addrs.data() + n, 0U) != addrs.data() + n) {
        throw py::value_error("addrs: null address");
    }
    py::gil_scoped_release released;
    ChecksumBlocks(reinterpret_cast<const std::uint8_t *const *>(addrs.data()), n, bytes, sums,
                   threads);
}

std::uint64_t Checksum(std::uintptr_t addr, std::size_t bytes) {
    if (addr == 0 && bytes > 0) throw py::value_error("addr is null");
    py::gil_scoped_release released;
    return Xxh3(reinterpret_cast<const void *>(addr), bytes);
}

std::uint64_t BindCopyWithChecksum(std::uintptr_t to, std::uintptr_t from, std::size_t bytes) {
    if ((to == 0 || from == 0) && bytes > 0) throw py::value_error("to and from must not be null");
    if (to < from + bytes && from < to + bytes) {
        throw py::value_error("to and from overlap");
    }
    py::gil_scoped_release released;
    return CopyWithChecksum(reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from),
                            bytes);
}

// An exported C-contiguous view of any object with the buffer protocol.
class BufferView {
public:
    explicit BufferView(const py::object &object) {
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) {
            throw py::error_already_set();
        }
    }
    ~BufferView() { PyBuffer_Release(&view_); }
    BufferView(const BufferView &) = delete;
    BufferView &operator=(const BufferView &) = delete;
    const void *data() const { return view_.buf; }
    std::size_t bytes() const { return static_cast<std::size_t>(view_.len); }

private:
    Py_buffer view_;
};

std::uint64_t HashBuffer(const py::object &data) {
    const BufferView view(data);
    py::gil_scoped_release released;
    return Xxh3(view.data(), view.bytes());
}

std::string DtypeName(const DlDataType &dtype) {
    // The codes of DLDataTypeCode; 7 and up name one type each.
    constexpr std::array kSmallFloats = {"float8_e3m4",     "float8_e4m3",     "float8_e4m3b11fnuz",
                                         "float8_e4m3fn",   "float8_e4m3fnuz", "float8_e5m2",
                                         "float8_e5m2fnuz", "float8_e8m0fnu"};
    const std::string bits = std::to_string(dtype.bits);
    switch (dtype.code) {
        case 0:
            return "int" + bits;
        case 1:
            return "uint" + bits;
        case 2:
            return "float" + bits;
        case 4:
            return "bfloat" + bits;
        case 5:
            return "complex" + bits;
        case 6:
            return "bool";
        default:
            break;
    }
    if (dtype.code >= 7 && dtype.code < 7 + kSmallFloats.size()) {
        return kSmallFloats[dtype.code - 7U];
    }
    return "dlpack_" + std::to_string(dtype.code) + "_" + bits;
}

// (address, shape, strides in bytes, itemsize, dtype, device type, device id, readonly).
// Does not take the capsule over: its own destructor frees the tensor, so whoever uses the memory
// keeps the capsule.
py::tuple DlpackDescribe(const py::object &capsule) {
    const DlTensor *tensor = nullptr;
    bool readonly = false;
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0) {
        const auto *managed = static_cast<const DlManagedTensorVersioned *>(
            PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
        if (managed->major != kDlMajor) {
            throw py::value_error("capsule: DLPack " + std::to_string(managed->major) +
                                  " is not understood, only version 1");
        }
        tensor = &managed->tensor;
        readonly = (managed->flags & kDlReadOnly) != 0;
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor") != 0) {
        tensor =
            &static_cast<const DlManagedTensor *>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))
                 ->tensor;
    } else {
        throw py::type_error("capsule must be an unused DLPack capsule");
    }
    if (tensor->dtype.lanes != 1 || tensor->dtype.bits % 8 != 0 || tensor->dtype.bits == 0) {
        throw py::value_error("capsule: elements must be whole bytes without vector lanes");
    }
    const std::int64_t itemsize = tensor->dtype.bits / 8;
    py::tuple shape(static_cast<std::size_t>(tensor->ndim));
    py::tuple strides(static_cast<std::size_t>(tensor->ndim));
    std::int64_t dense = itemsize;
    for (std::int32_t axis = tensor->ndim - 1; axis >= 0; --axis) {
        const auto at = static_cast<std::size_t>(axis);
        shape[at] = tensor->shape[axis];
        strides[at] = tensor->strides != nullptr ? tensor->strides[axis] * itemsize : dense;
        dense *= tensor->shape[axis];
    }
    return py::make_tuple(reinterpret_cast<std::uintptr_t>(tensor->data) + tensor->byte_offset,
                          shape, strides, itemsize, DtypeName(tensor->dtype), tensor->device.type,
                          tensor->device.id, readonly);
}

}  // namespace

void BindCopy(py::module_ &m) {
    py::class_<CopyPlan>(m, "CopyPlan")
        .def(py::init(&NewPlan), py::arg("runs"), py::arg("block_bytes"), py::arg("num_blocks"),
             py::kw_only(), py::arg("writable") = true)
        .def_static("scattered", &NewScatteredPlan, py::arg("addresses"), py::arg("sizes"),
                    py::kw_only(), py::arg("writable") = true)
        .def_readonly("block_bytes", &CopyPlan::block_bytes)
        .def_readonly("num_blocks", &CopyPlan::num_blocks)
        .def_readonly("writable", &CopyPlan::writable)
        .def_property_readonly("num_runs", [](const CopyPlan &plan) { return plan.runs.size(); })
        .def_property_readonly("runs", &RunsArray)
        .def_property_readonly("addresses", &AddressesArray);
    m.def("xxh3", &HashBuffer, py::arg("data"));
    m.def("checksum", &Checksum, py::arg("addr"), py::arg("bytes"));
    m.def("copy_with_checksum", &BindCopyWithChecksum, py::arg("to"), py::arg("from_"),
          py::arg("bytes"));
    m.def("gather", &Gather, py::arg("plan"), py::arg("block_ids"), py::arg("addrs"),
          py::arg("checksums") = py::none(), py::arg("threads") = 1);
    m.def("scatter", &Scatter, py::arg("plan"), py::arg("block_ids"), py::arg("addrs"),
          py::arg("checksums") = py::none(), py::arg("threads") = 1);
    m.def("gather_range", &BindGatherRange, py::arg("plan"), py::arg("block_ids"), py::arg("addrs"),
          py::arg("offset_begin"), py::arg("offset_end"), py::arg("threads") = 1);
    m.def("scatter_range", &BindScatterRange, py::arg("plan"), py::arg("block_ids"),
          py::arg("addrs"), py::arg("offset_begin"), py::arg("offset_end"), py::arg("threads") = 1);
    m.def("checksum_blocks", &BindChecksumBlocks, py::arg("addrs"), py::arg("bytes"),
          py::arg("checksums"), py::arg("threads") = 1);
    m.def("dlpack_describe", &DlpackDescribe, py::arg("capsule"));
    m.def("_simd_level", [] { return static_cast<int>(CurrentSimdLevel()); });
    m.def(
        "_force_simd_level",
        [](int level) { return ForceSimdLevel(static_cast<SimdLevel>(level)); }, py::arg("level"));
}

}  // namespace kvstore
