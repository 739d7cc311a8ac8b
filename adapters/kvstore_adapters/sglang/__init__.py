"""kvstore in SGLang: a HiCache storage backend, and a linker without a host tier."""
