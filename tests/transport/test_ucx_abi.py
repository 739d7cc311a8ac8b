"""Our declarations of libucp's binary interface agree with the real header, where there is one: the
compiler compares sizes, offsets and values, and the types of all functions that we call."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABI = ROOT / "csrc" / "net" / "ucx_abi.h"

# Ours, theirs, and the fields of both that we use.
STRUCTS = {
    ("Params", "ucp_params_t"): "field_mask features mt_workers_shared name",
    ("WorkerParams", "ucp_worker_params_t"): "field_mask thread_mode cpu_mask events client_id",
    ("WorkerAttr", "ucp_worker_attr_t"): "field_mask address_flags address address_length",
    ("ErrHandler", "ucp_err_handler_t"): "cb arg",
    ("EpParams", "ucp_ep_params_t"): "field_mask address err_mode err_handler sockaddr name",
    ("MemMapParams", "ucp_mem_map_params_t"): "field_mask address length flags prot memory_type",
    ("RequestParam", "ucp_request_param_t"): "op_attr_mask flags cb user_data memory_type memh",
    ("AmRecvParam", "ucp_am_recv_param_t"): "recv_attr reply_ep",
    ("AmHandlerParam", "ucp_am_handler_param_t"): "field_mask id flags cb arg",
}
LATER_STRUCTS = {  # than 1.13
    ("TransportEntry", "ucp_transport_entry_t"): "transport_name device_name",
    ("Transports", "ucp_transports_t"): "entries num_entries entry_size",
    ("EpAttr", "ucp_ep_attr_t"): "field_mask name transports",
}
VALUES = {
    "kOk": "UCS_OK",
    "kInProgress": "UCS_INPROGRESS",
    "kErrBusy": "UCS_ERR_BUSY",
    "kErrLast": "UCS_ERR_LAST",
    "kParamFeatures": "UCP_PARAM_FIELD_FEATURES",
    "kParamMtWorkersShared": "UCP_PARAM_FIELD_MT_WORKERS_SHARED",
    "kParamName": "UCP_PARAM_FIELD_NAME",
    "kFeatureRma": "UCP_FEATURE_RMA",
    "kFeatureWakeup": "UCP_FEATURE_WAKEUP",
    "kFeatureAm": "UCP_FEATURE_AM",
    "kWorkerParamThreadMode": "UCP_WORKER_PARAM_FIELD_THREAD_MODE",
    "kThreadModeSerialized": "UCS_THREAD_MODE_SERIALIZED",
    "kWorkerAttrAddress": "UCP_WORKER_ATTR_FIELD_ADDRESS",
    "kWorkerAttrAddressFlags": "UCP_WORKER_ATTR_FIELD_ADDRESS_FLAGS",
    "kWorkerAddressNetOnly": "UCP_WORKER_ADDRESS_FLAG_NET_ONLY",
    "kEntityNameMax": "UCP_ENTITY_NAME_MAX",
    "kEpParamRemoteAddress": "UCP_EP_PARAM_FIELD_REMOTE_ADDRESS",
    "kEpParamErrHandlingMode": "UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE",
    "kEpParamErrHandler": "UCP_EP_PARAM_FIELD_ERR_HANDLER",
    "kErrHandlingModePeer": "UCP_ERR_HANDLING_MODE_PEER",
    "kEpCloseForce": "UCP_EP_CLOSE_FLAG_FORCE",
    "kMemMapAddress": "UCP_MEM_MAP_PARAM_FIELD_ADDRESS",
    "kMemMapLength": "UCP_MEM_MAP_PARAM_FIELD_LENGTH",
    "kMemMapProt": "UCP_MEM_MAP_PARAM_FIELD_PROT",
    "kMemMapMemoryType": "UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE",
    "kProtLocalRead": "UCP_MEM_MAP_PROT_LOCAL_READ",
    "kProtLocalWrite": "UCP_MEM_MAP_PROT_LOCAL_WRITE",
    "kProtRemoteRead": "UCP_MEM_MAP_PROT_REMOTE_READ",
    "kProtRemoteWrite": "UCP_MEM_MAP_PROT_REMOTE_WRITE",
    "kMemoryTypeHost": "UCS_MEMORY_TYPE_HOST",
    "kOpCallback": "UCP_OP_ATTR_FIELD_CALLBACK",
    "kOpUserData": "UCP_OP_ATTR_FIELD_USER_DATA",
    "kOpFlags": "UCP_OP_ATTR_FIELD_FLAGS",
    "kOpMemoryType": "UCP_OP_ATTR_FIELD_MEMORY_TYPE",
    "kAmSendEager": "UCP_AM_SEND_FLAG_EAGER",
    "kAmHandlerId": "UCP_AM_HANDLER_PARAM_FIELD_ID",
    "kAmHandlerFlags": "UCP_AM_HANDLER_PARAM_FIELD_FLAGS",
    "kAmHandlerCb": "UCP_AM_HANDLER_PARAM_FIELD_CB",
    "kAmHandlerArg": "UCP_AM_HANDLER_PARAM_FIELD_ARG",
    "kAmFlagWholeMsg": "UCP_AM_FLAG_WHOLE_MSG",
    "kAmRecvRndv": "UCP_AM_RECV_ATTR_FLAG_RNDV",
}


def headers() -> list[Path]:
    """Directories that have ucp/api/ucp.h."""
    spec = importlib.util.find_spec("libucx")
    wheel = [Path(at, "include") for at in (spec.submodule_search_locations or ())] if spec else []
    return [
        directory
        for directory in (Path("/usr/include"), *wheel)
        if (directory / "ucp" / "api" / "ucp.h").exists()
    ]


def program(is_later: bool) -> str:
    lines = ["#include <ucp/api/ucp.h>", "#include <type_traits>", '#include "net/ucx_abi.h"']
    lines.append("namespace ours = kvstore::ucx;")
    for (mine, theirs), fields in (STRUCTS | (LATER_STRUCTS if is_later else {})).items():
        # Later versions append fields, which a field mask tells apart.
        lines.append(f"static_assert(sizeof(ours::{mine}) <= sizeof({theirs}));")
        for field in fields.split():
            offsets = f"offsetof(ours::{mine}, {field}) == offsetof({theirs}, {field})"
            sizes = f"sizeof(((ours::{mine} *)0)->{field}) == sizeof((({theirs} *)0)->{field})"
            lines += [f"static_assert({offsets});", f"static_assert({sizes});"]
    lines.append("static_assert(sizeof(ours::Status) == sizeof(ucs_status_t));")
    for mine, theirs in VALUES.items():
        lines.append(f"static_assert((long long)ours::{mine} == (long long){theirs});")
    if is_later:
        lines.append("static_assert(ours::kEpAttrTransports == UCP_EP_ATTR_FIELD_TRANSPORTS);")
    # A function has as many arguments, of the same sizes, as we call it with.
    lines.append(
        "template <typename A, typename B> struct Alike : std::false_type {};\n"
        "template <typename T> constexpr std::size_t kSize = sizeof(T);\n"
        "template <> constexpr std::size_t kSize<void> = 0;\n"
        "template <typename R, typename... A, typename S, typename... B>\n"
        "struct Alike<R (*)(A...), S (*)(B...)> {\n"
        "    template <typename X, typename Y> static constexpr bool same =\n"
        "        kSize<X> == kSize<Y> && std::is_pointer_v<X> == std::is_pointer_v<Y>;\n"
        "    static constexpr bool value = [] {\n"
        "        if constexpr (sizeof...(A) != sizeof...(B)) return false;\n"
        "        else return same<R, S> && (same<A, B> && ...);\n"
        "    }();\n"
        "};"
    )
    for name in re.findall(r"X\((uc[ps]_\w+),", ABI.read_text()):
        types = f"decltype(ours::Functions::{name}), decltype(&{name})"
        lines.append(f"static_assert(Alike<{types}>::value);")
    return "\n".join(lines)


@pytest.mark.parametrize("directory", headers() or [None], ids=str)
def test_our_declarations_agree_with_the_header(directory: Path | None) -> None:
    if directory is None:
        pytest.skip("no ucp/api/ucp.h (Debian: apt-get install libucx-dev; or the libucx wheel)")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    version = (directory / "ucp" / "api" / "ucp_version.h").read_text()
    minor = re.search(r"UCP_API_MINOR\s+(\d+)", version)
    assert minor is not None
    include = ["-isystem", str(directory)] if directory != Path("/usr/include") else []
    flags = ["-std=c++20", "-fsyntax-only", "-w", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        [compiler, *flags, *include, "-xc++", "-"],
        input=program(is_later=int(minor[1]) > 13),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:3000]
