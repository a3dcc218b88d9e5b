"""The voting page's HTTP side, on aiohttp: standalone, or its routes mounted in another server.

Everything about a session needs its token in the header X-HYWU-Token (the page has it from the
URL's fragment, which browsers never send). A header of one's own and a JSON body can't be sent
across origins without permission, which is never given; Host and Origin are checked besides.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ...errors import HYWUError, get_logger, need
from ...files import parse_json
from . import session
from .store import Conflict, NotKept, Store

log = get_logger(__name__)

PAGE = Path(__file__).parent / "page"
STATIC = {
    "": ("index.html", "text/html"),
    "gsb.css": ("gsb.css", "text/css"),
    "gsb.js": ("gsb.js", "text/javascript"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
#: Stands in a set of host names for every address in numbers.
ANY_NUMBER = "*"
MAX_BODY = 4096
MAX_VOTER = 64
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


Handler = Callable[[Any], Awaitable[Any]]


class Refused(Exception):
    """A request that is answered with a status and one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def routes(
    find: Callable[[str], Store | None], prefix: str, hosts: frozenset[str] | None
) -> list[tuple[str, str, Handler]]:
    """(method, path, handler) rows to add to an aiohttp router.

    find: gives the open store of a session's name, or None.
    prefix: of all paths.
    hosts: the host names a request may be addressed to; None: any, for servers that do their own check.
    """
    page, base = _Page(find), prefix + "/s/{session}"
    rows = [
        ("GET", prefix + "/", page.static),
        ("GET", prefix + "/{file}", page.static),
        ("GET", base + "/image/{image}", page.image),
        ("POST", base + "/state", page.state),
        ("POST", base + "/vote", page.vote),
        ("POST", base + "/undo", page.undo),
    ]
    return [(method, path, page.guarded(handler, hosts)) for method, path, handler in rows]


class _Page:
    """The handlers of a voting page; find: see `routes`."""

    def __init__(self, find: Callable[[str], Store | None]) -> None:
        self.find = find
        self.web = need("aiohttp.web", "to serve the voting page", "aiohttp")
        self.broke_off = need("aiohttp", "to serve the voting page").ClientPayloadError

    def reply(self, data: Mapping[str, Any], status: int = 200) -> Any:
        return self.web.json_response(data, status=status, headers=HEADERS)

    def guarded(self, handler: Handler, hosts: frozenset[str] | None) -> Handler:
        """The handler with the address checked before it, and a status and a sentence for what it raises."""

        async def answer(request: Any) -> Any:
            try:
                _check_address(request, hosts)
                return await handler(request)
            except (self.web.HTTPException, asyncio.CancelledError):
                raise
            except Exception as error:
                status, said = self._said(error, request.path)
                return self.reply({"error": said}, status)

        return answer

    def _said(self, error: Exception, path: str) -> tuple[int, str]:
        if isinstance(error, Refused):
            return error.status, str(error)
        if isinstance(error, Conflict):
            return 409, str(error)
        if isinstance(error, NotKept):
            log.warning("%s", error)
            return (
                507,
                "This was not kept: the server's disk is full or can't be written; its log says more.",
            )
        if isinstance(error, HYWUError):
            return 400, str(error)
        if isinstance(error, (ConnectionError, self.broke_off)):
            log.debug("A client hung up in the middle of %s", path)
            return 400, "The request broke off."
        log.error("The voting page failed on %s", path, exc_info=error)
        return 500, "The server failed; its log says why."

    async def static(self, request: Any) -> Any:
        found = STATIC.get(request.match_info.get("file", ""))
        if found is None:
            raise Refused(404, "There is no such page.")
        name, kind = found
        body = (PAGE / name).read_bytes()
        return self.web.Response(body=body, content_type=kind, charset="utf-8", headers=HEADERS)

    async def image(self, request: Any) -> Any:
        path = _store(request, self.find).image(request.match_info["image"])
        if path is None or not path.is_file():
            raise Refused(404, "This session lists no such image.")
        body = await asyncio.to_thread(path.read_bytes)
        return self.web.Response(body=body, content_type="image/png", headers=HEADERS)

    async def state(self, request: Any) -> Any:
        store, body = _store(request, self.find), await _body(request)
        return await self._state(store, body["voter"])

    async def vote(self, request: Any) -> Any:
        store, body = _store(request, self.find), await _body(request, "pair", "choice")
        voter = body["voter"]
        await asyncio.to_thread(session.vote, store, voter, body["pair"], body["choice"])
        return await self._state(store, voter)

    async def undo(self, request: Any) -> Any:
        store, body = _store(request, self.find), await _body(request, "pair")
        await asyncio.to_thread(store.undo, body["voter"], body["pair"])
        return await self._state(store, body["voter"])

    async def _state(self, store: Store, voter: str) -> Any:
        return self.reply(await asyncio.to_thread(session.state, store, voter))


