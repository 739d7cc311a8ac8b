"""Our memory to NIXL agents, and theirs to us: for engines that move KV by NIXL."""

from .agent import NixlAgent
from .binding import ends_badly
from .describe import AgentInfo, MemoryRange, ranges_of_blocks
from .link import NixlLink

__all__ = [
    "AgentInfo",
    "MemoryRange",
    "NixlAgent",
    "NixlLink",
    "ends_badly",
    "ranges_of_blocks",
]
