"""Options of the suites that run for a given time, and on how many processors tests run."""

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvstore")
    group.addoption("--chaos-seconds", default="60", help="how long the chaos test runs")
    group.addoption("--chaos-seed", default=None, help="decisions of an earlier chaos run")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The default suite uses two processors, the least that a machine for it has. Whole engines,
    suites that measure or stop processes, and single files run alone."""
    is_default = str(config.option.markexpr).startswith("not slow")
    is_whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return min(2, os.cpu_count() or 1) if is_default and is_whole else 0
