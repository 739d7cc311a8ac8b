#include "net/dial.h"

#include <netdb.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "core/store_core.h"
#include "net/socket.h"

namespace kvstore {

namespace {

using Kind = ClientFailure::Kind;

struct FreeAddresses {
    void operator()(addrinfo *list) const { freeaddrinfo(list); }
};

struct Dialled {
    const std::string &address;
    std::int64_t deadline_ns;
    double timeout_seconds;
    InterruptedHook interrupted;

    [[noreturn]] void Fail(Kind kind, const std::string &what) const {
        throw ClientFailure(kind, address + ": " + what);
    }
    [[noreturn]] void FailWithErrno() const {
        const bool late = errno == EAGAIN || errno == EINPROGRESS || errno == ETIMEDOUT ||
                          errno == EINTR || errno == EALREADY;
        if (late) {
            Fail(Kind::kTimeout, "no connection within " + std::to_string(timeout_seconds) + " s");
        }
        Fail(Kind::kConnection, std::strerror(errno));
    }
    // -1 with errno.
    int Attempt(int family, const sockaddr *to, socklen_t size) const {
        const int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0) return -1;
        ConfigureSocket(fd, family == AF_UNIX);
        int result;
        do {
            // Bounds a connect too, also one that waits for room in the peer's backlog.
            const timeval left = AsTimeval(deadline_ns - SteadyNowNs());
            setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &left, sizeof(left));
            result = connect(fd, to, size);
            if (result != 0 && errno == EINTR && interrupted != nullptr && interrupted()) {
                close(fd);
                Fail(Kind::kInterrupted, "interrupted");
            }
        } while (result != 0 && errno == EINTR && SteadyNowNs() < deadline_ns);
        if (result == 0) return fd;
        const int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
};

}  // namespace

int Dial(const std::string &address, std::int64_t deadline_ns, double timeout_seconds,
         InterruptedHook interrupted) {
    const Dialled dialled{address, deadline_ns, timeout_seconds, interrupted};
    if (address.rfind("unix:", 0) == 0) {
        const std::string path = address.substr(5);
        sockaddr_un to{};
        to.sun_family = AF_UNIX;
        if (path.empty() || path.size() >= sizeof(to.sun_path)) {
            throw std::invalid_argument("address: the path of " + address +
                                        " is empty or too long for a socket");
        }
        std::memcpy(to.sun_path, path.data(), path.size());
        const int fd =
            dialled.Attempt(AF_UNIX, reinterpret_cast<const sockaddr *>(&to), sizeof(to));
        if (fd < 0) dialled.FailWithErrno();
        return fd;
    }
    const std::size_t colon = address.rfind(':');
    if (address.rfind("tcp:", 0) != 0 || colon <= 4 || colon + 1 >= address.size()) {
        throw std::invalid_argument("address: " + address +
                                    " is neither unix:/path nor tcp:host:port");
    }
    std::string host = address.substr(4, colon - 4);
    if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
        host = host.substr(1, host.size() - 2);
    }
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo *found = nullptr;
    const int failed = getaddrinfo(host.c_str(), address.c_str() + colon + 1, &hints, &found);
    if (failed != 0) dialled.Fail(Kind::kConnection, gai_strerror(failed));
    const std::unique_ptr<addrinfo, FreeAddresses> list(found);
    for (const addrinfo *each = found; each != nullptr; each = each->ai_next) {
        const int fd = dialled.Attempt(each->ai_family, each->ai_addr, each->ai_addrlen);
        if (fd >= 0) return fd;
        if (SteadyNowNs() >= deadline_ns) break;
    }
    dialled.FailWithErrno();
}

}  // namespace kvstore
