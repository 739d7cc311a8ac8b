"""Adapters that plug kvstore into inference engines. They import only public names of kvstore."""
