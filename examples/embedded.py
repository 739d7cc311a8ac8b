"""The store inside one process: put the KV of a prompt, find the prefix of another, load it back.

    pip install kvstore-llm
    python examples/embedded.py

No GPU, no engine and no daemon; random numbers stand in for what a model computes.
"""

from __future__ import annotations

import numpy as np

import kvstore

BLOCK_TOKENS = 16


def main() -> None:
    spec = kvstore.BlockSpec(
        num_layers=4, num_kv_heads=2, head_dim=64, block_tokens=BLOCK_TOKENS, dtype="float16"
    )
    system_prompt = list(range(160))
    first = system_prompt + [7] * 40
    second = system_prompt + [9] * 40

    with kvstore.open("example-model", spec=spec, cpu="64MiB") as store:
        # A hash names a block by all tokens up to its end, so equal prefixes have equal names.
        hashes = kvstore.hash_blocks(first, BLOCK_TOKENS)
        computed = np.random.default_rng(0).integers(
            0, 256, (len(hashes), spec.block_bytes), np.uint8
        )
        store.put(hashes, kvstore.ContiguousBlocks(computed)).wait()

        wanted = kvstore.hash_blocks(second, BLOCK_TOKENS)
        found = store.lookup(wanted).num_blocks
        print(f"{found} of {len(wanted)} blocks are there: {found * BLOCK_TOKENS} tokens to skip")

        pages = np.zeros((len(wanted), spec.block_bytes), np.uint8)
        loaded = store.load(wanted, kvstore.ContiguousBlocks(pages)).wait().num_blocks
        same = bool((pages[:loaded] == computed[:loaded]).all())
        print(f"{loaded} blocks loaded, bytes identical: {same}")


if __name__ == "__main__":
    main()
