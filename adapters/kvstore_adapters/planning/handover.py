"""What a prefill instance tells a decode instance, by way of the client: `kv_transfer_params`.

    {"kvstore": {"tokens": 4096, "hash": "<64 hex digits>", "source": "<16 hex digits>",
                 "holder": "tcp:10.0.0.1:9471"}}

says: the first 4096 tokens are stored or about to be, their last hash is this, in the namespace of
that digest, at the daemon that its peers find there (without it: at our own). And

    {"kvstore_push": "<name>"}

asks a prefill instance to store them at that one of its push targets too. Values come from whoever
may send requests, so nothing is taken from them but how long to wait for blocks that the request's
own hashes name, and a name or a holder out of the settings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .chains import Chain

_KEY = "kvstore"
_PUSH_KEY = "kvstore_push"


def describe(tokens: int, chain: Chain, source: str, holder: str = "") -> dict[str, Any]:
    """REQUIRES: `chain` has the hashes of `tokens` tokens, more than 0."""
    promise = {"tokens": tokens, "hash": chain.last_of(tokens).hex(), "source": source}
    return {_KEY: {**promise, "holder": holder} if holder else promise}


def promised_tokens(
    params: Mapping[str, Any] | None, chain: Chain, source: str
) -> tuple[int, str | None]:
    """Return how many tokens were promised to us, and why a promise is not believed.

    0 tokens: nothing was promised, or it is not about this prompt or not in our namespace.
    """
    promise = params.get(_KEY) if isinstance(params, Mapping) else None
    if promise is None or promise == {}:
        return 0, None
    if not isinstance(promise, Mapping):
        return 0, f"{_KEY}: need an object, got {type(promise).__name__}"
    tokens = promise.get("tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        return 0, f"{_KEY}.tokens: is no count of tokens"
    if promise.get("source") != source:
        return 0, f"{_KEY}.source: is not the namespace of this instance"
    pieces, rest = divmod(tokens, chain.hash_tokens)
    if rest or pieces > len(chain) or promise.get("hash") != chain.last_of(tokens).hex():
        return 0, f"{_KEY}.hash: is not the hash of this prompt's first tokens"
    return tokens, None


def holder_of(params: Mapping[str, Any] | None, holders: Collection[str]) -> tuple[str, str | None]:
    """Return the daemon that a promise names, "" for none, and why it is not asked."""
    promise = params.get(_KEY) if isinstance(params, Mapping) else None
    holder = promise.get("holder") if isinstance(promise, Mapping) else None
    if holder is None:
        return "", None
    if not isinstance(holder, str) or holder not in holders:
        return "", f"{_KEY}.holder: is none of the `holders` of this instance"
    return holder, None


def push_target(
    params: Mapping[str, Any] | None, targets: Collection[str]
) -> tuple[str, str | None]:
    """Return the target that the request names, "" for none, and what is wrong with it."""
    name = params.get(_PUSH_KEY) if isinstance(params, Mapping) else None
    if name is None:
        return "", None
    if not isinstance(name, str) or name not in targets:
        return "", f"{_PUSH_KEY}: names no push target of this instance"
    return name, None
