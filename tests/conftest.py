"""Options of the suites that run for a given time."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvstore")
    group.addoption("--chaos-seconds", default="60", help="how long the chaos test runs")
    group.addoption("--chaos-seed", default=None, help="decisions of an earlier chaos run")
