// libucp, found at run time. A process loads at most one: two versions of its parts, which know
// each other by file name only, do not live together.
//
// Loading it changes nothing else in the process: UCX installs handlers for fatal signals and for
// SIGHUP, which are put back, and what it logs from our calls goes to LastUcxLog() instead of
// stdout.
//
// Thread safety: all functions may be called from any thread. Never unloaded.
#pragma once

#include <stdexcept>
#include <string>

#include "net/ucx_abi.h"

namespace kvstore {

// What went wrong with a library, a context or a link.
class UcxFailure : public std::runtime_error {
public:
    enum class Kind {
        kLibrary,  // missing, too old, another one is loaded, or it refuses our settings
        kPeer,     // gone, or never there
        kRefused,  // it runs, and does not take us: another epoch, version or secret
        kTimeout,
        kForked,  // a child has no part in its parent's context
        kClosed,
    };
    UcxFailure(Kind kind, const std::string &what) : std::runtime_error(what), kind(kind) {}
    const Kind kind;
};

class UcxLibrary {
public:
    // The library at `path`, an absolute path. `modules`: which of its optional parts it may load,
    // as in UCX_MODULES; "" for what that says. Throws UcxFailure (kLibrary), which names the path.
    static const UcxLibrary &Load(const std::string &path, const std::string &modules);

    const ucx::Functions &api() const { return api_; }
    const std::string &path() const { return path_; }
    const std::string &version() const { return version_; }
    std::string Text(ucx::Status status) const;

private:
    UcxLibrary(const std::string &path, const std::string &modules);

    ucx::Functions api_;
    std::string path_;
    std::string version_;
};

// While one lives, what UCX logs from this thread is kept and not printed.
class UcxQuiet {
public:
    UcxQuiet();
    ~UcxQuiet();
    UcxQuiet(const UcxQuiet &) = delete;
    UcxQuiet &operator=(const UcxQuiet &) = delete;
};

// The last warning or error that UCX logged from one of our calls; "" where there was none.
std::string LastUcxLog();

}  // namespace kvstore
