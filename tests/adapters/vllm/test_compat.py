"""What is said at start of a vLLM that is not the tested one: a warning, or an error where it lacks
what the adapter is built on."""

from __future__ import annotations

import logging
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what vLLM imports
    vllm = pytest.importorskip("vllm")
    pytest.importorskip("vllm.v1.core.kv_cache_manager")

from kvstore import IncompatibleError
from kvstore_adapters import compat

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def test_a_tested_release_has_all_that_is_needed_and_is_not_remarked_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm, "__version__", compat.TESTED["vllm"][0] + "+cpu")
    with caplog.at_level(logging.WARNING, "kvstore_adapters"):
        compat.check_vllm()
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0"])
def test_another_release_is_warned_of_once_with_both_versions(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with caplog.at_level(logging.WARNING, "kvstore_adapters"):
        compat.check_vllm()
    (record,) = caplog.records
    assert version in record.getMessage()
    assert compat.TESTED["vllm"][0] in record.getMessage()


@pytest.mark.parametrize(
    "missing",
    ["vllm.v1.core.block_pool.BlockPool.touch", "vllm.v1.core.kv_cache_utils.no_such_function"],
)
def test_a_release_without_what_is_needed_is_refused_by_what_it_lacks(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, _, name = missing.rpartition(".")
    if name == "touch":
        from vllm.v1.core.block_pool import BlockPool

        monkeypatch.delattr(BlockPool, name)
    else:
        monkeypatch.setitem(compat._VLLM_NEEDS, where, (name,))
    with pytest.raises(IncompatibleError, match=missing):
        compat.check_vllm()
