// The part of the DLPack ABI that describes a tensor in memory.
//
// From the DLPack specification, dmlc.github.io/dlpack/latest/c_api.html: the structs below must
// keep its member order and sizes. Capsules named "dltensor" hold a DlManagedTensor, those named
// "dltensor_versioned" a DlManagedTensorVersioned of major version 1.
#pragma once

#include <cstdint>

namespace kvstore {

enum DlDeviceType : std::int32_t { kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3, kDlRocmHost = 11 };

struct DlDevice {
    std::int32_t type;
    std::int32_t id;
};

struct DlDataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct DlTensor {
    void *data;
    DlDevice device;
    std::int32_t ndim;
    DlDataType dtype;
    std::int64_t *shape;
    std::int64_t *strides;  // in elements; null means dense in C order
    std::uint64_t byte_offset;
};

struct DlManagedTensor {
    DlTensor tensor;
    void *context;
    void (*deleter)(DlManagedTensor *);
};

struct DlManagedTensorVersioned {
    std::uint32_t major;
    std::uint32_t minor;
    void *context;
    void (*deleter)(DlManagedTensorVersioned *);
    std::uint64_t flags;
    DlTensor tensor;
};

inline constexpr std::uint32_t kDlMajor = 1;
inline constexpr std::uint64_t kDlReadOnly = 1;

static_assert(sizeof(DlTensor) == 48 && sizeof(DlManagedTensorVersioned) == 80);

}  // namespace kvstore
