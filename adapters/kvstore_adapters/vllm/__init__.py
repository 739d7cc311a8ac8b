"""kvstore in vLLM: a KV connector, and a secondary tier for its own offloading.

Importing any module of it checks that the installed vLLM is one that this works with.
"""

from kvstore_adapters.compat import check_vllm

check_vllm()
