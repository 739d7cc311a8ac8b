#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/blake3.h"
#include "core/block_hash.h"
#include "core/hash_dispatch.h"
#include "core/sha256.h"
#include "python/bind.h"

namespace kvstore {
namespace {

namespace py = pybind11;

HashChain ParseChain(std::string_view algorithm) {
    if (algorithm == "blake3") return HashChain::kBlake3;
    if (algorithm == "sha256") return HashChain::kSha256;
    if (algorithm == "vllm_sha256") return HashChain::kVllmSha256;
    if (algorithm == "vllm_sha256_cbor") return HashChain::kVllmSha256Cbor;
    throw py::value_error("algorithm: unknown chain '" + std::string(algorithm) +
                          "'; one of blake3, sha256, vllm_sha256, vllm_sha256_cbor");
}

[[noreturn]] void ThrowBadToken(std::size_t index, const std::string &value) {
    throw py::value_error("token_ids[" + std::to_string(index) + "] is " + value +
                          ", not in [0, 2**32)");
}

// The token ids of a call, and what keeps their memory alive.
struct Tokens {
    TokenSpan span;
    std::unique_ptr<std::uint32_t[]> converted;
};

std::uint32_t TokenFromObject(PyObject *item, std::size_t index) {
    py::object number;
    if (!PyLong_Check(item)) {
        number = py::reinterpret_steal<py::object>(PyNumber_Index(item));
        if (!number) {
            PyErr_Clear();
            throw py::type_error("token_ids[" + std::to_string(index) + "] is not an integer");
        }
        item = number.ptr();
    }
    int overflow = 0;
    const long long id = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (overflow != 0 || id < 0 || id > UINT32_MAX) {
        ThrowBadToken(index, py::str(py::handle(item)).cast<std::string>());
    }
    return static_cast<std::uint32_t>(id);
}

Tokens TokensFromSequence(const py::handle &sequence) {
    // A tuple of its own: __index__ of an item may run code that changes the caller's list.
    const bool only_ints = [&] {
        for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.ptr()); ++i) {
            if (!PyLong_CheckExact(PySequence_Fast_GET_ITEM(sequence.ptr(), i))) return false;
        }
        return true;
    }();
    const py::object items =
        only_ints ? py::reinterpret_borrow<py::object>(sequence)
                  : py::reinterpret_steal<py::object>(PySequence_Tuple(sequence.ptr()));
    const auto count = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(items.ptr()));
    Tokens tokens;
    tokens.converted.reset(new std::uint32_t[count]);
    PyObject **item = PySequence_Fast_ITEMS(items.ptr());
    for (std::size_t i = 0; i < count; ++i) tokens.converted[i] = TokenFromObject(item[i], i);
    tokens.span = {tokens.converted.get(), count, TokenSpan::Width::kUint32};
    return tokens;
}

Tokens TokensFromArray(const py::array &array) {
    const char kind = array.dtype().kind();
    const auto width = array.itemsize();
    if (array.ndim() != 1 || (array.flags() & py::array::c_style) == 0 ||
        (kind != 'i' && kind != 'u') || (width != 4 && width != 8) ||
        array.dtype().byteorder() == '>' ||
        reinterpret_cast<std::uintptr_t>(array.data()) % static_cast<std::size_t>(width) != 0) {
        throw py::type_error(
            "token_ids: need a contiguous, aligned, one-dimensional array of 32 or 64 bit "
            "integers");
    }
    Tokens tokens;
    tokens.span.data = array.data();
    tokens.span.count = static_cast<std::size_t>(array.size());
    if (width == 4) {
        tokens.span.width = kind == 'u' ? TokenSpan::Width::kUint32 : TokenSpan::Width::kInt32;
    } else {
        tokens.span.width = kind == 'u' ? TokenSpan::Width::kUint64 : TokenSpan::Width::kInt64;
    }
    return tokens;
}

std::vector<ExtraKey> ExtraKeysFrom(const py::tuple &extra_keys, std::size_t bytes_max) {
    std::vector<ExtraKey> keys(extra_keys.size());
    for (std::size_t i = 0; i < keys.size(); ++i) {
        PyObject *item = PyTuple_GET_ITEM(extra_keys.ptr(), static_cast<Py_ssize_t>(i));
        if (item == Py_None) continue;
        const std::string name = "extra_keys[" + std::to_string(i) + "]";
        if (!PyBytes_Check(item)) throw py::type_error(name + " is neither bytes nor None");
        keys[i].data = reinterpret_cast<const std::uint8_t *>(PyBytes_AS_STRING(item));
        keys[i].num_bytes = static_cast<std::size_t>(PyBytes_GET_SIZE(item));
        if (keys[i].num_bytes > bytes_max) {
            throw py::value_error(name + " has " + std::to_string(keys[i].num_bytes) +
                                  " bytes; at most " + std::to_string(bytes_max) + " fit here");
        }
    }
    return keys;
}

