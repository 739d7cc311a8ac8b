"""A proxy for prefill and decode on different vLLM servers that share a kvstore.

    python examples/vllm_pd_proxy.py --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200

A request goes to the prefill server first, with max_tokens=1: it computes the prompt, and its
connector saves the KV. Its answer's `kv_transfer_params` say what was saved; with them the request
goes to the decode server, whose connector loads it. The decode server's answer is passed on as it
comes, streamed or not. When the prefill server fails, the decode server computes the prompt itself.

With --push NAME the prefill server also puts the KV into the store of that name in its
`push_targets`, so that it is in the decode host's memory before it is asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, web

PATHS = ("/v1/completions", "/v1/chat/completions")
CONNECT_SECONDS = 10.0
PREFILL_SECONDS = 120.0


class Proxy:
    def __init__(self, prefill: str, decode: str, push: str = "") -> None:
        self._prefill = prefill.rstrip("/")
        self._decode = decode.rstrip("/")
        self._push = {"kvstore_push": push} if push else {}

    def application(self) -> web.Application:
        application = web.Application(client_max_size=64 << 20)
        for path in PATHS:
            application.router.add_post(path, self.generate)
        for path in ("/health", "/v1/models"):
            application.router.add_get(path, self.ask_decode)
        application.cleanup_ctx.append(self._session)
        return application

    async def _session(self, _: web.Application) -> AsyncIterator[None]:
        # Generation has no end that a proxy knows; only connecting has a deadline.
        timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        async with ClientSession(timeout=timeout) as self._client:
            yield

    async def generate(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except ValueError:
            return web.json_response({"error": "the body is not JSON"}, status=400)
        if not isinstance(body, dict):
            return web.json_response({"error": "the body is not a JSON object"}, status=400)
        params = await self._compute_prompt(request.path, body)
        return await self._decode_into(request, {**body, "kv_transfer_params": params})

    async def _compute_prompt(self, path: str, body: dict[str, Any]) -> Any:
        """The prefill server's `kv_transfer_params`; None when it did not answer well."""
        asked = {
            **{name: value for name, value in body.items() if name not in NOT_FOR_PREFILL},
            "stream": False,
            "max_tokens": 1,
            "kv_transfer_params": {**(body.get("kv_transfer_params") or {}), **self._push},
        }
        timeout = ClientTimeout(total=PREFILL_SECONDS, sock_connect=CONNECT_SECONDS)
        try:
            async with self._client.post(
                self._prefill + path, json=asked, timeout=timeout
            ) as answer:
                found = await answer.json() if answer.status == 200 else {}
        except (ClientError, TimeoutError, asyncio.TimeoutError, json.JSONDecodeError) as error:
            print(f"prefill at {self._prefill}: {error!r}; decode computes the prompt", flush=True)
            return None
        return found.get("kv_transfer_params")

    async def _decode_into(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        try:
            answer = await self._client.post(self._decode + request.path, json=body)
        except ClientError as error:
            return web.json_response({"error": f"decode at {self._decode}: {error}"}, status=502)
        async with answer:
            headers = {"Content-Type": answer.headers.get("Content-Type", "application/json")}
            response = web.StreamResponse(status=answer.status, headers=headers)
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    async def ask_decode(self, request: web.Request) -> web.Response:
        async with self._client.get(self._decode + request.path) as answer:
            return web.Response(
                body=await answer.read(),
                status=answer.status,
                content_type=answer.content_type,
            )


# They ask for more than the one token that a prefill generates, or for its form.
NOT_FOR_PREFILL = ("max_completion_tokens", "min_tokens", "n", "best_of", "stream_options")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefill", required=True, help="address of the prefill server")
    parser.add_argument("--decode", required=True, help="address of the decode server")
    parser.add_argument("--push", default="", help="name of a push target of the prefill server")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    proxy = Proxy(arguments.prefill, arguments.decode, arguments.push)
    web.run_app(proxy.application(), host=arguments.host, port=arguments.port)


if __name__ == "__main__":
    main()
