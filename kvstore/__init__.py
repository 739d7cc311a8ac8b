"""A tiered KV-cache store for LLM inference."""
