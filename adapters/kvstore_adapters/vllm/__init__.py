"""kvstore in vLLM: a KV connector, and a secondary tier for its own offloading."""
