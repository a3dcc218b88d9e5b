"""A web application of aiohttp in a thread of its own."""

from __future__ import annotations

import asyncio
import threading

from aiohttp import web

from hywu_core.headless.local import free_port


class AppServer:
    """`with AppServer() as server:`; a class below gives `app()`, and `url` is the address."""

    #: Path below which it lies.
    prefix = ""

    def app(self) -> web.Application:
        """Called in the thread, where `_loop` is its loop."""
        raise NotImplementedError

    def __enter__(self):
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        runner = web.AppRunner(self.app(), shutdown_timeout=1)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{port}{self.prefix}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()
