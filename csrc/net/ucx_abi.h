// The part of libucp's binary interface that we use, from version 1.13 on: nothing of UCX is needed
// to build. Later versions only append fields, which a field mask tells apart; a test compares
// these declarations with the real header where there is one (tests/transport/test_ucx_abi.py).
//
// Names are those of ucp/api/ucp.h less their prefix.
#pragma once

#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace kvstore::ucx {

inline constexpr unsigned kApiMajor = 1;
inline constexpr unsigned kApiMinor = 13;

// ucs_status_t is an enum of one byte. A ucs_status_ptr_t is null (done), one of these, or a
// request.
using Status = std::int8_t;
using StatusPtr = void *;
inline constexpr Status kOk = 0;
inline constexpr Status kInProgress = 1;
inline constexpr Status kErrNoMemory = -4;
inline constexpr Status kErrUnreachable = -6;
inline constexpr Status kErrBusy = -15;
inline constexpr Status kErrCanceled = -16;
inline constexpr Status kErrLast = -100;

inline bool IsError(StatusPtr result) {
    return reinterpret_cast<std::uintptr_t>(result) >=
           static_cast<std::uintptr_t>(static_cast<std::intptr_t>(kErrLast));
}
inline bool IsRequest(StatusPtr result) { return result != nullptr && !IsError(result); }
inline Status StatusOf(StatusPtr result) {
    return static_cast<Status>(reinterpret_cast<std::intptr_t>(result));
}

using Context = struct OpaqueContext *;
using Config = struct OpaqueConfig *;
using Worker = struct OpaqueWorker *;
using Ep = struct OpaqueEp *;
using Mem = struct OpaqueMem *;
using Rkey = struct OpaqueRkey *;
using Address = struct OpaqueAddress;

enum ParamField : std::uint64_t {
    kParamFeatures = 1u << 0,
    kParamMtWorkersShared = 1u << 5,
    kParamName = 1u << 8,
};
enum Feature : std::uint64_t {
    kFeatureRma = 1u << 1,
    kFeatureWakeup = 1u << 4,
    kFeatureAm = 1u << 6
};
struct Params {
    std::uint64_t field_mask;
    std::uint64_t features;
    std::size_t request_size;
    void (*request_init)(void *request);
    void (*request_cleanup)(void *request);
    std::uint64_t tag_sender_mask;
    int mt_workers_shared;
    std::size_t estimated_num_eps;
    std::size_t estimated_num_ppn;
    const char *name;
};

enum WorkerParamField : std::uint64_t { kWorkerParamThreadMode = 1u << 0 };
enum ThreadMode : unsigned { kThreadModeSerialized = 1 };
struct WorkerParams {
    std::uint64_t field_mask;
    ThreadMode thread_mode;
    std::uint64_t cpu_mask[1024 / 64];
    unsigned events;
    void *user_data;
    int event_fd;
    std::uint64_t flags;
    const char *name;
    std::size_t am_alignment;
    std::uint64_t client_id;
};

enum WorkerAttrField : std::uint64_t {
    kWorkerAttrAddress = 1u << 1,
    kWorkerAttrAddressFlags = 1u << 2,
};
inline constexpr std::uint32_t kWorkerAddressNetOnly = 1u << 0;
inline constexpr std::size_t kEntityNameMax = 32;
struct WorkerAttr {
    std::uint64_t field_mask;
    ThreadMode thread_mode;
    std::uint32_t address_flags;
    Address *address;
    std::size_t address_length;
    std::size_t max_am_header;
    char name[kEntityNameMax];
    std::size_t max_debug_string;
};

enum EpParamField : std::uint64_t {
    kEpParamRemoteAddress = 1u << 0,
    kEpParamErrHandlingMode = 1u << 1,
    kEpParamErrHandler = 1u << 2,
};
enum ErrHandlingMode : unsigned { kErrHandlingModePeer = 1 };
struct ErrHandler {
    void (*cb)(void *arg, Ep ep, Status status);
    void *arg;
};
struct SockAddr {
    const sockaddr *addr;
    socklen_t addrlen;
};
struct EpParams {
    std::uint64_t field_mask;
    const Address *address;
    ErrHandlingMode err_mode;
    ErrHandler err_handler;
    void *user_data;
    unsigned flags;
    SockAddr sockaddr;
    void *conn_request;
    const char *name;
    SockAddr local_sockaddr;
};
inline constexpr std::uint32_t kEpCloseForce = 1u << 0;

// Transports of an endpoint: later than 1.13, which leaves the entries as they were.
enum EpAttrField : std::uint64_t { kEpAttrTransports = 1u << 3 };
struct TransportEntry {
    const char *transport_name;
    const char *device_name;
};
struct Transports {
    TransportEntry *entries;
    unsigned num_entries;
    std::size_t entry_size;
};
struct EpAttr {
    std::uint64_t field_mask;
    char name[kEntityNameMax];
    sockaddr_storage local_sockaddr;
    sockaddr_storage remote_sockaddr;
    Transports transports;
    void *user_data;
};

