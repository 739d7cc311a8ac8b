"""Stands in for the package of Mooncake; see kvstore_adapters.mooncake.shim."""
