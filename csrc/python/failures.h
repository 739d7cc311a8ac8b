// What native clients raise; declared in bind_net.cc, which makes the classes.
#pragma once

#include "net/dial.h"

namespace kvstore {

// REQUIRES: the GIL.
[[noreturn]] void RaiseFailure(const ClientFailure &failure);
// Lets Python's signal handlers run; true when one of them raised. Takes the GIL.
bool SignalRaised();

}  // namespace kvstore
