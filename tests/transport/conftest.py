"""Fixtures of the transports' tests."""

from tests.transport.netns import two_hosts as two_hosts
