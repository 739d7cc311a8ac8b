"""A daemon that answers CALLs from memory, in place of a native connection."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from kvstore import wire
from kvstore.auth import is_proof, proof_of
from kvstore.status import Status

ADDRESS = "unix:/nowhere/kvstore.sock"


def status() -> Status:
    """A daemon that has something of everything."""
    return {
        "version": "1.2.3",
        "epoch": "ab" * 16,
        "pid": 4711,
        "uptime_seconds": 3700.0,
        "state": "serving",
        "addresses": [ADDRESS],
        "adopted": {"adopted": 12, "discarded": 1},
        "tiers": [
            {"tier": "cpu", "used_bytes": 3 << 20, "capacity_bytes": 4 << 20, "blocks": 48},
            {"tier": "ssd", "used_bytes": 0, "capacity_bytes": 0, "blocks": 0},
        ],
        "metrics": {"kvstore_integrity_failures_total": 2, "kvstore_leases": 1},
        "rates": {
            "hit_ratio": 0.75,
            "load_bytes_per_second": 5e9,
            "store_bytes_per_second": 1e6,
            "requests_per_second": 1234.0,
        },
        "history": [[1e9 + 2 * i, i / 10, 1e6 * i, 0.0, 1.0, 2.0] for i in range(10)],
        "hot_prefixes": [{"namespace": 1, "first_block": "cd" * 32, "uses": 9, "blocks": 4}],
        "tenants": [
            {
                "name": "red",
                "cpu_used_bytes": 1024,
                "cpu_quota_bytes": 0,
                "ssd_used_bytes": 0,
                "ssd_quota_bytes": 1 << 30,
                "blocks": 3,
            }
        ],
        "namespaces": namespaces(),  # type: ignore[typeddict-item]
        "clients": [
            {
                "label": "engine\x1b[2J[red]",
                "pid": 77,
                "uid": 1000,
                "address": ADDRESS,
                "connections": 2,
                "requests": 1000,
                "bytes_in": 5000,
                "bytes_out": 6000,
                "connected_seconds": 61.0,
            }
        ],
        "leases": 1,
        "reservations": 2,
        "quarantined_slots": 3,
        "recent_errors": [{"time": 1.7e9, "level": "ERROR", "message": "disk [bold]on fire"}],
    }


def namespaces() -> list[dict[str, Any]]:
    names = ("llama", "qwen")
    return [
        {
            "number": number,
            "tenant": "",
            "model": model,
            "block_bytes": 65536,
            "digest": hashlib.sha256(model.encode()).hexdigest(),
        }
        for number, model in enumerate(names, 1)
    ]


@dataclass
class FakeDaemon:
    """`dial` stands in for kvstore.admin.dial. `failing` is raised in place of an answer."""

    secret: bytes = b""
    failing: list[Exception] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)  # to AdminVerify, in turn
    asked: list[wire.Call] = field(default_factory=list)
    open: int = 0
    _hello: bytes = b""

    def dial(self, address: str, timeout: float) -> FakeDaemon:
        if self.failing:
            raise self.failing.pop(0)
        self.open += 1
        return self

    def close(self) -> None:
        self.open -= 1

    def call(self, op: int, body: bytes, timeout: float) -> bytes:
        if op == wire.Op.HELLO:
            hello = wire.decode_hello(body)
            assert (hello.version, hello.namespace) == (wire.VERSION, {})
            self._hello = body
            if self.secret:
                nonce = bytes(32)
                return wire.encode(
                    wire.Challenge(nonce, proof_of("server", self.secret, body, nonce))
                )
            return self._welcome()
        if op == wire.Op.AUTH:
            proof = wire.decode_auth(body).proof
            assert is_proof(proof, "client", self.secret, self._hello, bytes(32))
            return self._welcome()
        assert op == wire.Op.CALL
        if self.failing:
            raise self.failing.pop(0)
        request = wire.decode_call(body)
        self.asked.append(request)
        return wire.encode(self._answer(request))

    def _welcome(self) -> bytes:
        return wire.encode(
            wire.Welcome(bytes(16), 1, bytes(16), bytes(16), 1, 0, False, False, False, 1, 60.0)
        )

    def _answer(self, request: wire.Call) -> Any:
        match request:
            case wire.AdminStatus():
                return status()
            case wire.AdminNamespaces():
                return namespaces()
            case wire.AdminInspect(namespace=number, hashes=packed):
                hashes = [packed[at : at + 32].hex() for at in range(0, len(packed), 32)]
                places = [3, *[0] * (len(hashes) - 1)]
                blocks = [{"hash": text, "depth": 1} for text in hashes[:1]]
                return {"namespace": number, "residency": places, "blocks": blocks}
            case wire.AdminVerify():
                return self.answers.pop(0)
        raise AssertionError(request)
