"""Tells a service manager how the daemon does: sd_notify(3), without its library."""

from __future__ import annotations

import logging
import socket

log = logging.getLogger(__name__)


def notify(address: str, state: str) -> None:
    """Send "READY=1" and the like; does nothing where `address` is empty."""
    if not address:
        return
    where = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(1.0)
            sender.sendto(state.encode(), where)
    except OSError as error:
        log.warning("NOTIFY_SOCKET: %s: %s", address, error)
