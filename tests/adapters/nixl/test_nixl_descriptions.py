"""Without NIXL the adapter says how to get it, and what a peer sends is looked at before it is
used. No agent is made here."""

from __future__ import annotations

import importlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import ConfigError, IncompatibleError
from kvstore_adapters.nixl import AgentInfo, MemoryRange, NixlAgent, ranges_of_blocks
from kvstore_adapters.nixl.binding import PACKAGES


def test_without_nixl_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"nixl: it is not installed.*--no-deps nixl-cu12"):
        NixlAgent()


def test_nixl_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, package: str | None = None) -> Any:
        raise ImportError("libfoo.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ConfigError, match=r"nixl_cu12: libfoo\.so\.1"):
        NixlAgent()


def test_blocks_of_layers_become_ranges() -> None:
    assert ranges_of_blocks([4096, 65536], 4, [512, 1024], device=2, kind="VRAM") == [
        MemoryRange(4096, 2048, 2, "VRAM"),
        MemoryRange(65536, 4096, 2, "VRAM"),
    ]
    with pytest.raises(ValueError, match="zip"):
        ranges_of_blocks([4096], 4, [512, 1024])


addresses = st.integers(1, 1 << 60)
ranges = st.builds(
    MemoryRange, addresses, st.integers(1, 1 << 40), st.integers(0, 7), st.sampled_from(["DRAM"])
)


@given(st.builds(AgentInfo, st.text(), st.binary(max_size=64), st.lists(ranges, max_size=4)))
def test_an_agent_is_described_and_understood(info: AgentInfo) -> None:
    assert AgentInfo.decode(info.encode()) == info


@given(st.binary(max_size=64))
def test_noise_describes_no_agent(data: bytes) -> None:
    with pytest.raises(IncompatibleError, match="agent: not a description"):
        AgentInfo.decode(data)


@pytest.mark.parametrize("memory", [(0, 16), (4096, 0), (4096, -1), ((1 << 63) - 8, 16)])
def test_ranges_that_are_no_memory_are_refused(memory: tuple[int, int]) -> None:
    data = msgspec.msgpack.encode(
        {"name": "a", "metadata": b"", "ranges": [{"address": memory[0], "num_bytes": memory[1]}]}
    )
    with pytest.raises(IncompatibleError, match="is no memory"):
        AgentInfo.decode(data)
