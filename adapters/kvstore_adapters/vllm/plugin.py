"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`."""

from __future__ import annotations

NAME = "KVStoreConnector"


def register() -> None:
    """Make `"kv_connector": "KVStoreConnector"` known. May be called again."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvstore_adapters.vllm.connector", NAME)
