"""A reverse proxy before a ComfyUI server: below a path, behind a login, with a websocket that drops or goes mute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web
from app_server import AppServer


class Proxy(AppServer):
    """`with Proxy(url, …) as proxy:`; `proxy.url` is its address.

    prefix: path below which the server lies. token: the bearer token that is wanted. socket: "drop" cuts each
    websocket after `seconds`, "mute" passes nothing on from then, "" leaves it alone.
    """

    def __init__(
        self, upstream: str, prefix: str = "", token: str = "", socket: str = "", seconds: float = 0.5
    ) -> None:  # fmt: skip
        self.upstream, self.prefix, self.token = upstream, prefix, token
        self.socket, self.seconds, self.sockets = socket, seconds, 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        app.cleanup_ctx.append(self._client)
        return app

    async def _client(self, app: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession() as self._session:
            yield

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401, text="<html>401 Authorization Required</html>")
        if not request.raw_path.startswith(self.prefix):
            return web.Response(status=404, text="no such site")
        if self.prefix and request.raw_path == self.prefix:
            return web.Response(status=301, headers={"Location": self.prefix + "/"})
        address = self.upstream + request.raw_path.removeprefix(self.prefix)
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._pass_socket(request, address)
        headers = {k: v for k, v in request.headers.items() if k == "Content-Type"}
        body = await request.read()
        async with self._session.request(
            request.method, address, data=body or None, headers=headers
        ) as answer:
            told = {k: v for k, v in answer.headers.items() if k == "Content-Type"}
            return web.Response(status=answer.status, body=await answer.read(), headers=told)

    async def _pass_socket(self, request: web.Request, address: str) -> web.StreamResponse:
        self.sockets += 1
        ours = web.WebSocketResponse(max_msg_size=0)
        await ours.prepare(request)
        ends = self._loop.time() + self.seconds
        async with self._session.ws_connect(address, max_msg_size=0) as theirs:
            while True:
                try:
                    left = ends - self._loop.time() if self.socket == "drop" else None
                    message = await theirs.receive(None if left is None else max(0.01, left))
                except asyncio.TimeoutError:
                    request.transport.abort()
                    return ours
                if message.type is aiohttp.WSMsgType.TEXT:
                    if self.socket != "mute" or self._loop.time() < ends:
                        await ours.send_str(message.data)
                elif message.type is not aiohttp.WSMsgType.BINARY:
                    return ours
