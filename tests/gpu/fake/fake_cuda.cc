// A libcuda.so.1 without a GPU: device memory is host memory, kernels are emulated.
//
// For tests of what calls the driver. Signatures are checked by the compiler against NVIDIA's
// cuda.h where there is one (tests say so), else against `cuda_abi.h`. It is stricter than a
// driver: it refuses memory it does not know, asynchronous copies from pageable memory, and bad
// batches.
//
// Streams are *late*, if `fake_set_late(1)`: nothing runs before somebody waits for it, and each
// query runs one operation only. So whoever reuses memory too early reads wrong bytes for certain.
//
// Handles of memory and events name the owner's process and descriptor, and so end with it.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#if __has_include(<cudaTypedefs.h>) && !defined(KV_OWN_ABI)
#include <cudaTypedefs.h>
#define KV_HAS_CUDA_H 1
#else
#include "cuda_abi.h"
#define KV_HAS_CUDA_H 0
#endif

#include "cuda_on_host.h"
// After the words above.
#include "../../../csrc/cuda/block_copy.cu"

namespace {

struct Allocation {
    std::size_t bytes;
    int fd;  // -1: none, so it cannot be exported
    bool is_exportable;
    std::uint64_t id;
};
struct Opened {
    std::uintptr_t address;
    std::size_t bytes;
    int uses;
};
struct Registered {
    std::size_t bytes;
    unsigned int flags;
};
// In memory that processes share.
struct EventState {
    std::uint64_t recorded, completed;
};
struct FakeEvent {
    EventState *state;
    int fd;  // -1: not for other processes
    bool is_foreign;
};
struct FakeStream {
    std::deque<std::function<bool()>> todo;  // false: not yet
};
struct ModuleOf {
    std::string image;
};
struct Injected {
    CUresult code;
    int after, count;
};
struct HandleBody {
    std::uint64_t magic, pid, fd, bytes;
};
constexpr std::uint64_t kMagic = 0x6b76666b65637564;

std::recursive_mutex lock;
std::map<std::uintptr_t, Allocation> allocations;
std::map<std::uintptr_t, Registered> registered;
std::map<std::uintptr_t, std::size_t> pinned;
std::map<std::string, Opened> opened;
std::set<FakeStream *> streams;
std::set<FakeEvent *> events;
std::map<std::string, Injected> injected;
std::map<std::string, int> calls;
FakeStream null_stream;
bool is_late = false;
bool has_batch = true;
int context_depth = 0;
std::uint64_t next_id = 1;
int num_contexts = 0;

CUresult Enter(const char *name) {
    ++calls[name];
    const auto it = injected.find(name);
    if (it == injected.end()) return CUDA_SUCCESS;
    if (it->second.after-- > 0) return CUDA_SUCCESS;
    if (it->second.count-- <= 0) return CUDA_SUCCESS;
    return it->second.code;
}
#define ENTER(name)                                         \
    const std::lock_guard<std::recursive_mutex> held(lock); \
    if (const CUresult wrong = Enter(name); wrong != CUDA_SUCCESS) return wrong
#define NEEDS_CONTEXT \
    if (context_depth == 0) return CUDA_ERROR_INVALID_CONTEXT

bool Within(std::uintptr_t begin, std::size_t bytes, std::uintptr_t at, std::size_t size) {
    return at >= begin && at + size <= begin + bytes;
}
const Allocation *AllocationAt(std::uintptr_t at, std::size_t size, std::uintptr_t *base) {
    auto it = allocations.upper_bound(at);
    if (it == allocations.begin()) return nullptr;
    --it;
    if (!Within(it->first, it->second.bytes, at, size)) return nullptr;
    *base = it->first;
    return &it->second;
}
// Registered chunks that follow on one another serve as one.
bool IsRegistered(std::uintptr_t at, std::size_t size) {
    while (size > 0) {
        auto it = registered.upper_bound(at);
        if (it == registered.begin()) return false;
        --it;
        if (!Within(it->first, it->second.bytes, at, 1)) return false;
        const std::size_t here = it->first + it->second.bytes - at;
        if (here >= size) return true;
        at += here;
        size -= here;
    }
    return true;
}
bool IsKnown(std::uintptr_t at, std::size_t size) {
    std::uintptr_t base = 0;
    if (AllocationAt(at, size, &base) != nullptr) return true;
    for (const auto &[begin, bytes] : pinned) {
        if (Within(begin, bytes, at, size)) return true;
    }
    for (const auto &[name, memory] : opened) {
        if (Within(memory.address, memory.bytes, at, size)) return true;
    }
    return IsRegistered(at, size);
}

FakeStream *StreamOf(CUstream stream) {
    const auto value = reinterpret_cast<std::uintptr_t>(stream);
    if (value <= 2) return &null_stream;
    auto *fake = reinterpret_cast<FakeStream *>(stream);
    return streams.count(fake) != 0 ? fake : nullptr;
}
bool RunOne(FakeStream *stream) {
    if (stream->todo.empty() || !stream->todo.front()()) return false;
    stream->todo.pop_front();
    return true;
}
bool RunAll(FakeStream *stream) {
    while (!stream->todo.empty()) {
        if (!RunOne(stream)) return false;
    }
    return true;
}
void Enqueue(FakeStream *stream, std::function<bool()> work) {
    stream->todo.push_back(std::move(work));
    if (!is_late) RunAll(stream);
}

bool IsWritable(std::uintptr_t address) {
    std::FILE *maps = std::fopen("/proc/self/maps", "r");
    char line[512], permissions[8];
    bool is_writable = false;
    unsigned long begin = 0, end = 0;
    while (maps != nullptr && std::fgets(line, sizeof line, maps) != nullptr) {
        if (std::sscanf(line, "%lx-%lx %7s", &begin, &end, permissions) == 3 && address >= begin &&
            address < end) {
            is_writable = permissions[1] == 'w';
        }
    }
    if (maps != nullptr) std::fclose(maps);
    return is_writable;
}

void *MapShared(int fd, std::size_t bytes) {
    void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return at == MAP_FAILED ? nullptr : at;
}
CUresult Allocate(CUdeviceptr *address, std::size_t bytes, bool is_exportable) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    const int fd = memfd_create("fake-gpu", MFD_CLOEXEC);
    void *at =
        fd >= 0 && ftruncate(fd, static_cast<off_t>(bytes)) == 0 ? MapShared(fd, bytes) : nullptr;
    if (at == nullptr) {
        if (fd >= 0) close(fd);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *address = reinterpret_cast<CUdeviceptr>(at);
    allocations[*address] = {bytes, fd, is_exportable, next_id++};
    return CUDA_SUCCESS;
}
template <typename Handle>
int OpenHandle(const Handle &handle, HandleBody *body) {
    std::memcpy(body, &handle, sizeof *body);
    if (body->magic != kMagic) return -1;
    const std::string path =
        "/proc/" + std::to_string(body->pid) + "/fd/" + std::to_string(body->fd);
    return open(path.c_str(), O_RDWR | O_CLOEXEC);
}
template <typename Handle>
void FillHandle(Handle *handle, int fd, std::size_t bytes) {
    const HandleBody body{kMagic, static_cast<std::uint64_t>(getpid()),
                          static_cast<std::uint64_t>(fd), bytes};
    std::memset(handle, 0, sizeof *handle);
    std::memcpy(handle, &body, sizeof body);
}

using Kernel = void (*)(const KvRun *, unsigned int, const KvAddress *, const long long *,
                        const KvAddress *, unsigned long long, unsigned long long, unsigned int);
const std::map<std::string, Kernel> kernels = {
    {"kv_gather_16", kv_gather_16}, {"kv_gather_8", kv_gather_8},
    {"kv_gather_4", kv_gather_4},   {"kv_gather_2", kv_gather_2},
    {"kv_gather_1", kv_gather_1},   {"kv_scatter_16", kv_scatter_16},
    {"kv_scatter_8", kv_scatter_8}, {"kv_scatter_4", kv_scatter_4},
    {"kv_scatter_2", kv_scatter_2}, {"kv_scatter_1", kv_scatter_1}};

CUresult CopyAsync(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
    NEEDS_CONTEXT;
    if (!IsKnown(to, bytes) || !IsKnown(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
    FakeStream *on = StreamOf(stream);
    if (on == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    Enqueue(on, [=] {
        std::memcpy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes);
        return true;
    });
    return CUDA_SUCCESS;
}

// As of version 12080, whatever the header declares.
CUresult CUDAAPI BatchCopy(CUdeviceptr *to, CUdeviceptr *from, std::size_t *sizes,
                           std::size_t count, CUmemcpyAttributes *attributes,
                           std::size_t *first_copies, std::size_t num_attributes,
                           std::size_t *failed, CUstream stream) {
    ENTER("cuMemcpyBatchAsync");
    NEEDS_CONTEXT;
    if (reinterpret_cast<std::uintptr_t>(stream) <= 1) return CUDA_ERROR_INVALID_VALUE;
    if (count == 0 || num_attributes == 0 || num_attributes > count || first_copies[0] != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    for (std::size_t i = 0; i < num_attributes; ++i) {
        const int order = static_cast<int>(attributes[i].srcAccessOrder);
        if (order < 1 || order > 3 || attributes[i].flags > 1) return CUDA_ERROR_INVALID_VALUE;
    }
    for (std::size_t i = 0; i < count; ++i) {
        const CUresult wrong =
            sizes[i] == 0 ? CUDA_ERROR_INVALID_VALUE : CopyAsync(to[i], from[i], sizes[i], stream);
        if (wrong != CUDA_SUCCESS) {
            *failed = i;
            return wrong;
        }
    }
    return CUDA_SUCCESS;
}
#if KV_HAS_CUDA_H
static_assert(std::is_same_v<decltype(&BatchCopy), PFN_cuMemcpyBatchAsync_v12080>);
#endif

}  // namespace

extern "C" {

// --- for tests
void fake_set_late(int late) { is_late = late != 0; }
void fake_set_batch(int batch) { has_batch = batch != 0; }
void fake_inject(const char *name, int code, int after, int count) {
    injected[name] = {static_cast<CUresult>(code), after, count};
}
int fake_calls(const char *name) { return calls[name]; }
int fake_has_cuda_h() { return KV_HAS_CUDA_H; }
int fake_num_contexts() { return num_contexts; }
int fake_num_live(int what) {
    const std::size_t sizes[] = {allocations.size(), registered.size(), opened.size(),
                                 streams.size(),     events.size(),     pinned.size()};
    return static_cast<int>(sizes[what]);
}
// Memory as of cuMemCreate: no handle of it can be had.
int fake_allocate_mapped(CUdeviceptr *address, std::size_t bytes) {
    return static_cast<int>(Allocate(address, bytes, false));
}

// --- the driver
CUresult CUDAAPI cuInit(unsigned int flags) {
    ENTER("cuInit");
    return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuDriverGetVersion(int *version) {
    *version = 13000;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorName(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE";
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorString(CUresult, const char **text) {
    *text = "as the fake was told";
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetCount(int *count) {
    ENTER("cuDeviceGetCount");
    *count = 1;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
    if (ordinal != 0) return CUDA_ERROR_INVALID_DEVICE;
    *device = 0;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetName(char *name, int bytes, CUdevice) {
    std::snprintf(name, static_cast<std::size_t>(bytes), "fake GPU");
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice) {
    std::memcpy(uuid->bytes, "fake-gpu-uuid-0\0", 16);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    ENTER("cuDeviceGetAttribute");
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = 9;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = 0;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
        case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED:
            *value = 1;
            return CUDA_SUCCESS;
        default:
            return CUDA_ERROR_INVALID_VALUE;
    }
}
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) {
    ENTER("cuDevicePrimaryCtxRetain");
    ++num_contexts;
    *context = reinterpret_cast<CUcontext>(0x1000);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDevicePrimaryCtxRelease_v2(CUdevice) {
    --num_contexts;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxPushCurrent_v2(CUcontext) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    ++context_depth;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxPopCurrent_v2(CUcontext *context) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (context_depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    --context_depth;
    *context = reinterpret_cast<CUcontext>(0x1000);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemGetInfo_v2(std::size_t *free, std::size_t *total) {
    *free = *total = std::size_t{1} << 34;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemAlloc_v2(CUdeviceptr *address, std::size_t bytes) {
    ENTER("cuMemAlloc");
    NEEDS_CONTEXT;
    return Allocate(address, bytes, true);
}
CUresult CUDAAPI cuMemFree_v2(CUdeviceptr address) {
    ENTER("cuMemFree");
    const auto it = allocations.find(address);
    if (it == allocations.end()) return CUDA_ERROR_INVALID_VALUE;
    munmap(reinterpret_cast<void *>(address), it->second.bytes);
    close(it->second.fd);
    allocations.erase(it);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemHostAlloc(void **address, std::size_t bytes, unsigned int) {
    ENTER("cuMemHostAlloc");
    NEEDS_CONTEXT;
    *address = std::aligned_alloc(4096, (bytes + 4095) & ~std::size_t{4095});
    pinned[reinterpret_cast<std::uintptr_t>(*address)] = bytes;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemFreeHost(void *address) {
    ENTER("cuMemFreeHost");
    if (pinned.erase(reinterpret_cast<std::uintptr_t>(address)) == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    std::free(address);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemHostRegister_v2(void *address, std::size_t bytes, unsigned int flags) {
    ENTER("cuMemHostRegister");
    NEEDS_CONTEXT;
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    if (bytes == 0 || at % 4096 != 0) return CUDA_ERROR_INVALID_VALUE;
    for (const auto &[begin, range] : registered) {
        if (at < begin + range.bytes && begin < at + bytes) {
            return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
        }
    }
    if (!IsWritable(at) && (flags & CU_MEMHOSTREGISTER_READ_ONLY) == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    registered[at] = {bytes, flags};
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemHostUnregister(void *address) {
    ENTER("cuMemHostUnregister");
    NEEDS_CONTEXT;
    return registered.erase(reinterpret_cast<std::uintptr_t>(address)) == 1
               ? CUDA_SUCCESS
               : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}
CUresult CUDAAPI cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, std::size_t bytes) {
    ENTER("cuMemcpyHtoD");
    NEEDS_CONTEXT;
    if (!IsKnown(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
    RunAll(&null_stream);
    std::memcpy(reinterpret_cast<void *>(to), from, bytes);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyDtoH_v2(void *to, CUdeviceptr from, std::size_t bytes) {
    ENTER("cuMemcpyDtoH");
    NEEDS_CONTEXT;
    if (!IsKnown(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
    RunAll(&null_stream);
    std::memcpy(to, reinterpret_cast<void *>(from), bytes);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, std::size_t bytes,
                               CUstream stream) {
    ENTER("cuMemcpyAsync");
    return CopyAsync(to, from, bytes, stream);
}
CUresult CUDAAPI cuStreamCreate(CUstream *stream, unsigned int) {
    ENTER("cuStreamCreate");
    NEEDS_CONTEXT;
    auto *fake = new FakeStream;
    streams.insert(fake);
    *stream = reinterpret_cast<CUstream>(fake);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamDestroy_v2(CUstream stream) {
    ENTER("cuStreamDestroy");
    auto *fake = reinterpret_cast<FakeStream *>(stream);
    if (streams.erase(fake) == 0) return CUDA_ERROR_INVALID_HANDLE;
    RunAll(fake);
    delete fake;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamSynchronize(CUstream stream) {
    ENTER("cuStreamSynchronize");
    FakeStream *on = StreamOf(stream);
    if (on == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    while (!RunAll(on)) usleep(100);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamQuery(CUstream stream) {
    ENTER("cuStreamQuery");
    FakeStream *on = StreamOf(stream);
    if (on == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    RunOne(on);
    return on->todo.empty() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
    ENTER("cuStreamWaitEvent");
    FakeStream *on = StreamOf(stream);
    auto *fake = reinterpret_cast<FakeEvent *>(event);
    if (on == nullptr || events.count(fake) == 0 || flags != 0) return CUDA_ERROR_INVALID_HANDLE;
    const std::uint64_t want = fake->state->recorded;
    EventState *state = fake->state;
    Enqueue(on, [=] {
        // Whoever records it is a stream here, or of another process.
        if (state->completed < want) {
            for (FakeStream *other : streams) {
                if (other != on) RunOne(other);
            }
        }
        return state->completed >= want;
    });
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventCreate(CUevent *event, unsigned int flags) {
    ENTER("cuEventCreate");
    NEEDS_CONTEXT;
    const bool is_shared = (flags & CU_EVENT_INTERPROCESS) != 0;
    if (is_shared && (flags & CU_EVENT_DISABLE_TIMING) == 0) return CUDA_ERROR_INVALID_VALUE;
    auto *fake = new FakeEvent{nullptr, -1, false};
    fake->fd = memfd_create("fake-event", MFD_CLOEXEC);
    if (ftruncate(fake->fd, 4096) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
    fake->state = static_cast<EventState *>(MapShared(fake->fd, 4096));
    if (!is_shared) {
        close(fake->fd);
        fake->fd = -1;
    }
    events.insert(fake);
    *event = reinterpret_cast<CUevent>(fake);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventDestroy_v2(CUevent event) {
    ENTER("cuEventDestroy");
    auto *fake = reinterpret_cast<FakeEvent *>(event);
    if (events.erase(fake) == 0) return CUDA_ERROR_INVALID_HANDLE;
    if (fake->fd >= 0) close(fake->fd);
    // The state stays mapped: streams may still be about to complete it, as with a real event.
    delete fake;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
    ENTER("cuEventRecord");
    FakeStream *on = StreamOf(stream);
    auto *fake = reinterpret_cast<FakeEvent *>(event);
    if (on == nullptr || events.count(fake) == 0) return CUDA_ERROR_INVALID_HANDLE;
    const std::uint64_t serial = ++fake->state->recorded;
    EventState *state = fake->state;
    Enqueue(on, [=] {
        if (state->completed < serial) state->completed = serial;
        return true;
    });
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventQuery(CUevent event) {
    ENTER("cuEventQuery");
    auto *fake = reinterpret_cast<FakeEvent *>(event);
    if (events.count(fake) == 0) return CUDA_ERROR_INVALID_HANDLE;
    if (fake->state->completed >= fake->state->recorded) return CUDA_SUCCESS;
    for (FakeStream *stream : streams) RunOne(stream);
    RunOne(&null_stream);
    return CUDA_ERROR_NOT_READY;
}
#undef cuEventElapsedTime  // the header renames it to what only newer drivers have
CUresult CUDAAPI cuEventElapsedTime(float *ms, CUevent, CUevent) {
    *ms = 1.0F;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuModuleLoadData(CUmodule *module, const void *image) {
    ENTER("cuModuleLoadData");
    NEEDS_CONTEXT;
    if (std::memcmp(image, "\177ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;
    *module = reinterpret_cast<CUmodule>(new ModuleOf);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuModuleUnload(CUmodule module) {
    delete reinterpret_cast<ModuleOf *>(module);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuModuleGetFunction(CUfunction *function, CUmodule, const char *name) {
    ENTER("cuModuleGetFunction");
    const auto it = kernels.find(name);
    if (it == kernels.end()) return CUDA_ERROR_NOT_FOUND;
    *function = reinterpret_cast<CUfunction>(it->second);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                                unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                                unsigned int block_z, unsigned int shared_bytes, CUstream stream,
                                void **parameters, void **extra) {
    ENTER("cuLaunchKernel");
    NEEDS_CONTEXT;
    FakeStream *on = StreamOf(stream);
    if (on == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (grid_x == 0 || grid_x > 0x7fffffff || grid_y != 1 || grid_z != 1 || block_x != kThreads ||
        block_y != 1 || block_z != 1 || shared_bytes != 0 || extra != nullptr) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const auto kernel = reinterpret_cast<Kernel>(function);
    // The driver reads the parameters before it returns.
    const auto runs = *static_cast<const KvRun **>(parameters[0]);
    const auto num_runs = *static_cast<unsigned int *>(parameters[1]);
    const auto table = *static_cast<const KvAddress **>(parameters[2]);
    const auto ids = *static_cast<const long long **>(parameters[3]);
    const auto blocks = *static_cast<const KvAddress **>(parameters[4]);
    const auto begin = *static_cast<unsigned long long *>(parameters[5]);
    const auto end = *static_cast<unsigned long long *>(parameters[6]);
    const auto tiles = *static_cast<unsigned int *>(parameters[7]);
    const std::size_t entries = grid_x / tiles;
    const auto at = [](const void *pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
    if (grid_x % tiles != 0 || !IsKnown(at(runs), num_runs * sizeof(KvRun)) ||
        !IsKnown(at(ids), entries * 8) || !IsKnown(at(blocks), entries * 8)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    Enqueue(on, [=] {
        for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x) {
            for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) {
                kernel(runs, num_runs, table, ids, blocks, begin, end, tiles);
            }
        }
        return true;
    });
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuPointerGetAttribute(void *data, CUpointer_attribute attribute,
                                       CUdeviceptr pointer) {
    ENTER("cuPointerGetAttribute");
    std::uintptr_t base = 0;
    const Allocation *found = AllocationAt(pointer, 1, &base);
    const bool is_start = attribute == CU_POINTER_ATTRIBUTE_RANGE_START_ADDR;
    if (is_start || attribute == CU_POINTER_ATTRIBUTE_RANGE_SIZE) {
        std::uintptr_t begin = base;
        std::size_t bytes = found != nullptr ? found->bytes : 0;
        for (const auto &[at, range] : registered) {
            if (Within(at, range.bytes, pointer, 1)) begin = at, bytes = range.bytes;
        }
        for (const auto &[name, memory] : opened) {
            if (Within(memory.address, memory.bytes, pointer, 1)) {
                begin = memory.address, bytes = memory.bytes;
            }
        }
        if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
        *static_cast<std::uint64_t *>(data) = is_start ? begin : bytes;
        return CUDA_SUCCESS;
    }
    if (found == nullptr) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            *static_cast<unsigned int *>(data) = 2;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            *static_cast<int *>(data) = 0;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_BUFFER_ID:
            *static_cast<unsigned long long *>(data) = found->id;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
            // A boolean, of which the header does not say how long it is: one byte is the least.
            *static_cast<unsigned char *>(data) = found->is_exportable ? 1 : 0;
            return CUDA_SUCCESS;
        default:
            return CUDA_ERROR_INVALID_VALUE;
    }
}
CUresult CUDAAPI cuMemGetAddressRange_v2(CUdeviceptr *base, std::size_t *bytes,
                                         CUdeviceptr pointer) {
    ENTER("cuMemGetAddressRange");
    std::uintptr_t begin = 0;
    const Allocation *found = AllocationAt(pointer, 1, &begin);
    if (found == nullptr) return CUDA_ERROR_NOT_FOUND;
    *base = begin;
    *bytes = found->bytes;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr pointer) {
    ENTER("cuIpcGetMemHandle");
    const auto it = allocations.find(pointer);  // of the base: stricter than the driver
    if (it == allocations.end() || !it->second.is_exportable) return CUDA_ERROR_INVALID_VALUE;
    FillHandle(handle, it->second.fd, it->second.bytes);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle handle,
                                       unsigned int flags) {
    ENTER("cuIpcOpenMemHandle");
    NEEDS_CONTEXT;
    HandleBody body;
    const int fd = OpenHandle(handle, &body);
    if (fd < 0 || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) {
        if (fd >= 0) close(fd);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (body.pid == static_cast<std::uint64_t>(getpid())) {
        close(fd);
        return CUDA_ERROR_INVALID_CONTEXT;  // a handle cannot be opened where it was made
    }
    Opened &memory = opened[std::string(handle.reserved, sizeof handle.reserved)];
    if (memory.uses++ == 0) {
        memory.address = reinterpret_cast<std::uintptr_t>(MapShared(fd, body.bytes));
        memory.bytes = body.bytes;
    }
    close(fd);
    *address = memory.address;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuIpcCloseMemHandle(CUdeviceptr address) {
    ENTER("cuIpcCloseMemHandle");
    for (auto it = opened.begin(); it != opened.end(); ++it) {
        if (it->second.address != address) continue;
        if (--it->second.uses == 0) {
            munmap(reinterpret_cast<void *>(address), it->second.bytes);
            opened.erase(it);
        }
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuIpcGetEventHandle(CUipcEventHandle *handle, CUevent event) {
    ENTER("cuIpcGetEventHandle");
    auto *fake = reinterpret_cast<FakeEvent *>(event);
    if (events.count(fake) == 0 || fake->fd < 0) return CUDA_ERROR_INVALID_HANDLE;
    FillHandle(handle, fake->fd, 4096);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuIpcOpenEventHandle(CUevent *event, CUipcEventHandle handle) {
    ENTER("cuIpcOpenEventHandle");
    HandleBody body;
    const int fd = OpenHandle(handle, &body);
    if (fd < 0) return CUDA_ERROR_INVALID_VALUE;
    auto *fake = new FakeEvent{static_cast<EventState *>(MapShared(fd, 4096)), -1, true};
    close(fd);
    events.insert(fake);
    *event = reinterpret_cast<CUevent>(fake);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetProcAddress_v2(const char *symbol, void **function, int version,
                                     cuuint64_t flags, CUdriverProcAddressQueryResult *status) {
    ENTER("cuGetProcAddress");
    *function = nullptr;
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (has_batch && std::strcmp(symbol, "cuMemcpyBatchAsync") == 0 && version == 12080) {
        *function = reinterpret_cast<void *>(&BatchCopy);
    }
    if (status != nullptr) {
        *status = *function != nullptr ? CU_GET_PROC_ADDRESS_SUCCESS
                                       : CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
    }
    return *function != nullptr ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

}  // extern "C"
