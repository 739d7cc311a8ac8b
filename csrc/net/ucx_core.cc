#include "net/ucx_core.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <sstream>

namespace kvstore {
namespace {

using Kind = UcxFailure::Kind;

std::string Milliseconds(double seconds) {
    return std::to_string(static_cast<long>(seconds * 1e3)) + "ms";
}

using Pairs = std::vector<std::pair<std::string, std::string>>;

Pairs TcpSettings(const UcxOptions &options) {
    return {
        {"TX_SEG_SIZE", "272K"},  // a fragment, and heads; 8K by default: a fifth of the bandwidth
        {"RX_SEG_SIZE", "272K"},
        // Else a cut link is never noticed.
        {"USER_TIMEOUT", Milliseconds(options.timeout)}};
}

Pairs Settings(const UcxOptions &options) {
    Pairs settings = {{"TLS", options.tls},
                      // We ping, and a peer can tell that from its own doing: UCX's rounds are
                      // events to whoever makes them.
                      {"KEEPALIVE_INTERVAL", "inf"}};
    if (!options.net_devices.empty()) settings.emplace_back("NET_DEVICES", options.net_devices);
    for (const auto &[name, value] : TcpSettings(options)) {
        settings.emplace_back("TCP_" + name, value);
    }
    settings.insert(settings.end(), options.settings.begin(), options.settings.end());
    return settings;
}

}  // namespace

UcxCore::UcxCore(UcxOptions options)
    : options_(std::move(options)),
      library_(UcxLibrary::Load(options_.library, options_.modules)),
      timeout_ns_(static_cast<std::int64_t>(options_.timeout * 1e9)),
      spin_ns_(static_cast<std::int64_t>(options_.spin * 1e9)),
      pid_(getpid()) {
    const UcxQuiet quiet;
    const ucx::Functions &api = library_.api();
    const auto fail = [this](const std::string &what, ucx::Status status) {
        const std::string log = LastUcxLog();
        throw UcxFailure(Kind::kLibrary, library_.path() + ": " + what + ": " +
                                             library_.Text(status) +
                                             (log.empty() ? "" : " (" + log + ")"));
    };
    ucx::Config config = nullptr;
    ucx::Status status = api.ucp_config_read(nullptr, nullptr, &config);
    if (status != ucx::kOk) fail("its settings cannot be read", status);
    for (const auto &[name, value] : Settings(options_)) {
        status = api.ucp_config_modify(config, name.c_str(), value.c_str());
        if (status == ucx::kOk) continue;
        api.ucp_config_release(config);
        fail("it does not take " + name + "=" + value, status);
    }
    // 1.13 takes "TCP_..." and warns later that it is no use: there they have no prefix. Newer ones
    // refuse those.
    for (const auto &[name, value] : TcpSettings(options_)) {
        api.ucp_config_modify(config, name.c_str(), value.c_str());
    }
    ucx::Params params = {};
    params.field_mask = ucx::kParamFeatures | ucx::kParamMtWorkersShared | ucx::kParamName;
    params.features = ucx::kFeatureRma | ucx::kFeatureAm | ucx::kFeatureWakeup;
    params.mt_workers_shared = 1;
    params.name = "kvstore";
    status = api.ucp_init_version(ucx::kApiMajor, ucx::kApiMinor, &params, config, &context_);
    api.ucp_config_release(config);
    if (status != ucx::kOk) {
        fail("no transport for tls=" + options_.tls + " net_devices=" + options_.net_devices,
             status);
    }
}

UcxCore::~UcxCore() {
    if (is_forked()) return;
    const UcxQuiet quiet;
    api().ucp_cleanup(context_);
}

bool UcxCore::is_forked() const { return getpid() != pid_; }

void UcxCore::CheckProcess() const {
    if (is_forked()) {
        throw UcxFailure(Kind::kForked,
                         "ucx: this is a forked child; what its parent opened is the parent's");
    }
}

std::vector<std::pair<std::string, std::string>> UcxCore::Transports() const {
    char *text = nullptr;
    std::size_t bytes = 0;
    std::FILE *stream = open_memstream(&text, &bytes);
    if (stream == nullptr) return {};
    api().ucp_context_print_info(context_, stream);
    std::fclose(stream);
    std::vector<std::pair<std::string, std::string>> found;
    std::istringstream lines(std::string(text, bytes));
    std::free(text);
    // "#      resource 0  :  md 0  dev 0  flags -- tcp/eth0"
    for (std::string line; std::getline(lines, line);) {
        if (line.find("resource") == std::string::npos) continue;
        const std::size_t name = line.rfind(' ') + 1;
        const std::size_t slash = line.find('/', name);
        if (slash == std::string::npos) continue;
        found.emplace_back(line.substr(name, slash - name), line.substr(slash + 1));
    }
    return found;
}

ucx::Mem UcxCore::Map(void *address, std::size_t bytes, bool writable) const {
    const UcxQuiet quiet;
    ucx::MemMapParams params = {};
    params.field_mask =
        ucx::kMemMapAddress | ucx::kMemMapLength | ucx::kMemMapProt | ucx::kMemMapMemoryType;
    params.address = address;
    params.length = bytes;
    params.prot = ucx::kProtLocalRead | ucx::kProtRemoteRead;
    if (writable) params.prot |= ucx::kProtLocalWrite | ucx::kProtRemoteWrite;
    params.memory_type = ucx::kMemoryTypeHost;
    ucx::Mem memory = nullptr;
    const ucx::Status status = api().ucp_mem_map(context_, &params, &memory);
    if (status != ucx::kOk) {
        throw UcxFailure(Kind::kLibrary, "ucx: " + std::to_string(bytes) +
                                             " bytes cannot be registered: " +
                                             library_.Text(status) + " (" + LastUcxLog() + ")");
    }
    return memory;
}

void UcxCore::Unmap(ucx::Mem memory) const {
    const UcxQuiet quiet;
    api().ucp_mem_unmap(context_, memory);
}

std::vector<std::uint8_t> UcxCore::Key(ucx::Mem memory) const {
    const UcxQuiet quiet;
    void *packed = nullptr;
    std::size_t bytes = 0;
    const ucx::Status status = api().ucp_rkey_pack(context_, memory, &packed, &bytes);
    if (status != ucx::kOk) {
        throw UcxFailure(Kind::kLibrary, "ucx: no key of a region: " + library_.Text(status));
    }
    const auto *data = static_cast<const std::uint8_t *>(packed);
    std::vector<std::uint8_t> key(data, data + bytes);
    api().ucp_rkey_buffer_release(packed);
    return key;
}

}  // namespace kvstore