def _check_address(request: Any, hosts: frozenset[str] | None) -> None:
    address = request.headers.get("Host", "")
    if hosts is not None:
        name = (_split("//" + address).hostname or "").removesuffix(".")
        # Only names can be pointed at this machine by a stranger: numbers of it are as good as each other
        if name not in hosts and not (ANY_NUMBER in hosts and _number(name)):
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


def allowed_hosts(host: str, more: Iterable[str]) -> frozenset[str]:
    """The host names that requests may be addressed to, in lower case.

    host: what is listened on.
    more: names that voters use, with or without scheme, port and capitals.
    Raises HYWUError on a text that holds no host name.
    """
    found = {*LOOPBACK, host.lower().removesuffix(".")}
    number = _number(host)
    if number is not None and not number.is_loopback:
        found.add(ANY_NUMBER)
    for text in more:
        text = text.strip()
        parts = _split(text if "://" in text else "//" + text)
        name = (parts.hostname or "").removesuffix(".")
        if "@" in parts.netloc or (
            not _number(name) and not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", name)
        ):
            raise HYWUError(
                f"--allow-host is '{text}'; give a host name as voters type it, such as votes.example.org."
            )
        found.add(name)
    return frozenset(found)


def _number(name: str) -> IPv4Address | IPv6Address | None:
    """The address that a host name is in numbers; None for a name."""
    try:
        return ip_address(name)
    except ValueError:
        return None


def _own_address() -> str:
    """The address of this machine that others in its network reach it by; the loopback's without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: the system only chooses an interface
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def serve(
    folder: Path,
    host: str,
    port: int,
    extra_hosts: Sequence[str],
    ready: Callable[[str], None],
    warn: Callable[[str], None] = log.warning,
) -> None:
    """Serve one session until interrupted.

    ready: called with the link once the port is open.
    warn: called with what an operator should know.
    Raises HYWUError when aiohttp is missing or an argument can't be used, OSError when the port is taken.
    """
    if not 0 <= port <= 65535:
        raise HYWUError(f"--port is {port}; it must be 0 to 65535 (0 takes a free one).")
    web = need("aiohttp.web", "to serve the voting page", "aiohttp")
    store = Store(folder)
    app = web.Application(client_max_size=MAX_BODY)

    def find(name: str) -> Store | None:
        return store if name == "session" and store.is_current() else None

    async def main() -> None:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, host, port)
        try:
            await _start(site, host)
            number, bound = _number(host), runner.addresses[0][1]
            shown = _own_address() if number is not None and number.is_unspecified else host
            shown = f"[{shown}]" if ":" in shown else shown
            if host not in LOOPBACK and not (number is not None and number.is_loopback):
                warn(
                    f"Listening on {host}: whoever reaches this machine's port {bound} gets the page, and "
                    "the connection is not encrypted. Outside a network that you trust put a server with "
                    "https before it."
                )
            ready(f"http://{shown}:{bound}/gsb/#session:{store.about['token']}")
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    try:
        for row in routes(find, "/gsb", allowed_hosts(host, extra_hosts)):
            app.router.add_route(*row)
        asyncio.run(main())
    finally:
        store.close()


async def _start(site: Any, host: str) -> None:
    try:
        await site.start()
    except socket.gaierror as error:
        raise HYWUError(f"--host is '{host}', which is no address ({error.strerror}).") from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise HYWUError(f"--host is '{host}', which is no address of this machine.") from error
        raise
