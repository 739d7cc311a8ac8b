"""Our UCX mover over RDMA: the contract of movers, run in the guest, by rc and by ud.

Not one of its tests may be skipped there, else nothing is proved.
"""

from __future__ import annotations

import pytest

from tests.rdma.conftest import DEVICE
from tests.rdma.guest import Finished, Guest

pytestmark = [pytest.mark.rdma, pytest.mark.timeout(900)]

_SECONDS = 600.0


def in_the_guest(guest: Guest, *arguments: str, timeout: float = _SECONDS, **env: str) -> Finished:
    """Run tests of ours there; with the limits of a machine that is emulated."""
    fixed = ("-p", "no:cacheprovider", "-n0", "-q", "--timeout", "240")
    return guest.python("pytest", *fixed, *arguments, timeout=timeout, env=env)


# ud brings some MB a second in an emulated machine: what moves little, and what may go wrong.
_BY_UD = "reads_bring or writes_arrive or refused or killed_peer or nobody or come_and_go"


@pytest.mark.parametrize(
    ("transports", "which"),
    [("rc_verbs,ud_verbs", "ucx"), ("ud_verbs", f"ucx and ({_BY_UD})")],
    ids=["rc", "ud"],
)
def test_the_mover_keeps_its_contract(guest: Guest, transports: str, which: str) -> None:
    finished = in_the_guest(
        guest,
        *("tests/transport/test_contract.py", "-k", which),
        TRANSPORT_TEST_TIMEOUT="10",
        TRANSPORT_TEST_SLACK="60",
        TRANSPORT_TEST_UCX_TLS=transports,
        TRANSPORT_TEST_UCX_DEVICES=f"{DEVICE}:1",
    )
    assert finished.status == 0, finished.output
    assert "skipped" not in finished.output, finished.output
