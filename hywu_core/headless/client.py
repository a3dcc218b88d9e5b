"""A client of ComfyUI's API: upload, queue, follow, fetch, interrupt.

The server's ``/history`` and ``/queue`` say what became of a prompt, and they are asked until they do.
The websocket is a hint: it brings progress and says when to look; a prompt ends well without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import HYWUError, need
from ..files import FORBIDDEN, parse_json
from .address import Address
from .follow import Follower
from .trouble import (
    Busy,
    Cleared,
    Denied,
    Interrupted,
    NodeFailed,
    Refused,
    Removed,
    Restarted,
    ServerError,
    ServerGone,
    TimedOut,
    describe_refusal,
)

__all__ = [
    "Busy", "Cleared", "Client", "Denied", "Interrupted", "NodeFailed", "Refused", "Removed", "Restarted",
    "ServerError", "ServerGone", "TimedOut", "describe_refusal", "outputs", "run_sync",
]  # fmt: skip

#: The server, or what stands before it, did nothing yet and may soon; or may just have stumbled.
BUSY = frozenset({425, 429, 503})
PASSING = BUSY | {408, 500, 502, 504}

#: (node id or None, steps done, steps in all), called as the server reports.
Progress = Callable[["str | None", int, int], None]


def new_id() -> str:
    """An id for a prompt, as ComfyUI's frontend makes them."""
    return str(uuid.uuid4())


