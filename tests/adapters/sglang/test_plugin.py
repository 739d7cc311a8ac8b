"""Where kvstore is installed, SGLang knows its transfer backend, and stays as it is for whoever
asks for another. In a process of its own, as hooks stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from tests.adapters.sglang.cpu.engine_driver import environment

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]

SCRIPT = """
from types import SimpleNamespace
from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.disaggregation.mooncake import MooncakeKVManager
from sglang.srt.distributed.device_communicators import mooncake_transfer_engine as theirs
from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES
from kvstore.config_sources import is_sglang_transfer_chosen
from kvstore_adapters.sglang import plugin

assert DISAGG_TRANSFER_BACKEND_CHOICES.count("kvstore") == 1
plugin.register()
assert DISAGG_TRANSFER_BACKEND_CHOICES.count("kvstore") == 1

def chosen(backend):
    arguments = SimpleNamespace(disaggregation_transfer_backend=backend)
    plugin._choose(arguments)
    return arguments.disaggregation_transfer_backend

assert [chosen(name) for name in ("mooncake", "nixl", "fake")] == ["mooncake", "nixl", "fake"]
assert not is_sglang_transfer_chosen()
assert theirs.MooncakeTransferEngine.__module__ == theirs.__name__
assert MooncakeKVManager.__module__.startswith("sglang.")

assert chosen("kvstore") == chosen("kvstore") == "mooncake"
assert is_sglang_transfer_chosen()
from sglang.srt.disaggregation.mooncake import MooncakeKVManager, MooncakeKVReceiver
found = theirs.MooncakeTransferEngine, MooncakeKVManager, MooncakeKVReceiver
assert [one.__name__ for one in found] == ["KVStoreTransfer", "HostReceiveManager", "HostReceiver"]
"""


def test_it_changes_nothing_until_it_is_asked_to(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()[-3000:]
