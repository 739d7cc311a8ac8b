"""The writer that the adoption test kills: a bare core over an arena that the test keeps.

    python -m tests.crash.adoption_writer SOCKET_FD SEED

Adopts the arena whose descriptor comes first over the socket, or, when none comes, makes one and
sends it. Then a line "a CHAIN N M" on stdout says that the first N blocks of a chain are committed,
M of them now, "r CHAIN" that the chain is about to be removed, "i N" that it adopted N blocks.
"""

import os
import random
import socket
import sys

from kvstore import _native
from tests.core_support import View, adopt, chain, rows

SIZE = 4096 + 512
NUM_CHAINS = 40
LONGEST = 12


def blocks_of(number: int) -> list[str]:
    return chain(f"chain{number}-", LONGEST)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    dice = random.Random(int(sys.argv[2]))
    _, fds, _, _ = socket.recv_fds(channel, 1, 1)
    if fds:
        view, found = adopt(fds[0], [SIZE])
        say(f"i {found['adopted']}")
    else:
        view = View(_native.StoreCore(1 << 20, 1 << 16, False, "lru"), -1)
        view.core.add_namespace(SIZE)
        view.core.set_metadata(b"{}")
        socket.send_fds(channel, [b"x"], [view.core.arena_fd])
        say("i 0")
    while True:
        number = dice.randrange(NUM_CHAINS)
        if dice.random() < 0.2:
            say(f"r {number}")
            view.core.remove(0, rows(blocks_of(number)[:1]))
            continue
        n = dice.randrange(1, LONGEST + 1)
        stored = view.put(blocks_of(number)[:n])
        say(f"a {number} {n} {stored}")


if __name__ == "__main__":
    main()
