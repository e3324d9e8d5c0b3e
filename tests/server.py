"""A real HTTP server on loopback that speaks OpenAI's chat API, with planted answers and planted faults."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

Handler = Callable[[dict[str, Any]], Awaitable[web.StreamResponse | None]]


class Server:
    """Answers a comparison with P(1) = σ(q₁ − q₂ + bias), the qualities read from `[q=…]` in the two responses shown.

    `fault` may answer in place of it: an async function of the request's body that returns a response, or None to go on.
    `speak` makes it answer with a text instead, of P(1). Asked for log-probabilities without the most probable tokens, it
    gives the answer's words -1/8, -2/8 and so on. It ends an answer before the stop texts, of which it takes at most four.
    `digits`, probabilities of the marks 1 to 10, make it answer with a rating instead; it writes `10` as the tokens `1`, `0`.
    `bodies` are all requests that came; `answered` counts the answers sent for each distinct one.
    """

    def __init__(self, bias: float = 0.0, port: int = 0):
        self.bias = bias
        self.port = port  # 0: any that is free
        self.key: str | None = None
        self.model = "planted"
        self.owner = "test"
        self.logprobs: int = 20
        self.latency = 0.0
        self.fault: Handler | None = None
        self.speak: Callable[[float], str] | None = None
        self.digits: Sequence[float] | None = None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answered: Counter[str] = Counter()
        self.flying = 0
        self.most_flying = 0

    def __enter__(self) -> Server:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _start(self) -> None:
        self._runner = web.AppRunner(self._app(), shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        if self._unauthorised(request):
            return error(401, "Incorrect API key provided: " + request.headers.get("Authorization", "")[7:])
        return web.json_response(
            {"object": "list", "data": [{"id": self.model, "object": "model", "created": 1, "owned_by": self.owner}]}
        )

    def _unauthorised(self, request: web.Request) -> bool:
        return self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}"

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.flying += 1
        self.most_flying = max(self.flying, self.most_flying)
        try:
            if self._unauthorised(request):
                return error(401, "Incorrect API key provided: " + request.headers.get("Authorization", "")[7:])
            return await self._answer(body)
        finally:
            self.flying -= 1

    async def _answer(self, body: dict[str, Any]) -> web.StreamResponse:
        if body["model"] != self.model:
            return error(404, f"The model `{body['model']}` does not exist.")
        if self.fault and (answer := await self.fault(body)) is not None:
            return answer
        if body.get("top_logprobs", 0) > self.logprobs > 0:
            return error(400, f"top_logprobs must be at most {self.logprobs}")
        if len(body.get("stop", ())) > 4:
            return error(400, f"Invalid 'stop': array too long. Expected at most 4, but got {len(body['stop'])} instead.")
        await asyncio.sleep(self.latency)
        self.answered[json.dumps(body, sort_keys=True)] += 1
        return web.json_response(self._completion(body))

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        text = "".join(m["content"] for m in body["messages"])
        qualities = [float(q) for q in re.findall(r"\[q=(-?[\d.]+)\]", text)[:2]]
        p = 1 / (1 + math.exp(-(qualities[0] - qualities[1] + self.bias))) if len(qualities) == 2 else 0.5
        content = self.speak(p) if self.speak else ("1" if p > 0.5 else "2")
        top = [("1", 0.9 * p), ("2", 0.9 * (1 - p)), ("The", 0.06), ("I", 0.03)]
        if self.digits:
            content, top = _rating(self.digits, body["messages"][-1])
        for stop in body.get("stop", ()):
            content = content.partition(stop)[0]
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": content},
        }
        if body.get("logprobs") and self.logprobs and "top_logprobs" not in body:
            choice["logprobs"] = {"content": _spoken(content)}
        elif body.get("logprobs") and self.logprobs:
            tokens = [{"token": t, "logprob": math.log(q), "bytes": None} for t, q in sorted(top, key=lambda x: -x[1])]
            choice["logprobs"] = {"content": [{**tokens[0], "top_logprobs": tokens[: body["top_logprobs"]]}]}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": self.model,
            "choices": [choice],
            "usage": {"prompt_tokens": len(text) // 4, "completion_tokens": 1, "total_tokens": len(text) // 4 + 1},
        }


def _spoken(content: str) -> list[dict[str, Any]]:
    """The words of an answer as tokens."""
    return [
        {"token": word, "logprob": -n / 8, "bytes": None, "top_logprobs": []}
        for n, word in enumerate(re.findall(r"\s*\S+", content), 1)
    ]


def _rating(digits: Sequence[float], last: dict[str, str]) -> tuple[str, list[tuple[str, float]]]:
    """The likeliest mark, and the first token's probabilities; of a turn that was begun with `1`, the next one's."""
    one, *others, ten = digits
    content = str(max(range(10), key=lambda n: digits[n]) + 1)
    if last["role"] == "assistant" and last["content"].endswith("1"):
        return content, [("0", ten / (one + ten)), ("</", one / (one + ten))]
    marks = {"1": one + ten, **{str(n): p for n, p in enumerate(others, 2)}}
    return content, [*((mark, 0.9 * p / sum(digits)) for mark, p in marks.items()), ("The", 0.06), ("I", 0.03)]


def error(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> web.Response:
    body = {"error": {"message": message, "type": "planted", "code": code}}
    return web.json_response(body, status=status, headers=headers)
