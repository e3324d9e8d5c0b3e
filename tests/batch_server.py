"""The test server with a batch endpoint: files in, files out, and faults planted at each moment between."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

from aiohttp import web

from tests.server import Server, error

STEPS = ("validating", "in_progress", "finalizing")


class BatchServer(Server):
    """Answers a batch's lines as `Server` answers single requests, faults and all, when the batch ends.

    A batch goes one step each time that it is asked after; while `held` is set it stays in progress. `ends` are how batches
    end, in their order, completed unless told; expired and cancelled ones have answered half of their requests. `most` is how
    many requests a batch may have before it is too much for the queue. `messy`: files have their lines in any order, some of
    them twice or as failures too, and others' between them.

    `moments` are hooks by name (upload, create, created, poll, download, list), called before the server does that, or has told
    of it (created): what they return is answered in its place, and a ConnectionResetError closes the connection.
    `cuts` downloads break off in the middle. `calls` counts requests by method and path without ids.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.held, self.freed = threading.Event(), threading.Event()
        self.ends: list[str] = []
        self.most: int | None = None
        self.messy = False
        self.page = 2
        self._numbers = count()
        self.cuts = 0
        self.moments: dict[str, Callable[[], Any]] = {}

    def _app(self) -> web.Application:
        app = super()._app()
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._download)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", self._list)
        app.router.add_get("/v1/batches/{id}", self._retrieve)
        return app

    def hang(self, name: str) -> threading.Event:
        """Let the next call of this moment get no answer until `freed` is set; the event is set when it has come."""
        met = threading.Event()

        async def hook() -> web.Response | None:
            if met.is_set():
                return None
            met.set()
            return await self.late()

        self.moments[name] = hook
        return met

    async def late(self) -> web.Response:
        while not self.freed.is_set():
            await asyncio.sleep(0.02)
        return error(500, "too late")

    async def _moment(self, name: str, request: web.Request) -> web.Response | None:
        if self._unauthorised(request):
            return error(401, "Incorrect API key provided: " + request.headers.get("Authorization", "")[7:])
        hook = self.moments.get(name)
        return await hook() if hook else None

    async def _upload(self, request: web.Request) -> web.Response:
        if (answer := await self._moment("upload", request)) is not None:
            return answer
        form = await request.post()
        if form.get("purpose") != "batch" or not isinstance(form.get("file"), web.FileField):
            return error(400, "a file and its purpose, please")
        name = f"file-{len(self.files)}"
        self.files[name] = form["file"].file.read()
        return web.json_response({"id": name, "object": "file", "bytes": len(self.files[name]), "purpose": "batch"})

    async def _create(self, request: web.Request) -> web.Response:
        if (answer := await self._moment("create", request)) is not None:
            return answer
        told = await request.json()
        if told["input_file_id"] not in self.files or told["completion_window"] != "24h":
            return error(400, "no such file, or another window than 24h")
        lines = [json.loads(line) for line in self.files[told["input_file_id"]].splitlines()]
        batch = {
            "id": f"batch_{next(self._numbers)}",
            "object": "batch",
            "endpoint": told["endpoint"],
            "input_file_id": told["input_file_id"],
            "metadata": told["metadata"],
            "status": STEPS[0],
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
        }
        self.batches[batch["id"]] = batch
        batch["end"] = self.ends.pop(0) if self.ends else "completed"
        if (answer := await self._moment("created", request)) is not None:
            return answer
        return web.json_response(batch)

    async def _retrieve(self, request: web.Request) -> web.Response:
        if (answer := await self._moment("poll", request)) is not None:
            return answer
        batch = self.batches.get(request.match_info["id"])
        if batch is None:
            return error(404, f"No batch found with id '{request.match_info['id']}'.")
        if batch["status"] in STEPS and not (self.held.is_set() and batch["status"] == "in_progress"):
            await self._step(batch)
        return web.json_response(batch)

    async def _list(self, request: web.Request) -> web.Response:
        if (answer := await self._moment("list", request)) is not None:
            return answer
        names = [*reversed(self.batches)]
        begin = names.index(request.query["after"]) + 1 if "after" in request.query else 0
        shown = names[begin : begin + self.page]
        more = begin + self.page < len(names)
        return web.json_response({"object": "list", "data": [self.batches[name] for name in shown], "has_more": more})

    async def _download(self, request: web.Request) -> web.StreamResponse:
        if (answer := await self._moment("download", request)) is not None:
            return answer
        content = self.files[request.match_info["id"]]
        if not self.cuts:
            return web.Response(body=content)
        self.cuts -= 1
        response = web.StreamResponse(headers={"Content-Length": str(len(content))})
        await response.prepare(request)
        await response.write(content[: len(content) // 2])
        assert request.transport
        request.transport.close()
        return response

    # ------------------------------------------------------------ a batch's way

    async def _step(self, batch: dict[str, Any]) -> None:
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        if batch["status"] == STEPS[0] and (problem := self._problem(lines)):
            batch |= {"status": "failed", "errors": {"object": "list", "data": [problem]}}
        elif batch["status"] != STEPS[-1]:
            batch["status"] = STEPS[STEPS.index(batch["status"]) + 1]
        else:
            await self._finish(batch, lines)

    def _problem(self, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self.most and len(lines) > self.most:
            return {"code": "token_limit_exceeded", "message": f"Enqueued token limit: {self.most}", "line": None}
        names = [line["custom_id"] for line in lines]
        for number, line in enumerate(lines, 1):
            if line["method"] != "POST" or line["url"] != "/v1/chat/completions" or len(line["custom_id"]) > 64:
                return {"code": "invalid", "message": "no chat completion", "line": number}
            if line["body"]["model"] != self.model:
                return {"code": "model_not_found", "message": f"no model {line['body']['model']}", "line": number}
        return {"code": "duplicate_custom_id", "message": "twice"} if len({*names}) < len(names) else None

    async def _finish(self, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        done = len(lines) if batch["end"] == "completed" else len(lines) // 2
        told = {200: [], 400: []}  # type: dict[int, list[dict[str, Any]]]
        for line in lines[:done]:
            answer = await self._answer(line["body"])
            assert isinstance(answer, web.Response)
            assert isinstance(answer.body, bytes)
            response = {"status_code": answer.status, "request_id": "r", "body": json.loads(answer.body)}
            told[200 if answer.status == 200 else 400].append(_line(line["custom_id"], response, None))
        problem = {"code": f"batch_{batch['end']}", "message": f"not executed: {batch['end']}"}
        told[400] += [_line(line["custom_id"], None, problem) for line in lines[done:]]
        failed = len(told[400])
        if self.messy:  # a failure beside an answer
            told[400].append(_line(lines[0]["custom_id"], None, problem))
        counts = {"total": len(lines), "completed": len(told[200]), "failed": failed}
        batch |= {"status": batch["end"], "request_counts": counts}
        for name, found in (("output_file_id", told[200]), ("error_file_id", told[400])):
            if found:
                batch[name] = f"file-{len(self.files)}"
                self.files[batch[name]] = self._written(found)

    def _written(self, lines: list[dict[str, Any]]) -> bytes:
        if self.messy:
            strange = {**lines[0], "custom_id": "f" * 64}
            lines = [*lines, *lines[::3], strange, {**strange, "custom_id": None}]
            random.Random(len(lines)).shuffle(lines)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        return (text + ("\n[1, 2]\nnot JSON\n" if self.messy else "")).encode()


def _line(key: str, response: dict[str, Any] | None, problem: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": f"batch_req_{key[:8]}", "custom_id": key, "response": response, "error": problem}
