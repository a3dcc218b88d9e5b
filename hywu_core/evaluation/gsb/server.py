"""The voting page's HTTP side, on aiohttp: standalone, or its routes mounted in another server.

Everything about a session needs its token in the header X-HYWU-Token (the page has it from the
URL's fragment, which browsers never send). A header of one's own and a JSON body can't be sent
across origins without permission, which is never given; Host and Origin are checked besides.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ...errors import HYWUError, need
from ...files import parse_json
from . import session
from .store import Conflict, Store

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
STATIC = {
    "": ("index.html", "text/html"),
    "gsb.css": ("gsb.css", "text/css"),
    "gsb.js": ("gsb.js", "text/javascript"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
MAX_BODY = 4096
MAX_VOTER = 64
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that is answered with a status and one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def routes(
    find: Callable[[str], Store | None], prefix: str, hosts: frozenset[str] | None
) -> list[tuple[str, str, Callable[[Any], Awaitable[Any]]]]:
    """(method, path, handler) rows to add to an aiohttp router.

    find gives the open store of a session's name, or None; hosts are the host names a request may
    be addressed to (None: any, for servers that do their own check).
    """
    web = need("aiohttp.web", "to serve the voting page", "aiohttp")

    def reply(data: Mapping[str, Any], status: int = 200) -> Any:
        return web.json_response(data, status=status, headers=HEADERS)

    def guarded(handler: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def answer(request: Any) -> Any:
            try:
                _check_address(request, hosts)
                return await handler(request)
            except Refused as error:
                return reply({"error": str(error)}, error.status)
            except Conflict as error:
                return reply({"error": str(error)}, 409)
            except HYWUError as error:
                return reply({"error": str(error)}, 400)
            except (web.HTTPException, asyncio.CancelledError):
                raise
            except Exception:
                log.exception("The voting page failed on %s", request.path)
                return reply({"error": "The server failed; its log says why."}, 500)

        return answer

    async def static(request: Any) -> Any:
        found = STATIC.get(request.match_info.get("file", ""))
        if found is None:
            raise Refused(404, "There is no such page.")
        return web.Response(
            body=(PAGE / found[0]).read_bytes(),
            content_type=found[1],
            charset="utf-8",
            headers=HEADERS,
        )

    async def image(request: Any) -> Any:
        path = _store(request, find).image(request.match_info["image"])
        if path is None or not path.is_file():
            raise Refused(404, "This session lists no such image.")
        body = await asyncio.to_thread(path.read_bytes)
        return web.Response(body=body, content_type="image/png", headers=HEADERS)

    async def state(request: Any) -> Any:
        store, body = _store(request, find), await _body(request)
        return reply(await asyncio.to_thread(session.state, store, body["voter"]))

    async def vote(request: Any) -> Any:
        store, body = _store(request, find), await _body(request, "pair", "choice")
        voter = body["voter"]
        await asyncio.to_thread(session.vote, store, voter, body["pair"], body["choice"])
        return reply(await asyncio.to_thread(session.state, store, voter))

    async def undo(request: Any) -> Any:
        store, body = _store(request, find), await _body(request, "pair")
        await asyncio.to_thread(store.undo, body["voter"], body["pair"])
        return reply(await asyncio.to_thread(session.state, store, body["voter"]))

    base = prefix + "/s/{session}"
    rows = [
        ("GET", prefix + "/", static),
        ("GET", prefix + "/{file}", static),
        ("GET", base + "/image/{image}", image),
        ("POST", base + "/state", state),
        ("POST", base + "/vote", vote),
        ("POST", base + "/undo", undo),
    ]
    return [(method, path, guarded(handler)) for method, path, handler in rows]


def _check_address(request: Any, hosts: frozenset[str] | None) -> None:
    address = request.headers.get("Host", "")
    if hosts is not None and _split("//" + address).hostname not in hosts:
        raise Refused(403, "This server doesn't answer to that host name.")
    origin = request.headers.get("Origin")
    if origin is not None and _split(origin).netloc != address:
        raise Refused(403, "Requests from other sites are refused.")


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets that hold no address
        return urlsplit("")


def _store(request: Any, find: Callable[[str], Store | None]) -> Store:
    """The session, if the token fits; an unknown session and a wrong token answer the same."""
    store = find(request.match_info["session"])
    token = request.headers.get("X-HYWU-Token", "").encode("utf-8", "replace")
    wanted = (store.about["token"] if store else "").encode()
    if not hmac.compare_digest(token, wanted) or store is None:
        raise Refused(403, "The link's token doesn't fit: open the whole link you were given.")
    return store


async def _body(request: Any, *names: str) -> dict[str, str]:
    if request.content_type != "application/json":
        raise Refused(415, "The request must be JSON.")
    raw = b""
    while chunk := await request.content.read(MAX_BODY + 1 - len(raw)):
        raw += chunk
        if len(raw) > MAX_BODY:
            raise Refused(413, f"The request is longer than {MAX_BODY} bytes.")
    try:
        body = parse_json(raw, "the request")
    except HYWUError as error:
        raise Refused(400, "The request isn't valid JSON.") from error
    fields = ("voter", *names)
    if not isinstance(body, dict) or not all(isinstance(body.get(n), str) for n in fields):
        raise Refused(400, f"The request needs the texts {', '.join(fields)}.")
    body["voter"] = body["voter"].strip()
    if not 0 < len(body["voter"]) <= MAX_VOTER or not body["voter"].isprintable():
        raise Refused(400, f"A voter's name has 1 to {MAX_VOTER} printable characters.")
    return {name: body[name] for name in fields}


def serve(folder: Path, host: str, port: int, extra_hosts: list[str], ready: Callable) -> None:
    """Serve one session until interrupted; ready(url) is called once the port is open.

    Raises HYWUError when aiohttp is missing, OSError when the port is taken.
    """
    web = need("aiohttp.web", "to serve the voting page", "aiohttp")
    store = Store(folder)
    hosts = LOOPBACK | {host} | set(extra_hosts)
    app = web.Application(client_max_size=MAX_BODY)

    def find(name: str) -> Store | None:
        return store if name == "session" and store.is_current() else None

    for row in routes(find, "/gsb", hosts):
        app.router.add_route(*row)

    async def main() -> None:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
            bound = runner.addresses[0][1]
            shown = f"[{host}]" if ":" in host else host
            ready(f"http://{shown}:{bound}/gsb/#session:{store.about['token']}")
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    try:
        asyncio.run(main())
    finally:
        store.close()
