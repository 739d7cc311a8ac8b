"""A disk that does not answer keeps nobody out who can be served without it.

The tier's one lock for whoever changes something on disk is held by a test, as by a write that
hangs. Proved: new namespaces are taken in meanwhile, and reach the disk once it answers.
"""

from __future__ import annotations

import threading
from pathlib import Path

import kvstore
from kvstore.tiers.local import LocalControl
from tests.store_support import NAMESPACE, WAIT_S, chain, load, open_store, put


def test_a_new_namespace_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    other = kvstore.Namespace("another", NAMESPACE.spec)
    with open_store(tmp_path) as store:
        control = store.control
        assert isinstance(control, LocalControl)
        tiers = control.tiers
        assert tiers.ssd is not None
        tier = tiers.ssd._tier
        done = threading.Event()

        def come() -> None:
            LocalControl(tiers, other, owns_tiers=False)
            done.set()

        with tier._writer:
            threading.Thread(target=come, daemon=True).start()
            assert done.wait(WAIT_S)
            assert len(tiers.described()) == 2
        assert put(store, chain(1, 2), ack="ssd").ack == "ssd"
    with open_store(tmp_path) as store:
        assert load(store, chain(1, 2)) == 2
