// Connecting to an address within a deadline.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace kvstore {

class ClientFailure : public std::runtime_error {
public:
    enum class Kind {
        kTimeout,
        kConnection,   // gone, or closed
        kProtocol,     // bytes that are no frame of ours
        kRemote,       // a reply with a status; the connection goes on
        kInterrupted,  // the hook said so
        kBusy,         // another thread is in a call
    };
    ClientFailure(Kind kind, const std::string &message, int status = 0)
        : std::runtime_error(message), kind(kind), status(status) {}
    const Kind kind;
    const int status;  // of kRemote
};

// Called after a signal came; true ends the call.
using InterruptedHook = bool (*)();

// A connected and configured socket, the caller's to close. `address`: "unix:/path", or
// "tcp:host:port" with [] around an IPv6 address. `timeout_seconds` is what messages say.
// Throws ClientFailure: kTimeout, kConnection, kInterrupted; std::invalid_argument for another
// address.
int Dial(const std::string &address, std::int64_t deadline_ns, double timeout_seconds,
         InterruptedHook interrupted);

}  // namespace kvstore