enum MemMapParamField : std::uint64_t {
    kMemMapAddress = 1u << 0,
    kMemMapLength = 1u << 1,
    kMemMapProt = 1u << 3,
    kMemMapMemoryType = 1u << 4,
};
enum MemMapProt : unsigned {
    kProtLocalRead = 1u << 0,
    kProtLocalWrite = 1u << 1,
    kProtRemoteRead = 1u << 8,
    kProtRemoteWrite = 1u << 9,
};
enum MemoryType : unsigned { kMemoryTypeHost = 0 };
struct MemMapParams {
    std::uint64_t field_mask;
    void *address;
    std::size_t length;
    unsigned flags;
    unsigned prot;
    MemoryType memory_type;
};

enum OpAttr : std::uint32_t {
    kOpCallback = 1u << 1,
    kOpUserData = 1u << 2,
    kOpFlags = 1u << 4,
    kOpMemoryType = 1u << 6,
};
using SendCallback = void (*)(void *request, Status status, void *user_data);
struct RequestParam {
    std::uint32_t op_attr_mask;
    std::uint32_t flags;
    void *request;
    union {
        SendCallback send;
        void (*any)();
    } cb;
    std::uint64_t datatype;
    void *user_data;
    void *reply_buffer;
    MemoryType memory_type;
    union {
        std::size_t *length;
        void *tag_info;
    } recv_info;
    Mem memh;
};

inline constexpr std::uint32_t kAmSendEager = 1u << 1;
enum AmHandlerParamField : std::uint64_t {
    kAmHandlerId = 1u << 0,
    kAmHandlerFlags = 1u << 1,
    kAmHandlerCb = 1u << 2,
    kAmHandlerArg = 1u << 3,
};
inline constexpr std::uint32_t kAmFlagWholeMsg = 1u << 0;
inline constexpr std::uint64_t kAmRecvRndv = 1u << 17;
struct AmRecvParam {
    std::uint64_t recv_attr;
    Ep reply_ep;
};
using AmRecvCallback = Status (*)(void *arg, const void *header, std::size_t header_length,
                                  void *data, std::size_t length, const AmRecvParam *param);
struct AmHandlerParam {
    std::uint64_t field_mask;
    unsigned id;
    std::uint32_t flags;
    AmRecvCallback cb;
    void *arg;
};

// Every function that we use: X(name, result, arguments).
#define KV_UCX_FUNCTIONS(X)                                                                       \
    X(ucp_get_version, void, (unsigned *, unsigned *, unsigned *))                                \
    X(ucp_get_version_string, const char *, ())                                                   \
    X(ucp_config_read, Status, (const char *, const char *, Config *))                            \
    X(ucp_config_modify, Status, (Config, const char *, const char *))                            \
    X(ucp_config_release, void, (Config))                                                         \
    X(ucp_init_version, Status, (unsigned, unsigned, const Params *, Config, Context *))          \
    X(ucp_cleanup, void, (Context))                                                               \
    X(ucp_context_print_info, void, (Context, std::FILE *))                                       \
    X(ucp_worker_create, Status, (Context, const WorkerParams *, Worker *))                       \
    X(ucp_worker_destroy, void, (Worker))                                                         \
    X(ucp_worker_query, Status, (Worker, WorkerAttr *))                                           \
    X(ucp_worker_release_address, void, (Worker, Address *))                                      \
    X(ucp_worker_progress, unsigned, (Worker))                                                    \
    X(ucp_worker_get_efd, Status, (Worker, int *))                                                \
    X(ucp_worker_arm, Status, (Worker))                                                           \
    X(ucp_worker_flush_nbx, StatusPtr, (Worker, const RequestParam *))                            \
    X(ucp_worker_set_am_recv_handler, Status, (Worker, const AmHandlerParam *))                   \
    X(ucp_ep_create, Status, (Worker, const EpParams *, Ep *))                                    \
    X(ucp_ep_query, Status, (Ep, EpAttr *))                                                       \
    X(ucp_ep_close_nbx, StatusPtr, (Ep, const RequestParam *))                                    \
    X(ucp_ep_flush_nbx, StatusPtr, (Ep, const RequestParam *))                                    \
    X(ucp_ep_rkey_unpack, Status, (Ep, const void *, Rkey *))                                     \
    X(ucp_rkey_destroy, void, (Rkey))                                                             \
    X(ucp_mem_map, Status, (Context, const MemMapParams *, Mem *))                                \
    X(ucp_mem_unmap, Status, (Context, Mem))                                                      \
    X(ucp_rkey_pack, Status, (Context, Mem, void **, std::size_t *))                              \
    X(ucp_rkey_buffer_release, void, (void *))                                                    \
    X(ucp_am_send_nbx, StatusPtr,                                                                 \
      (Ep, unsigned, const void *, std::size_t, const void *, std::size_t, const RequestParam *)) \
    X(ucp_get_nbx, StatusPtr,                                                                     \
      (Ep, void *, std::size_t, std::uint64_t, Rkey, const RequestParam *))                       \
    X(ucp_put_nbx, StatusPtr,                                                                     \
      (Ep, const void *, std::size_t, std::uint64_t, Rkey, const RequestParam *))                 \
    X(ucp_request_check_status, Status, (void *))                                                 \
    X(ucp_request_free, void, (void *))                                                           \
    X(ucs_status_string, const char *, (Status))

struct Functions {
#define KV_UCX_POINTER(name, result, arguments) result(*name) arguments = nullptr;
    KV_UCX_FUNCTIONS(KV_UCX_POINTER)
#undef KV_UCX_POINTER
};

}  // namespace kvstore::ucx
