"""A small voting session, and its server in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hywu_core.evaluation.gsb import session
from hywu_core.evaluation.gsb.server import serve

aiohttp = pytest.importorskip("aiohttp", reason="the voting server needs the `eval` extra")
yarl = pytest.importorskip("yarl", reason="comes with aiohttp")


def make(folder: Path, pairs: int = 4, **options) -> Path:
    """A session on flat images whose metadata name the method, as ComfyUI's do."""
    entries = []
    for i in range(pairs):
        paths = []
        for j, method in enumerate(("source", "SECRETA", "SECRETB")):
            info = PngInfo()
            info.add_text("workflow", method)
            path = folder / method / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 12), (40 * j + i, 90, 10 * i)).save(path, pnginfo=info)
            paths.append(path)
        entries.append(session.Entry(f"edit/en/{i}", f"Make it {i}", *paths))
    return session.create_session(
        folder / "session", entries, ("SECRETA", "SECRETB"), seed=7, **options
    )


class Server:
    """A server in a thread of its own; leaving it ends it as Ctrl-C does."""

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        hosts: tuple[str, ...] = (),
        told: list[str] | None = None,
    ) -> None:
        self.ready, self.url, self.told = threading.Event(), "", told
        self.thread = threading.Thread(target=self.serve, args=(folder, host, list(hosts)))
        self.thread.start()
        assert self.ready.wait(60)
        assert self.url, self.error
        self.open(self.url)

    def serve(self, folder: Path, host: str, hosts: list[str]) -> None:
        try:
            serve(folder, host, 0, hosts, self.started, self.warn)
        except (asyncio.CancelledError, Exception) as error:
            self.error = error  # told by the thread that waits for the start
        self.ready.set()

    def warn(self, text: str) -> None:
        if self.told is not None:
            self.told.append(text)

    def started(self, url: str) -> None:
        self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
        self.url = url
        self.ready.set()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(60)
        assert not self.thread.is_alive()

    def open(self, url: str) -> None:
        self.base, fragment = url.split("#")
        self.token = fragment.split(":")[1]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        return asyncio.run(self._ask(path, body, headers))

    async def _ask(self, path, body, headers):
        async with aiohttp.ClientSession() as client:
            return await self.send(client, path, body, headers)

    async def send(self, client, path, body, headers=None):
        sent = {"X-HYWU-Token": self.token, **(headers or {})}
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body)
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        method = "GET" if data is None else "POST"
        url = yarl.URL(self.base + path, encoded=True)
        async with client.request(method, url, data=data, headers=sent) as answer:
            return answer.status, await answer.read()
