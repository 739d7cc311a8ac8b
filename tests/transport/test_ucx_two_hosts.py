"""UCX between two network namespaces, which it would take for one host: bytes go by TCP over the
cable, and a cable that is cut ends a move within the timeout."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from kvstore.errors import KVStoreError
from kvstore.transport import Batch, Endpoint, EndpointInfo, Status, TransportSettings, ucx_library
from tests.transport.netns import TwoHosts
from tests.transport.peer import Peer, pattern

SECRET = bytes(range(32))
SIZE = 8 << 20
TIMEOUT = 1.0
SLACK = 4.0


def read_until_it_fails(host: str, info: str) -> None:
    """In the other namespace: reads the first region again and again, and tells how that ended."""
    settings = TransportSettings(listen=host, movers=("ucx",), timeout=TIMEOUT)
    peer = EndpointInfo.decode(base64.b64decode(info))
    here, there = np.zeros(SIZE, np.uint8), pattern(1, SIZE)
    with Endpoint(settings, secret=SECRET) as endpoint:
        link = endpoint.connect(peer, movers=("ucx",), timeout=10.0)
        region = peer.regions[0].region_id
        batch = Batch(
            here.ctypes.data + np.arange(8) * (SIZE // 8), np.arange(8) * (SIZE // 8), SIZE // 8
        )
        turns = 0
        while True:
            here[:] = 0
            began = time.monotonic()
            statuses = link.read(region, batch, timeout=30.0)
            seconds = time.monotonic() - began
            if statuses.any():
                break
            assert (here == there).all()
            turns += 1
            if turns == 1:
                print("reading", flush=True)  # noqa: T201
        said = {
            "statuses": statuses.tolist(),
            "seconds": seconds,
            "alive": link.is_alive,
            "settled": link.close(),
        }
        print(json.dumps(said), flush=True)  # noqa: T201


def test_a_cut_cable_ends_a_move_within_the_timeout(two_hosts: TwoHosts) -> None:
    try:
        ucx_library.find()
    except KVStoreError as error:
        pytest.skip(str(error))
    settings = TransportSettings(listen=two_hosts.a.address, movers=("ucx",), timeout=TIMEOUT)
    peer = Peer(settings, SECRET, prefix=two_hosts.a.command())
    try:
        peer.register(SIZE, seed=1)
        info = base64.b64encode(peer.info().encode()).decode()
        with two_hosts.b.start_python(
            __name__,
            "read_until_it_fails",
            two_hosts.b.address,
            info,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
        ) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"reading\n"
            two_hosts.cut()
            said = json.loads(reader.stdout.readline())
            assert set(said["statuses"]) <= {Status.OK, Status.LOST}
            assert Status.LOST in said["statuses"]
            assert said["seconds"] < TIMEOUT + SLACK
            assert not said["alive"]
            assert said["settled"]
        assert peer.is_running()
    finally:
        peer.close()
