"""A server that speaks ComfyUI's protocol as told: what a real one rarely does."""

from __future__ import annotations

import asyncio
import json

from aiohttp import web
from app_server import AppServer

#: Events after which a prompt is done, "PROMPT" standing for its id.
DONE = [("execution_success", {"prompt_id": "PROMPT"})]
#: What the client does to end a prompt wherever it is.
INTERRUPTED = [["queue", {"delete": ["PROMPT"]}], ["interrupt", {"prompt_id": "PROMPT"}]]


class FakeComfyUI(AppServer):
    """A server; the attributes say what it answers, `asked` what it was asked.

    events: sent over the websocket once a prompt is queued. closes: the websocket is closed then; mute:
    it isn't even accepted, with this status. status: the history record's. late: looks at the history
    that find nothing, while the prompt is `running` (else nowhere). lost: there is never a record.
    login: the value of the Authorization header that is wanted, or "?token=…". broken: HTTP status of so
    many answers to GET requests after the prompt was queued.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = DONE
        self.closes, self.mute, self.lost, self.running = False, 0, False, True
        self.status: dict = {"status_str": "success", "completed": True, "messages": []}
        self.refusal: tuple[int, object] | None = None
        self.node_errors: dict = {}
        self.outputs: dict = {}
        self.files: dict[str, bytes] = {}
        self.info: dict = {}
        self.late, self.broken, self.broken_status = 0, 0, 502
        self.upload_status = 200
        self.upload_answer: object = None
        self.busy = self.busy_view = 0
        self.login = ""
        self.other_records = False
        self.loses_answer = False
        self.sockets = 0
        self.asked: list[tuple[str, object]] = []
        self.prompt = ""

    def app(self) -> web.Application:
        self._queued = asyncio.Event()
        app = web.Application(middlewares=[self._checked])
        app.add_routes([
            web.get("/ws", self._ws), web.post("/prompt", self._queue),
            web.get("/history", self._records), web.get("/history/{id}", self._history),
            web.get("/queue", self._lists), web.get("/view", self._view),
            web.get("/object_info/{kind}", self._info),
            web.post("/upload/image", self._upload), web.post("/{command}", self._command),
        ])  # fmt: skip
        return app

    @web.middleware
    async def _checked(self, request, handler):
        found = "?token=" + request.query.get("token", "")
        if self.login and self.login not in (request.headers.get("Authorization"), found):
            return web.Response(status=401, text="<html>401 Authorization Required</html>")
        if self.prompt and self.broken > 0 and request.method == "GET" and request.path != "/ws":
            self.broken -= 1
            return web.Response(status=self.broken_status, text="<html>the proxy</html>")
        return await handler(request)

    async def _ws(self, request):
        self.sockets += 1
        if self.mute:
            return web.Response(status=self.mute)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_json({"type": "status", "data": {"sid": "x"}})
        await self._queued.wait()
        await socket.send_bytes(b"\x00\x00\x00\x01a preview")
        await socket.send_str("no JSON at all")
        for kind, data in self.events if self.refusal is None else ():
            text = json.dumps({"type": kind, "data": data}).replace("PROMPT", self.prompt)
            await socket.send_str(text)
        if not self.closes:
            await socket.receive()
        return socket

    async def _queue(self, request):
        if self.busy > 0:
            self.busy -= 1
            return web.Response(status=429)
        body = await request.json()
        self.asked.append(("prompt", body["prompt"]))
        if self.refusal is not None:
            self._queued.set()
            status, answer = self.refusal
            text = answer if isinstance(answer, str) else json.dumps(answer)
            return web.Response(status=status, text=text)
        self.prompt = body["prompt_id"]
        self._queued.set()
        if self.loses_answer:
            request.transport.abort()
        return web.json_response({"prompt_id": self.prompt, "node_errors": self.node_errors})

    def _ended(self) -> bool:
        return not self.lost and self.late <= 0

    async def _history(self, request):
        self.late -= 1
        ended = not self.lost and self.late < 0
        record = {"outputs": self.outputs, "status": self.status}
        text = json.dumps({self.prompt: record} if ended and self.prompt else {})
        return web.Response(text=text.replace("PROMPT", self.prompt))

    async def _records(self, request):
        return web.json_response({"other": {"outputs": {}}} if self.other_records else {})

    async def _lists(self, request):
        there = self.prompt and self.running and not self._ended()
        rows = [[0, self.prompt, {}, {}, []]] if there else []
        return web.json_response({"queue_running": rows, "queue_pending": []})

    async def _info(self, request):
        kind = request.match_info["kind"]
        return web.json_response({kind: self.info[kind]} if kind in self.info else {})

    async def _view(self, request):
        if self.busy_view > 0:
            self.busy_view -= 1
            return web.Response(status=502)
        name = request.query["filename"]
        if name not in self.files:
            return web.Response(status=404)
        return web.Response(body=self.files[name])

    async def _upload(self, request):
        field = await (await request.multipart()).next()
        self.asked.append(("upload", (field.filename, bytes(await field.read()))))
        if self.upload_status != 200:
            return web.Response(status=self.upload_status, text="the disk is full")
        if self.upload_answer is not None:
            return web.json_response(self.upload_answer)
        return web.json_response({"name": field.filename, "subfolder": "sub", "type": "input"})

    async def _command(self, request):
        self.asked.append((request.match_info["command"], await request.json()))
        return web.Response()

    def commands(self) -> list[tuple[str, object]]:
        """What it was asked beside prompts and uploads, the prompt's id written PROMPT."""
        known = [(name, body) for name, body in self.asked if name not in ("prompt", "upload")]
        return json.loads(json.dumps(known).replace(self.prompt or "PROMPT", "PROMPT"))
