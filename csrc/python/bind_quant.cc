#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "copy/quant.h"
#include "python/bind.h"

namespace py = pybind11;

namespace kvstore {
namespace {

static_assert(sizeof(CodecStatus) == sizeof(std::uint8_t));
static_assert(sizeof(CodecError) == 4 * sizeof(double));

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void Require(bool condition, const std::string &message) {
    if (!condition) throw py::value_error(message);
}

std::size_t CheckedSize(const py::array &array, py::ssize_t expected, const char *name) {
    Require(array.ndim() == 1, std::string(name) + " must have one dimension");
    Require(expected < 0 || array.size() == expected,
            std::string(name) + " has " + std::to_string(array.size()) + " entries, not " +
                std::to_string(expected));
    return static_cast<std::size_t>(array.size());
}

std::vector<std::uint8_t *> Pointers(const Array<std::uint64_t> &addrs, std::size_t alignment,
                                     const char *name) {
    std::vector<std::uint8_t *> pointers(static_cast<std::size_t>(addrs.size()));
    for (std::size_t i = 0; i < pointers.size(); ++i) {
        const std::uint64_t address = addrs.data()[i];
        Require(address != 0 && address % alignment == 0,
                std::string(name) + "[" + std::to_string(i) + "] is null or not aligned to " +
                    std::to_string(alignment) + " bytes");
        pointers[i] = reinterpret_cast<std::uint8_t *>(address);
    }
    return pointers;
}

Simd CheckedSimd(std::optional<int> level) {
    if (!level) return BestSimd();
    Require(*level >= 0 && *level <= static_cast<int>(BestSimd()),
            "simd must be in [0, " + std::to_string(static_cast<int>(BestSimd())) + "]");
    return static_cast<Simd>(*level);
}

CodecFormat MakeFormat(int codec, int element, std::uint32_t planes, std::uint32_t tokens,
                       std::uint32_t heads, std::uint32_t dim, std::uint64_t raw_bytes,
                       int shuffle_width) {
    Require(codec >= 1 && codec <= 3, "codec must be 1 (int8), 2 (fp8) or 3 (zstd)");
    Require(element >= 0 && element <= 3, "element must be in [0, 3]");
    Require(shuffle_width >= 0 && shuffle_width <= 4, "shuffle_width must be 0, 1, 2 or 4");
    const CodecFormat format{static_cast<CodecId>(codec),
                             static_cast<ElementType>(element),
                             static_cast<std::uint8_t>(shuffle_width),
                             planes,
                             tokens,
                             heads,
                             dim,
                             raw_bytes};
    Require(IsValidFormat(format),
            "raw_bytes, element, planes, tokens, heads, dim and shuffle_width do not fit each "
            "other, or are too large");
    return format;
}

void RequireQuant(const CodecFormat &format) {
    Require(format.codec != CodecId::kZstd, "format must be of int8 or fp8");
}

void Encode(const CodecFormat &format, const Array<std::uint64_t> &raw_addrs,
            Array<std::uint8_t> &out, const Array<std::uint64_t> &offsets,
            Array<std::uint8_t> &statuses, Array<double> &errors, std::optional<int> simd) {
    RequireQuant(format);
    const auto n = static_cast<py::ssize_t>(CheckedSize(raw_addrs, -1, "raw_addrs"));
    const std::size_t out_bytes = CheckedSize(out, -1, "out");
    CheckedSize(offsets, n, "offsets");
    CheckedSize(statuses, n, "statuses");
    Require(errors.ndim() == 2 && errors.shape(0) == n && errors.shape(1) == 4,
            "errors must have shape (n, 4)");
    const auto raw = Pointers(raw_addrs, ElementBytes(format.element), "raw_addrs");
    std::vector<std::uint8_t *> to(raw.size());
    const std::uint64_t encoded_bytes = QuantEncodedBytes(format);
    for (std::size_t i = 0; i < to.size(); ++i) {
        const std::uint64_t offset = offsets.data()[i];
        Require(offset <= out_bytes && out_bytes - offset >= encoded_bytes,
                "offsets[" + std::to_string(i) + "] leaves no room in out");
        to[i] = out.mutable_data() + offset;
    }
    auto *status = reinterpret_cast<CodecStatus *>(statuses.mutable_data());
    auto *error = reinterpret_cast<CodecError *>(errors.mutable_data());
    const Simd level = CheckedSimd(simd);
    py::gil_scoped_release release;
    QuantEncode(format, raw.data(), raw.size(), to.data(), status, error, level);
}

void Decode(const CodecFormat &format, const Array<std::uint64_t> &encoded_addrs,
            const Array<std::uint64_t> &lengths, const Array<std::uint64_t> &out_addrs,
            Array<std::uint8_t> &statuses, std::optional<int> simd) {
    RequireQuant(format);
    const auto n = static_cast<py::ssize_t>(CheckedSize(encoded_addrs, -1, "encoded_addrs"));
    CheckedSize(lengths, n, "lengths");
    CheckedSize(out_addrs, n, "out_addrs");
    CheckedSize(statuses, n, "statuses");
    const auto encoded = Pointers(encoded_addrs, 1, "encoded_addrs");
    const auto out = Pointers(out_addrs, ElementBytes(format.element), "out_addrs");
    auto *status = reinterpret_cast<CodecStatus *>(statuses.mutable_data());
    const std::uint64_t *length = lengths.data();
    const Simd level = CheckedSimd(simd);
    py::gil_scoped_release release;
    QuantDecode(format, encoded.data(), length, encoded.size(), out.data(), status, level);
}

void CheckHeaders(const CodecFormat &format, const Array<std::uint64_t> &encoded_addrs,
                  const Array<std::uint64_t> &lengths, Array<std::uint64_t> &encoded_bytes,
                  Array<std::uint8_t> &statuses) {
    const auto n = static_cast<py::ssize_t>(CheckedSize(encoded_addrs, -1, "encoded_addrs"));
    CheckedSize(lengths, n, "lengths");
    CheckedSize(encoded_bytes, n, "encoded_bytes");
    CheckedSize(statuses, n, "statuses");
    const auto encoded = Pointers(encoded_addrs, 1, "encoded_addrs");
    auto *status = reinterpret_cast<CodecStatus *>(statuses.mutable_data());
    std::uint64_t *bytes = encoded_bytes.mutable_data();
    const std::uint64_t *length = lengths.data();
    py::gil_scoped_release release;
    for (std::size_t i = 0; i < encoded.size(); ++i) {
        bytes[i] = 0;
        status[i] = ReadCodecHeader(format, encoded[i], length[i], &bytes[i]);
    }
}

void WriteHeader(const CodecFormat &format, Array<std::uint8_t> &out, std::uint64_t encoded_bytes) {
    Require(CheckedSize(out, -1, "out") >= kCodecHeaderBytes, "out has no room for a header");
    Require(encoded_bytes >= kCodecHeaderBytes, "encoded_bytes must count the header");
    WriteCodecHeader(format, encoded_bytes, out.mutable_data());
}

void CopyBlocks(const Array<std::uint64_t> &from_addrs, const Array<std::uint64_t> &to_addrs,
                std::uint64_t bytes) {
    const auto n = static_cast<py::ssize_t>(CheckedSize(from_addrs, -1, "from_addrs"));
    CheckedSize(to_addrs, n, "to_addrs");
    const auto from = Pointers(from_addrs, 1, "from_addrs");
    const auto to = Pointers(to_addrs, 1, "to_addrs");
    py::gil_scoped_release release;
    for (std::size_t i = 0; i < from.size(); ++i) std::memcpy(to[i], from[i], bytes);
}

// The bytes at `address`, which is outside numpy's knowledge, as the caller's `shuffled` array.
void CheckShuffle(std::uint64_t address, std::size_t bytes, std::size_t width) {
    Require(address != 0, "address must not be null");
    Require((width == 1 || width == 2 || width == 4) && bytes % width == 0,
            "width must be 1, 2 or 4 and divide the size of the shuffled array");
}

void ShuffleFrom(std::uint64_t address, Array<std::uint8_t> &shuffled, std::size_t width) {
    const std::size_t bytes = CheckedSize(shuffled, -1, "shuffled");
    CheckShuffle(address, bytes, width);
    std::uint8_t *out = shuffled.mutable_data();
    py::gil_scoped_release release;
    ShuffleBytes(reinterpret_cast<const std::uint8_t *>(address), bytes, width, out);
}

void UnshuffleTo(const Array<std::uint8_t> &shuffled, std::uint64_t address, std::size_t width) {
    const std::size_t bytes = CheckedSize(shuffled, -1, "shuffled");
    CheckShuffle(address, bytes, width);
    const std::uint8_t *in = shuffled.data();
    py::gil_scoped_release release;
    UnshuffleBytes(in, bytes, width, reinterpret_cast<std::uint8_t *>(address));
}

}  // namespace

void BindQuant(py::module_ &m) {
    py::class_<CodecFormat>(m, "CodecFormat",
                            "What encoder and decoder of a block must agree on; immutable.")
        .def(py::init(&MakeFormat), py::kw_only(), py::arg("codec"), py::arg("element"),
             py::arg("planes"), py::arg("tokens"), py::arg("heads"), py::arg("dim"),
             py::arg("raw_bytes"), py::arg("shuffle_width") = 0)
        .def_property_readonly("encoded_bytes", [](const CodecFormat &format) {
            RequireQuant(format);
            return QuantEncodedBytes(format);
        });
    m.attr("CODEC_HEADER_BYTES") = kCodecHeaderBytes;
    m.def("codec_simd_level", [] { return static_cast<int>(BestSimd()); });
    m.def("codec_encode", &Encode, py::arg("format"), py::arg("raw_addrs").noconvert(),
          py::arg("out").noconvert(), py::arg("offsets").noconvert(),
          py::arg("statuses").noconvert(), py::arg("errors").noconvert(),
          py::arg("simd") = py::none());
    m.def("codec_decode", &Decode, py::arg("format"), py::arg("encoded_addrs").noconvert(),
          py::arg("lengths").noconvert(), py::arg("out_addrs").noconvert(),
          py::arg("statuses").noconvert(), py::arg("simd") = py::none());
    m.def("codec_check_headers", &CheckHeaders, py::arg("format"),
          py::arg("encoded_addrs").noconvert(), py::arg("lengths").noconvert(),
          py::arg("encoded_bytes").noconvert(), py::arg("statuses").noconvert());
    m.def("codec_write_header", &WriteHeader, py::arg("format"), py::arg("out").noconvert(),
          py::arg("encoded_bytes"));
    m.def("codec_copy", &CopyBlocks, py::arg("from_addrs").noconvert(),
          py::arg("to_addrs").noconvert(), py::arg("bytes"));
    m.def("codec_shuffle", &ShuffleFrom, py::arg("address"), py::arg("shuffled").noconvert(),
          py::arg("width"));
    m.def("codec_unshuffle", &UnshuffleTo, py::arg("shuffled").noconvert(), py::arg("address"),
          py::arg("width"));
}

}  // namespace kvstore
