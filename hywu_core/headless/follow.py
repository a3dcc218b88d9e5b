"""Following one prompt to its end: asking the server where it is, with the websocket as a hint."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from ..errors import HYWUError
from ..files import parse_json
from .trouble import (
    Cleared,
    Denied,
    Removed,
    Restarted,
    ServerError,
    ServerGone,
    TimedOut,
    check_record,
    failure,
)

if TYPE_CHECKING:
    from .client import Client

#: Seconds between two looks while the websocket is open, and while it is not.
WITH_SOCKET, WITHOUT_SOCKET = 2.0, 0.5
#: Seconds that a request may take, and that the websocket may take to open, before a prompt is queued.
ANSWER, OPENING = 120.0, 5.0
#: Looks in a row that find a prompt nowhere before it counts as lost: between running and its record a
#: prompt is in neither list for a moment.
NOWHERE = 4


class Follower:
    """One prompt on one server. `prompt` is its id.

    limit: seconds that it may run, once it has begun.
    """

    def __init__(
        self,
        client: Client,
        prompt: str,
        progress: Callable[[str | None, int, int], None] | None = None,
        events: Callable[[str, dict[str, Any]], None] | None = None,
        limit: float | None = None,
    ) -> None:
        self.client, self.prompt, self.progress, self.events = client, prompt, progress, events
        self.limit = limit
        #: When it was first seen running, or ended; None before.
        self.began: float | None = None
        self._look = asyncio.Event()
        self._open, self._tried = False, asyncio.Event()
        self._dropped = self._unanswered = False
        #: What is known of it: "" nothing, "waiting", "running", "done".
        self._seen = ""
        self._failure: ServerError | None = None

    def look(self) -> None:
        """Ask the server now, not after the usual pause."""
        self._look.set()

    # -- hints ------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Listen to the websocket within the block, however often it breaks off."""
        task = asyncio.create_task(self._listen())
        try:
            # events of a prompt that was queued before are not sent again
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._tried.wait(), OPENING)
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _listen(self) -> None:
        client, pause = self.client, 0.5
        params = {**client.address.query, "clientId": client.id}
        while True:
            with contextlib.suppress(client.http.ClientError, asyncio.TimeoutError, OSError):
                async with client.session.ws_connect(
                    f"{client.address.socket}/ws", params=params, max_msg_size=0, heartbeat=30
                ) as socket:
                    self._open, pause = True, 0.5
                    self._tried.set()
                    async for message in socket:
                        if message.type is client.http.WSMsgType.TEXT:  # others are previews
                            self._hint(message.data)
                self._dropped = True
            self._open = False
            self._tried.set()
            self._look.set()
            await asyncio.sleep(pause)
            pause = min(2 * pause, 10.0)

    def _hint(self, text: str) -> None:
        try:
            event = parse_json(text, "an event", dict, finite=False)
            data = event.get("data") or {}
            if not isinstance(data, dict) or data.get("prompt_id") != self.prompt:
                return
            kind = str(event.get("type"))
            if self.events:
                self.events(kind, data)
            if kind == "progress" and self.progress:
                self.progress(data.get("node"), int(data["value"]), int(data["max"]))
        except (HYWUError, KeyError, TypeError, ValueError):
            return  # a hint that can't be read is none
        self._is("done" if kind == "execution_success" else "running")
        self._failure = self._failure or failure(kind, data)
        if self._failure or self._seen == "done":
            self._look.set()

    def _is(self, state: str) -> None:
        self._seen = state if self._seen != "done" else "done"
        if state != "waiting" and self.began is None:
            self.began = time.monotonic()

    # -- the truth ----------------------------------------------------------------------------------

    async def end(self) -> dict[str, Any]:
        """Wait for the end; returns the history record. Raises ServerError as `Client.run` says."""
        nowhere, answered = 0, time.monotonic()
        while True:
            try:
                if record := await self._ask(self.client.history(self.prompt)):
                    check_record(record)
                    return record
                nowhere = 0 if await self._queued() else nowhere + 1
                answered = time.monotonic()
            except (Denied, asyncio.CancelledError):
                raise
            except _NoAnswer as error:
                self._unanswered = True
                if time.monotonic() - answered > self.client.patience:
                    raise error.trouble from error
            if self._failure:
                raise self._failure
            if nowhere >= NOWHERE:
                raise await self._lost()
            if self.limit and self.began and time.monotonic() - self.began > self.limit:
                raise TimedOut(f"The prompt ran for more than {self.limit:g} s.")
            await self._pause(0.25 if nowhere else None)

    async def known(self) -> bool:
        """Whether the server has the prompt, in whatever state; False where it doesn't answer."""
        try:
            record = await self._ask(self.client.history(self.prompt))
            return bool(record) or await self._queued()
        except (_NoAnswer, Denied):
            return False

    async def _queued(self) -> bool:
        if state := await self._ask(self.client.place(self.prompt)):
            self._is(state)
        return bool(state)

    async def _ask(self, request: Any) -> Any:
        """A request's answer. Raises _NoAnswer where another try may help, Denied as it comes."""
        try:
            return await asyncio.wait_for(request, ANSWER)
        except asyncio.TimeoutError as error:
            url = self.client.url
            raise _NoAnswer(ServerGone(f"The server {url} doesn't answer any more.")) from error
        except Denied:
            raise
        except HYWUError as error:
            # a server that starts anew, and proxies before it, answer anything for a while
            gone = error if isinstance(error, ServerGone) else ServerGone(str(error))
            raise _NoAnswer(gone) from error

    async def _pause(self, seconds: float | None) -> None:
        usual = WITH_SOCKET if self._open else WITHOUT_SOCKET
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._look.wait(), usual if seconds is None else seconds)
        self._look.clear()

    async def _lost(self) -> ServerError:
        """Why the server knows nothing of the prompt any more."""
        url = self.client.url
        if self._unanswered or (self._dropped and not await self._remembers()):
            return Restarted(
                f"The server {url} was restarted meanwhile and knows nothing of the prompt; run it again."
            )
        if self._seen in ("running", "done"):
            return Cleared(
                f"The prompt ran, but the record of it was cleared on {url} before it could be fetched; "
                "its files may lie in the server's output folder."
            )
        return Removed(f"The prompt was removed from the queue of {url}; nothing was made.")

    async def _remembers(self) -> bool:
        """Whether the server has records of any prompt: one that started anew has none."""
        try:
            return bool(
                await self._ask(self.client.json("GET", "/history", params={"max_items": "1"}))
            )
        except (_NoAnswer, Denied):
            return False


class _NoAnswer(Exception):
    """Nothing came, or nothing that makes sense; `trouble` is what it is if it stays so."""

    def __init__(self, trouble: ServerError) -> None:
        super().__init__(str(trouble))
        self.trouble = trouble
