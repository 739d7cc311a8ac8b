"""The numbers that Mooncake Store's methods answer, as far as ours answer them too."""

from typing import Final

OK: Final = 0
NO_AVAILABLE_HANDLE: Final = -200  # no room, and nothing may be evicted
INVALID_PARAMS: Final = -600  # also: not set up, or closed
OBJECT_NOT_FOUND: Final = -704
TRANSFER_FAIL: Final = -800  # the value has another size than the caller's buffers
RPC_FAIL: Final = -900  # the daemon is away
UNAVAILABLE_IN_CURRENT_MODE: Final = -1011  # kvstore has no such thing

# What `health_check` answers.
HEALTHY: Final = 0
NOT_SET_UP: Final = 1
UNREACHABLE: Final = 2
