"""A server with a queue as ComfyUI's, whose prompts take a moment; it can die and start anew at its port."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from pathlib import Path

from aiohttp import web

IMAGE, TEXT, SAVE = "1", "2", "3"
GRAPH = {
    IMAGE: {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    TEXT: {"class_type": "Edit", "inputs": {"image": [IMAGE, 0], "instruction": "", "seed": 1}},
    SAVE: {"class_type": "SaveImage", "inputs": {"images": [TEXT, 0]}},
}


def edited(source: bytes, instruction: str, seed: int = 1) -> bytes:
    """What the server makes."""
    return hashlib.sha256(source + instruction.encode() + bytes([seed])).digest()


class Server:
    """seconds: of a prompt. A text of "fail" fails, "copy" gives the source. Its work is logged to a file, a line per finished prompt.

    It is full with four waiting prompts, and while a file beside the log ends in ``.full``; when it refused one stands
    in ``.refused``.
    """

    def __init__(self, seconds: float, log: str) -> None:
        self.seconds, self.log = seconds, log
        self.pending: list[tuple[str, dict]] = []
        self.running = ""
        self.history: dict[str, dict] = {}
        self.uploads: dict[str, bytes] = {}
        self.made: dict[str, bytes] = {}

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([
            web.post("/prompt", self._prompt), web.get("/queue", self._lists), web.post("/queue", self._delete),
            web.get("/history/{id}", self._record), web.get("/history", self._record),
            web.post("/upload/image", self._upload), web.get("/view", self._view),
            web.post("/interrupt", self._interrupt), web.get("/uploads", self._kept),
        ])  # fmt: skip
        return app

    async def work(self) -> None:
        while True:
            await asyncio.sleep(0.005)
            if not self.pending:
                continue
            self.running, graph = self.pending.pop(0)
            await asyncio.sleep(self.seconds)
            text = graph[TEXT]["inputs"]["instruction"]
            name, _, kind = graph[IMAGE]["inputs"]["image"].partition(" ")
            record = {"status": {"status_str": "error"}, "outputs": {}}
            if text != "fail" and kind == "[temp]" and self.running:
                file = f"{self.running}.png"
                source = self.uploads[name]
                made = edited(source, text, graph[TEXT]["inputs"]["seed"])
                self.made[file] = source if text == "copy" else made
                images = [{"filename": file, "subfolder": "", "type": "output"}]
                record = {
                    "status": {"status_str": "success"},
                    "outputs": {SAVE: {"images": images}},
                }
                with open(self.log, "a") as log:
                    log.write(f"{self.running}\n")
            self.history[self.running] = record
            self.running = ""

    async def _prompt(self, request):
        body = await request.json()
        if len(self.pending) > 3 or Path(self.log + ".full").exists():
            with open(self.log + ".refused", "a") as log:
                log.write(f"{time.monotonic()}\n")
            return web.Response(status=429)
        self.pending.append((body["prompt_id"], body["prompt"]))
        return web.json_response({"prompt_id": body["prompt_id"], "node_errors": {}})

    async def _lists(self, request):
        running = [[0, self.running]] if self.running else []
        return web.json_response(
            {"queue_running": running, "queue_pending": [[0, p] for p, _ in self.pending]}
        )

    async def _delete(self, request):
        gone = (await request.json())["delete"]
        self.pending = [row for row in self.pending if row[0] not in gone]
        return web.Response()

    async def _interrupt(self, request):
        return web.Response()

    async def _record(self, request):
        prompt = request.match_info.get("id")
        known = self.history if prompt is None else {prompt: self.history.get(prompt)}
        return web.json_response({key: value for key, value in known.items() if value})

    async def _upload(self, request):
        form = await request.post()
        assert form["type"] == "temp"
        self.uploads[form["image"].filename] = form["image"].file.read()
        return web.json_response({"name": form["image"].filename, "subfolder": "", "type": "temp"})

    async def _view(self, request):
        return web.Response(body=self.made[request.query["filename"]])

    async def _kept(self, request):
        return web.json_response({name: len(data) for name, data in self.uploads.items()})


async def main(port: int, seconds: float, log: str) -> None:
    server = Server(seconds, log)
    runner = web.AppRunner(server.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await server.work()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]))