std::optional<BlockHash> HashFrom(const std::optional<py::bytes> &bytes, const char *name) {
    if (!bytes.has_value()) return std::nullopt;
    const auto view = static_cast<std::string_view>(*bytes);
    BlockHash hash;
    if (view.size() != sizeof(hash)) {
        throw py::value_error(std::string(name) + " has " + std::to_string(view.size()) +
                              " bytes, not 32");
    }
    std::memcpy(hash.bytes, view.data(), sizeof(hash));
    return hash;
}

py::array_t<std::uint8_t> HashBlocksOf(const py::object &token_ids, py::ssize_t block_tokens,
                                       const std::optional<py::bytes> &parent,
                                       const std::optional<py::sequence> &extra_keys,
                                       std::string_view algorithm) {
    const HashChain chain = ParseChain(algorithm);
    if (block_tokens <= 0 || block_tokens > (1 << 20)) {
        throw py::value_error("block_tokens is " + std::to_string(block_tokens) +
                              ", not in [1, 2**20]");
    }
    const auto per_block = static_cast<std::size_t>(block_tokens);
    const std::optional<BlockHash> before = HashFrom(parent, "parent");
    const bool is_array = py::isinstance<py::array>(token_ids);
    if (!is_array && !PyList_Check(token_ids.ptr()) && !PyTuple_Check(token_ids.ptr())) {
        throw py::type_error("token_ids: need a list or tuple of int, or an array");
    }
    const Tokens tokens = is_array ? TokensFromArray(py::reinterpret_borrow<py::array>(token_ids))
                                   : TokensFromSequence(token_ids);
    const std::size_t num_blocks = tokens.span.count / per_block;

    // Bytes objects are immutable and this tuple keeps them while the GIL is released.
    const py::tuple held = extra_keys.has_value() ? py::tuple(*extra_keys) : py::tuple();
    const std::size_t extra_bytes_max =
        chain == HashChain::kVllmSha256 ? VllmExtraKeyBytesMax(per_block) : UINT32_MAX;
    const std::vector<ExtraKey> extras = ExtraKeysFrom(held, extra_bytes_max);
    if (extra_keys.has_value() && extras.size() != num_blocks) {
        throw py::value_error("extra_keys has " + std::to_string(extras.size()) + " entries for " +
                              std::to_string(num_blocks) + " whole blocks");
    }

    py::array_t<std::uint8_t> hashes({static_cast<py::ssize_t>(num_blocks), py::ssize_t{32}});
    auto *out = reinterpret_cast<BlockHash *>(hashes.mutable_data());
    std::size_t bad;
    {
        const py::gil_scoped_release release;
        bad = FirstBadToken(tokens.span);
        if (bad == tokens.span.count) {
            HashBlocks(chain, tokens.span, per_block, before.has_value() ? &*before : nullptr,
                       extras, out);
        }
    }
    if (bad != tokens.span.count) {
        const auto value = py::reinterpret_borrow<py::array>(token_ids)[py::int_(bad)];
        ThrowBadToken(bad, py::str(value).cast<std::string>());
    }
    py::detail::array_proxy(hashes.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
    return hashes;
}

void AppendCborHead(std::string &out, int major, std::uint64_t argument) {
    const int num_bytes = argument < 24            ? 0
                          : argument <= 0xff       ? 1
                          : argument <= 0xffff     ? 2
                          : argument <= UINT32_MAX ? 4
                                                   : 8;
    constexpr int kCodes[] = {0, 24, 25, 0, 26, 0, 0, 0, 27};
    const int low = num_bytes == 0 ? static_cast<int>(argument) : kCodes[num_bytes];
    out.push_back(static_cast<char>(major << 5 | low));
    for (int i = num_bytes; i > 0; --i) out.push_back(static_cast<char>(argument >> (8 * (i - 1))));
}

void AppendCborInt(std::string &out, PyObject *value) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    const bool negative = overflow < 0 || (overflow == 0 && number < 0);
    // CBOR writes a negative n as -1 - n.
    const auto argument = negative ? py::reinterpret_steal<py::object>(PyNumber_Invert(value))
                                   : py::reinterpret_borrow<py::object>(value);
    const unsigned long long bits = PyLong_AsUnsignedLongLong(argument.ptr());
    if (bits == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw py::value_error("extra_keys: an integer does not fit in 64 bits");
    }
    AppendCborHead(out, negative ? 1 : 0, bits);
}