class Client:
    """`async with Client(url) as client:`, then `await client.run(graph)`.

    url: see `Address`.
    token: sent as a bearer token.
    timeout: seconds that a prompt may take.
    patience: seconds without any answer after which the server counts as gone.
    Every failure is a ServerError with one readable sentence, in which no secret stands. Needs aiohttp.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float | None = None,
        patience: float = 30.0,
    ) -> None:
        if timeout is not None and not 0 < timeout < float("inf"):
            raise HYWUError(f"The timeout is {timeout}; it must be a number of seconds above 0.")
        self.address = Address(url, token)
        self.url = self.address.url
        self.timeout, self.patience = timeout, patience
        self.id = uuid.uuid4().hex
        self.http = need("aiohttp", "to talk to a ComfyUI server")
        self.session: Any = None

    async def __aenter__(self) -> Client:
        limits = self.http.ClientTimeout(total=None, sock_connect=15, sock_read=300)
        self.session = self.http.ClientSession(timeout=limits, headers=self.address.headers)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.session.close()

    # -- requests ----------------------------------------------------------------------------------

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, bytes]:
        """One request: (HTTP status, body). Raises ServerGone without an answer, Denied without a login."""
        options["params"] = {**self.address.query, **options.get("params", {})}
        try:
            async with self.session.request(
                method, self.url + path, allow_redirects=False, **options
            ) as answer:
                status, body, headers = answer.status, await answer.read(), answer.headers
        except (self.http.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            reason = self.address.hide(error) or type(error).__name__
            raise ServerGone(
                f"No ComfyUI answers at {self.url}: it can't be reached or went away ({reason}); start it, "
                "or give its address with --server."
            ) from error
        if status in (401, 403, 407):
            given = "the login given is not taken" if self.address.logs_in else "it wants a login"
            raise Denied(
                f"{self.url}{path} answered HTTP {status}: {given}. Give a bearer token in the environment "
                "variable that --token-env names, user:password@ in the address, or ?token=… behind it."
            )
        if 300 <= status < 400:
            target = self.address.hide(headers.get("Location", "another address"))
            raise ServerError(
                f"{self.url}{path} leads on to {target}; give the server's address as it is there."
            )
        return status, body

    async def _asked_again(
        self, method: str, path: str, passing: frozenset[int], **options: Any
    ) -> tuple[int, bytes]:
        """`call`, again after a pause where the status is one that passes, for as long as `patience`."""
        started, pause = time.monotonic(), 0.5
        while True:
            status, body = await self.call(method, path, **options)
            if status not in passing or time.monotonic() - started > self.patience:
                return status, body
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)

    async def json(self, method: str, path: str, **options: Any) -> Any:
        """One request's JSON. Raises ServerError on another status than 200, and on what is no JSON."""
        status, body = await self.call(method, path, **options)
        if status != 200:
            raise ServerError(f"{self.url}{path} answered HTTP {status}: {self._said(body)}.")
        # ComfyUI writes numbers as Python does, NaN too, where a prompt or an output has them
        return parse_json(body, f"{self.url}{path}", finite=False) if body else {}

    def _said(self, body: bytes) -> str:
        return self.address.hide(body[:300].decode("utf-8", "replace").strip()) or "nothing"

    async def upload(self, path: str | Path) -> str:
        """Upload an image into the server's input folder; returns the name it has there."""
        path = Path(path)
        if not path.is_file():
            raise HYWUError(f"{path}: there is no such image to upload.")
        # names travel as they are: quoted, an accent counts three and a blank becomes %20
        form = self.http.FormData(quote_fields=False)
        name = path.name.encode("utf-8", "replace").decode("utf-8")
        name = "".join("_" if c in FORBIDDEN or not c.isprintable() else c for c in name)
        form.add_field("image", path.read_bytes(), filename=name)
        answer = await self.json("POST", "/upload/image", data=form)
        if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
            raise ServerError(
                f"{self.url}/upload/image doesn't say the name of the uploaded image."
            )
        return self._place(answer, answer["name"])

    async def upload_temporary(self, name: str, data: bytes) -> str:
        """Upload an image into the server's temporary folder, over one of this name.

        The server empties that folder when it starts and ends, see also `empty`. Returns what LoadImage calls it.
        Raises Busy where the server may take it later.
        """
        form = self.http.FormData(quote_fields=False)
        form.add_field("image", data, filename=name)
        form.add_field("type", "temp")
        form.add_field("overwrite", "true")
        status, body = await self.call("POST", "/upload/image", data=form)
        if status != 200:
            kind = Busy if status in PASSING else ServerError
            raise kind(f"{self.url} takes no upload (HTTP {status}: {self._said(body)}).")
        answer = parse_json(body, f"{self.url}/upload/image", dict, finite=False)
        return f"{self._place(answer, name)} [temp]"

    def _place(self, answer: dict[str, Any], name: str) -> str:
        """What LoadImage calls an upload by the server's answer."""
        said, folder = answer.get("name") or name, answer.get("subfolder") or ""
        if not isinstance(said, str) or not isinstance(folder, str):
            raise ServerError(
                f"{self.url}/upload/image doesn't say the name of the uploaded image."
            )
        return f"{folder}/{said}" if folder else said

    async def empty(self, name: str) -> None:
        """Take the bytes of a temporary upload, as ComfyUI can't delete one; no failure of it counts."""
        with contextlib.suppress(HYWUError, asyncio.TimeoutError):
            await asyncio.wait_for(self.upload_temporary(name, b""), 15)

    async def declared(self, kind: str) -> dict[str, Any]:
        """Input -> its declaration ``[type, options]`` of a class of nodes; empty where it isn't said."""
        try:
            found = await self.json("GET", f"/object_info/{kind}")
            inputs = found[kind]["input"]
            return {**(inputs.get("required") or {}), **(inputs.get("optional") or {})}
        except (Denied, ServerGone):
            raise
        except (HYWUError, KeyError, TypeError, AttributeError):
            return {}

    async def queue(self, graph: dict[str, Any], prompt: str | None = None) -> str:
        """Queue an API-format graph; returns the prompt's id. Raises Refused, nothing stays queued.

        prompt: the id it shall have.
        """
        prompt = prompt or new_id()
        body = {"prompt": graph, "client_id": self.id, "prompt_id": prompt}
        status, raw = await self._asked_again("POST", "/prompt", BUSY, json=body)
        try:
            answer = parse_json(raw, "the answer", finite=False)
        except HYWUError:
            answer = {"error": self._said(raw)}
        if status in (404, 405):
            raise ServerGone(
                f"No ComfyUI answers at {self.url} (HTTP {status} for /prompt); give the address at "
                "which its page opens."
            )
        if status in BUSY:
            raise Busy(f"{self.url} takes no prompts now (HTTP {status}: {self._said(raw)}).")
        if status != 200:
            raise Refused(f"The server refused the workflow: {self._refusal(answer)}.")
        if not isinstance(answer, dict) or not isinstance(answer.get("prompt_id"), str):
            raise ServerGone(
                f"What answers at {self.url} is no ComfyUI: {self._said(raw)}; check the address."
            )
        if answer.get("node_errors"):
            # The valid outputs were queued without this branch: half a result is none.
            await self.interrupt(answer["prompt_id"])
            raise Refused(f"A part of the workflow is not valid: {self._refusal(answer)}.")
        return answer["prompt_id"]

    def _refusal(self, answer: Any) -> str:
        return self.address.hide(describe_refusal(answer)).rstrip(".")

    async def interrupt(self, prompt: str) -> None:
        """Take a prompt out of the queue, or stop it where it runs."""
        await self.call("POST", "/queue", json={"delete": [prompt]})
        await self.call("POST", "/interrupt", json={"prompt_id": prompt})

    async def place(self, prompt: str) -> str:
        """Where a prompt is in the queue: "running", "waiting", or "" for nowhere."""
        lists = await self.json("GET", "/queue")
        for name, state in (("queue_running", "running"), ("queue_pending", "waiting")):
            rows = lists.get(name) if isinstance(lists, dict) else None
            for row in rows if isinstance(rows, list) else ():
                if isinstance(row, (list, tuple)) and prompt in row[1:2]:
                    return state
        return ""

    async def knows(self, prompt: str) -> bool:
        """Whether the server has a prompt, in whatever state. Raises ServerError where it doesn't say."""
        # in this order: a prompt goes from the queue to the records, never back
        return bool(await self.place(prompt)) or bool(await self.history(prompt))

    async def withdraw(self, prompt: str) -> bool:
        """Take a prompt that still waits out of the queue; whether it is out, and wasn't run."""
        await self.call("POST", "/queue", json={"delete": [prompt]})
        return not await self.knows(prompt)

    async def free(self) -> None:
        """Unload the server's models and drop its caches."""
        await self.call("POST", "/free", json={"unload_models": True, "free_memory": True})

    async def history(self, prompt: str) -> dict[str, Any]:
        """The server's record of a finished prompt: `outputs`, `status`; empty while there is none."""
        found = await self.json("GET", f"/history/{prompt}")
        record = found.get(prompt) if isinstance(found, dict) else None
        return record if isinstance(record, dict) else {}

    async def fetch(self, item: dict[str, str]) -> bytes:
        """The bytes of one output: `{"filename", "subfolder", "type"}` as history gives it."""
        names = ("filename", "subfolder", "type")
        params = {name: str(item.get(name) or "") for name in names}
        status, body = await self._asked_again("GET", "/view", PASSING, params=params)
        if status != 200:
            raise ServerError(f"The output {item.get('filename')} can't be fetched: HTTP {status}.")
        return body

    # -- a prompt from queue to end ------------------------------------------------------------------

    async def run(
        self,
        graph: dict[str, Any],
        progress: Progress | None = None,
        events: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Queue a graph, follow it to its end; returns its history record.

        events: called with the type and data of what the websocket says of this prompt, as long as it does.

        Cancelling (Ctrl-C) interrupts the prompt on the server. Raises Refused, NodeFailed, Interrupted,
        TimedOut, Removed, Cleared, Restarted, ServerGone, Denied.
        """
        follower = Follower(self, new_id(), progress, events)
        async with follower.listening():
            try:
                return await asyncio.wait_for(self._queue_and_follow(graph, follower), self.timeout)
            except asyncio.TimeoutError as error:
                await self.take_back(follower.prompt)
                raise TimedOut(
                    f"The prompt took longer than {self.timeout:g} s and was interrupted: "
                    "give it more with --timeout."
                ) from error
            except asyncio.CancelledError:
                await self.take_back(follower.prompt)
                raise

    async def _queue_and_follow(self, graph: dict[str, Any], follower: Follower) -> dict[str, Any]:
        await self.enter(graph, follower)
        return await follower.end()

    async def enter(self, graph: dict[str, Any], follower: Follower) -> None:
        """Queue a graph under a follower's id. Raises Refused, ServerGone."""
        try:
            follower.prompt = await self.queue(graph, follower.prompt)
        except ServerGone:
            # the answer may have got lost behind a prompt that was taken
            if not await follower.known():
                raise

    async def take_back(self, prompt: str) -> None:
        """`interrupt`, for as long as a server may take that doesn't answer; no failure of it counts."""
        with contextlib.suppress(ServerError, asyncio.TimeoutError):
            await asyncio.wait_for(self.interrupt(prompt), 15)


def outputs(record: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(node id, output name, item) of every output in a history record."""
    nodes = record.get("outputs")
    for node, found in nodes.items() if isinstance(nodes, dict) else ():
        for name, items in found.items() if isinstance(found, dict) else ():
            if isinstance(items, list):
                yield from ((node, name, item) for item in items)


def run_sync(
    url: str, graph: dict[str, Any], *, timeout: float | None = None, token: str | None = None
) -> tuple[dict, float]:
    """Run one graph and return its history record and the seconds it took."""

    async def once() -> dict[str, Any]:
        async with Client(url, timeout=timeout, token=token) as client:
            return await client.run(graph)

    started = time.monotonic()
    return asyncio.run(once()), time.monotonic() - started
