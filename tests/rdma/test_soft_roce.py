"""The guest itself: its device works, and UCX moves bytes over it without our code.

What fails here is the machine's fault; `test_ucx.py` and the others are about us.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.rdma.conftest import DEVICE
from tests.rdma.guest import Finished, Guest

pytestmark = [pytest.mark.rdma, pytest.mark.timeout(900)]

# A client tries again until its server listens.
_CLIENT = 'for i in $(seq 50); do "$@" && exit 0; sleep 0.5; done; exit 1'
_BOTH_ENDS = f"""
timeout 100 "$@" >/run/server.txt 2>&1 &
server=$!
timeout 100 bash -c '{_CLIENT}' client "$@" "$CLIENT"
status=$?
wait $server || {{ echo "its server:"; cat /run/server.txt; exit 1; }}
exit $status
"""


def both_ends(guest: Guest, *command: str, **env: str) -> Finished:
    """Run a server and a client of the same program on one machine."""
    return guest.run(
        *("bash", "-c", _BOTH_ENDS, "both-ends", *command),
        timeout=120,
        env={"CLIENT": "127.0.0.1", **env},
    )


def has(guest: Guest, tool: str) -> bool:
    return guest.run("bash", "-c", f"command -v {tool}").status == 0


def test_the_device_is_active(guest: Guest) -> None:
    finished = guest.run("rdma", "link")
    assert f"link {DEVICE}/1 state ACTIVE" in finished.output


def test_verbs_move_bytes(guest: Guest) -> None:
    if not has(guest, "ibv_rc_pingpong"):
        pytest.skip("needs ibverbs-utils")
    command = ("ibv_rc_pingpong", "-d", DEVICE, "-g", "0", "-n", "50", "-c")
    finished = both_ends(guest, *command)
    assert finished.status == 0, finished.output
    assert "50 iters" in finished.output


@pytest.mark.parametrize("transports", ["rc_verbs,ud_verbs", "ud_verbs"])
def test_ucx_moves_bytes_without_us(guest: Guest, transports: str) -> None:
    if not has(guest, "ucx_perftest"):
        pytest.skip("needs ucx-utils")
    command = ("ucx_perftest", "-t", "ucp_get", "-s", "262144", "-n", "5", "-w", "1", "-e")
    finished = both_ends(
        guest,
        *command,
        UCX_TLS=transports,
        UCX_NET_DEVICES=f"{DEVICE}:1",
    )
    assert finished.status == 0, finished.output
    assert "Final:" in finished.output


def test_two_machines_reach_each_other_by_rdma(pair: tuple[Guest, Guest]) -> None:
    first, second = pair
    if not has(first, "ibv_rc_pingpong"):
        pytest.skip("needs ibverbs-utils")
    command = ("ibv_rc_pingpong", "-d", DEVICE, "-g", "0", "-n", "50", "-c")
    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(first.run, *command)
        finished = second.run("bash", "-c", _CLIENT, "client", *command, "10.77.0.1")
        served = server.result()
    assert finished.status == 0, finished.output
    assert served.status == 0, served.output
    assert "50 iters" in finished.output
