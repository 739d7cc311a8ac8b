"""The store of a daemon: decisions over a socket, bytes through shared memory where it may be."""

from kvstore.client.handshake import Target
from kvstore.client.remote import RemoteControl

__all__ = ["RemoteControl", "Target"]
