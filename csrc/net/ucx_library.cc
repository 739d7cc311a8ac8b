#include "net/ucx_library.h"

#include <dlfcn.h>
#include <link.h>
#include <signal.h>

#include <array>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

namespace kvstore {
namespace {

using Kind = UcxFailure::Kind;

std::string RealPath(const std::string &path) {
    char *found = realpath(path.c_str(), nullptr);
    if (found == nullptr) return path;
    std::string result = found;
    std::free(found);
    return result;
}

std::string DirectoryOf(const std::string &path) { return path.substr(0, path.rfind('/') + 1); }

// --- signals

class SavedSignals {
public:
    SavedSignals() {
        for (int s = 1; s < _NSIG; ++s) known_[s] = sigaction(s, nullptr, &actions_[s]) == 0;
    }
    ~SavedSignals() {
        for (int s = 1; s < _NSIG; ++s) {
            struct sigaction now = {};
            if (!known_[s] || sigaction(s, nullptr, &now) != 0) continue;
            if (now.sa_sigaction != actions_[s].sa_sigaction) sigaction(s, &actions_[s], nullptr);
        }
    }
    SavedSignals(const SavedSignals &) = delete;
    SavedSignals &operator=(const SavedSignals &) = delete;

private:
    std::array<struct sigaction, _NSIG> actions_;
    std::array<bool, _NSIG> known_{};
};

// --- logs

thread_local int quiet_depth = 0;
std::mutex log_mutex;
std::string last_log;  // guarded by log_mutex

constexpr int kLogStop = 0, kLogContinue = 1, kLogLevelFatal = 0, kLogLevelWarn = 2;

int KeepLog(const char *, unsigned, const char *, int level, const void *, const char *format,
            va_list arguments) {
    // What ends the process is said.
    if (quiet_depth == 0 || level == kLogLevelFatal || level > kLogLevelWarn) return kLogContinue;
    char text[512];
    va_list copy;
    va_copy(copy, arguments);
    std::vsnprintf(text, sizeof(text), format, copy);
    va_end(copy);
    std::lock_guard lock(log_mutex);
    last_log = text;
    return kLogStop;
}

// --- other copies

// Files of UCX that are loaded already, under the names by which its parts know each other.
std::vector<std::string> LoadedParts() {
    std::vector<std::string> found;
    dl_iterate_phdr(
        [](dl_phdr_info *info, std::size_t, void *into) {
            const std::string path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
            const std::string name = path.substr(DirectoryOf(path).size());
            if (name.starts_with("libucp.so") || name.starts_with("libucs.so")) {
                static_cast<std::vector<std::string> *>(into)->push_back(RealPath(path));
            }
            return 0;
        },
        &found);
    return found;
}

std::mutex load_mutex;

}  // namespace

UcxQuiet::UcxQuiet() { ++quiet_depth; }
UcxQuiet::~UcxQuiet() { --quiet_depth; }

std::string LastUcxLog() {
    std::lock_guard lock(log_mutex);
    return last_log;
}

UcxLibrary::UcxLibrary(const std::string &path, const std::string &modules) : path_(path) {
    const std::string directory = DirectoryOf(path);
    for (const std::string &other : LoadedParts()) {
        if (DirectoryOf(other) != directory) {
            throw UcxFailure(Kind::kLibrary, path + ": this process already uses " + other);
        }
    }
    void *handle = nullptr;
    {
        const SavedSignals signals;
        handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    }
    if (handle == nullptr) throw UcxFailure(Kind::kLibrary, path + ": " + dlerror());
#define KV_UCX_FIND(name, result, arguments)                                                   \
    api_.name = reinterpret_cast<result(*) arguments>(dlsym(handle, #name));                   \
    if (api_.name == nullptr) {                                                                \
        throw UcxFailure(Kind::kLibrary, path + ": not a libucp of 1.13 or later: no " #name); \
    }
    using namespace ucx;
    // First what tells an old one from a foreign one.
    KV_UCX_FIND(ucp_get_version, void, (unsigned *, unsigned *, unsigned *))
    unsigned major = 0, minor = 0, release = 0;
    api_.ucp_get_version(&major, &minor, &release);
    version_ = std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(release);
    if (major != kApiMajor || minor < kApiMinor) {
        throw UcxFailure(Kind::kLibrary, path + ": version " + version_ + "; needed is 1." +
                                             std::to_string(kApiMinor) + " or a later 1.x");
    }
    KV_UCX_FUNCTIONS(KV_UCX_FIND)
#undef KV_UCX_FIND
    void *set = modules.empty() ? nullptr : dlsym(handle, "ucs_global_opts_set_value");
    if (set != nullptr) {
        reinterpret_cast<Status (*)(const char *, const char *)>(set)("MODULES", modules.c_str());
    }
    if (void *push = dlsym(handle, "ucs_log_push_handler"); push != nullptr) {
        reinterpret_cast<void (*)(decltype(&KeepLog))>(push)(&KeepLog);
    }
}

const UcxLibrary &UcxLibrary::Load(const std::string &path, const std::string &modules) {
    static std::unique_ptr<UcxLibrary> loaded;
    std::lock_guard lock(load_mutex);
    const std::string real = RealPath(path);
    if (loaded == nullptr) loaded.reset(new UcxLibrary(real, modules));
    if (loaded->path() != real) {
        throw UcxFailure(Kind::kLibrary, real + ": this process already uses " + loaded->path());
    }
    return *loaded;
}

std::string UcxLibrary::Text(ucx::Status status) const { return api_.ucs_status_string(status); }

}  // namespace kvstore