// Bounds nested tuples by Python's own recursion limit.
class RecursionGuard {
public:
    RecursionGuard() {
        if (Py_EnterRecursiveCall(" in extra_keys") != 0) throw py::error_already_set();
    }
    ~RecursionGuard() { Py_LeaveRecursiveCall(); }
    RecursionGuard(const RecursionGuard &) = delete;
    RecursionGuard &operator=(const RecursionGuard &) = delete;
};

// Canonical CBOR (RFC 8949, section 4.2.1).
void AppendCbor(std::string &out, PyObject *value) {
    if (value == Py_None) {
        out.push_back('\xf6');
    } else if (PyBool_Check(value)) {
        out.push_back(value == Py_True ? '\xf5' : '\xf4');
    } else if (PyLong_Check(value)) {
        AppendCborInt(out, value);
    } else if (PyBytes_Check(value)) {
        const auto size = static_cast<std::size_t>(PyBytes_GET_SIZE(value));
        AppendCborHead(out, 2, size);
        out.append(PyBytes_AS_STRING(value), size);
    } else if (PyUnicode_Check(value)) {
        Py_ssize_t size = 0;
        const char *text = PyUnicode_AsUTF8AndSize(value, &size);
        if (text == nullptr) throw py::error_already_set();
        AppendCborHead(out, 3, static_cast<std::uint64_t>(size));
        out.append(text, static_cast<std::size_t>(size));
    } else if (PyTuple_Check(value)) {
        const RecursionGuard guard;
        const Py_ssize_t count = PyTuple_GET_SIZE(value);
        AppendCborHead(out, 4, static_cast<std::uint64_t>(count));
        for (Py_ssize_t i = 0; i < count; ++i) AppendCbor(out, PyTuple_GET_ITEM(value, i));
    } else {
        throw py::type_error(std::string("extra_keys: cannot hash a ") + Py_TYPE(value)->tp_name);
    }
}

py::bytes BytesOf(const BlockHash &hash) {
    return py::bytes(reinterpret_cast<const char *>(hash.bytes), sizeof(hash.bytes));
}

py::bytes Blake3Of(const py::bytes &data, const std::optional<py::bytes> &key) {
    const std::optional<BlockHash> key_bytes = HashFrom(key, "key");
    const auto view = static_cast<std::string_view>(data);
    BlockHash out;
    {
        const py::gil_scoped_release release;
        Blake3(PickBlake3Compress(), reinterpret_cast<const std::uint8_t *>(view.data()),
               view.size(), key_bytes.has_value() ? key_bytes->bytes : nullptr, out.bytes);
    }
    return BytesOf(out);
}

py::bytes Sha256Of(const py::bytes &data) {
    const auto view = static_cast<std::string_view>(data);
    BlockHash out;
    {
        const py::gil_scoped_release release;
        Sha256(PickSha256Compress(), reinterpret_cast<const std::uint8_t *>(view.data()),
               view.size(), out.bytes);
    }
    return BytesOf(out);
}

}  // namespace

void BindHash(py::module_ &m) {
    m.def("hash_blocks", &HashBlocksOf, py::arg("token_ids"), py::arg("block_tokens"),
          py::arg("parent"), py::arg("extra_keys"), py::arg("algorithm"));
    m.def(
        "hash_chain_root",
        [](std::string_view algorithm) { return BytesOf(ChainRoot(ParseChain(algorithm))); },
        py::arg("algorithm"));
    m.def(
        "cbor",
        [](const py::tuple &value) {
            std::string out;
            AppendCbor(out, value.ptr());
            return py::bytes(out);
        },
        py::arg("value"));
    m.def("blake3", &Blake3Of, py::arg("data"), py::arg("key") = py::none());
    m.def("sha256", &Sha256Of, py::arg("data"));
    m.def(
        "set_hash_simd_limit",
        [](int level) {
            if (level < 0 || level > 2) throw py::value_error("level: 0, 1 or 2");
            SetHashSimdLimit(static_cast<HashSimdLevel>(level));
        },
        py::arg("level"));
}

}  // namespace kvstore
