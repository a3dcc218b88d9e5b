"""A client of ComfyUI's HTTP and websocket API: upload, queue, follow, fetch, interrupt."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import HYWUError, need

#: (node id or None, steps done, steps in all), called as the server reports.
Progress = Callable[["str | None", int, int], None]


class ServerError(HYWUError):
    """What went wrong on or with the server; `exit_code` is what `hywu comfy run` returns."""

    exit_code = 1


class ServerGone(ServerError):
    """The server can't be reached, or went away."""

    exit_code = 3


class Refused(ServerError):
    """The server refused the workflow: validation, or a branch of it that it would drop."""

    exit_code = 4


class NodeFailed(ServerError):
    """A node raised an exception."""

    exit_code = 5


class Interrupted(ServerError):
    """Somebody interrupted the prompt on the server."""

    exit_code = 6


class TimedOut(ServerError):
    """The prompt took longer than allowed; it was interrupted."""

    exit_code = 7


def describe_refusal(answer: dict[str, Any]) -> str:
    """One sentence for ComfyUI's validation answer `{"error": …, "node_errors": …}`."""
    parts = []
    for node, found in (answer.get("node_errors") or {}).items():
        for error in found.get("errors", []):
            name = (error.get("extra_info") or {}).get("input_name")
            where = f"node {node} ({found.get('class_type')})" + (f", input {name}" if name else "")
            details = error.get("details") or ""
            parts.append(f"{where}: {error.get('message')}{f' ({details})' if details else ''}")
    if not parts:
        error = answer.get("error") or {}
        if isinstance(error, str):
            return error
        parts = [f"{error.get('message', 'no reason given')} {error.get('details') or ''}".strip()]
    return "; ".join(parts)


class Client:
    """`async with Client(url) as client:`, then `await client.run(graph)`.

    Every failure is a ServerError subclass with one readable sentence. Needs aiohttp.
    """

    def __init__(self, url: str, *, timeout: float | None = None) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.id = uuid.uuid4().hex
        self._http = need("aiohttp", "to talk to a ComfyUI server")
        self._session: Any = None

    async def __aenter__(self) -> Client:
        limits = self._http.ClientTimeout(total=None, sock_connect=15, sock_read=300)
        self._session = self._http.ClientSession(timeout=limits)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def _call(self, method: str, path: str, **options: Any) -> tuple[int, bytes]:
        try:
            async with self._session.request(method, self.url + path, **options) as answer:
                return answer.status, await answer.read()
        except (self._http.ClientError, asyncio.TimeoutError, OSError) as error:
            raise ServerGone(
                f"No ComfyUI answers at {self.url} ({error or type(error).__name__}): "
                "start it, or give its address with --server."
            ) from error

    async def _json(self, method: str, path: str, **options: Any) -> Any:
        status, body = await self._call(method, path, **options)
        if status != 200:
            text = body[:300].decode("utf-8", "replace")
            raise ServerError(f"{self.url}{path} answered HTTP {status}: {text or 'nothing'}.")
        return json.loads(body) if body else {}

    async def upload(self, path: str | Path) -> str:
        """Upload an image into the server's input folder; returns the name it has there."""
        path = Path(path)
        if not path.is_file():
            raise HYWUError(f"{path}: there is no such image to upload.")
        form = self._http.FormData()
        form.add_field("image", path.read_bytes(), filename=path.name)
        answer = await self._json("POST", "/upload/image", data=form)
        return "/".join(filter(None, (answer.get("subfolder"), answer["name"])))

    async def queue(self, graph: dict[str, Any]) -> str:
        """Queue an API-format graph; returns the prompt's id. Raises Refused, nothing stays queued."""
        body = {"prompt": graph, "client_id": self.id, "prompt_id": str(uuid.uuid4())}
        status, raw = await self._call("POST", "/prompt", json=body)
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = {"error": raw[:300].decode("utf-8", "replace")}
        if status != 200:
            raise Refused(f"The server refused the workflow: {describe_refusal(answer)}.")
        if answer.get("node_errors"):
            # The valid outputs were queued without this branch: half a result is none.
            await self.interrupt(answer["prompt_id"])
            raise Refused(f"A part of the workflow is not valid: {describe_refusal(answer)}.")
        return answer["prompt_id"]

    async def interrupt(self, prompt: str) -> None:
        """Take a prompt out of the queue, or stop it where it runs."""
        await self._call("POST", "/queue", json={"delete": [prompt]})
        await self._call("POST", "/interrupt", json={"prompt_id": prompt})

    async def free(self) -> None:
        """Unload the server's models and drop its caches."""
        await self._call("POST", "/free", json={"unload_models": True, "free_memory": True})

    async def history(self, prompt: str) -> dict[str, Any]:
        """The server's record of a finished prompt: `outputs`, `status`."""
        # the server announces the end a moment before it writes the record
        for _ in range(50):
            if record := (await self._json("GET", f"/history/{prompt}")).get(prompt):
                return record
            await asyncio.sleep(0.1)
        return {}

    async def fetch(self, item: dict[str, str]) -> bytes:
        """The bytes of one output: `{"filename", "subfolder", "type"}` as history gives it."""
        names = ("filename", "subfolder", "type")
        status, body = await self._call(
            "GET", "/view", params={name: item.get(name, "") for name in names}
        )
        if status != 200:
            raise ServerError(f"The output {item.get('filename')} can't be fetched: HTTP {status}.")
        return body

    async def run(self, graph: dict[str, Any], progress: Progress | None = None) -> dict[str, Any]:
        """Queue a graph, follow it to its end; returns its history record.

        Cancelling (Ctrl-C) interrupts the prompt on the server. Raises Refused, NodeFailed,
        Interrupted, TimedOut, ServerGone.
        """
        address = self.url.replace("http", "ws", 1) + f"/ws?clientId={self.id}"
        prompt = None
        try:
            async with self._session.ws_connect(address, max_msg_size=0, heartbeat=30) as socket:
                prompt = await self.queue(graph)
                try:
                    await asyncio.wait_for(self._follow(socket, prompt, progress), self.timeout)
                except asyncio.TimeoutError as error:
                    await self.interrupt(prompt)
                    raise TimedOut(
                        f"The prompt took longer than {self.timeout:g} s and was interrupted: "
                        "give it more with --timeout."
                    ) from error
        except asyncio.CancelledError:
            if prompt is not None:
                await self.interrupt(prompt)
            raise
        except (self._http.ClientError, OSError) as error:
            raise ServerGone(
                f"The server {self.url} can't be reached or went away ({error})."
            ) from error
        return await self.history(prompt)

    async def _follow(self, socket: Any, prompt: str, progress: Progress | None) -> None:
        async for message in socket:
            if message.type is not self._http.WSMsgType.TEXT:
                continue  # binary previews
            event = json.loads(message.data)
            data = event.get("data") or {}
            if data.get("prompt_id") != prompt:
                continue
            kind = event["type"]
            if kind == "progress" and progress:
                progress(data.get("node"), int(data["value"]), int(data["max"]))
            elif kind == "execution_error":
                reason = str(data.get("exception_message")).strip()
                raise NodeFailed(
                    f"Node {data.get('node_id')} ({data.get('node_type')}) failed with "
                    f"{str(data.get('exception_type')).rpartition('.')[2]}: {reason}"
                )
            elif kind == "execution_interrupted":
                raise Interrupted(f"The prompt was interrupted at node {data.get('node_id')}.")
            elif kind == "execution_success":
                return
        raise ServerGone(f"The server {self.url} closed the connection before the prompt ended.")


def outputs(record: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(node id, output name, item) of every output in a history record."""
    for node, found in record.get("outputs", {}).items():
        for name, items in found.items():
            if isinstance(items, list):
                yield from ((node, name, item) for item in items)


def run_sync(
    url: str, graph: dict[str, Any], *, timeout: float | None = None
) -> tuple[dict, float]:
    """Run one graph and return its history record and the seconds it took."""

    async def once() -> dict[str, Any]:
        async with Client(url, timeout=timeout) as client:
            return await client.run(graph)

    started = time.monotonic()
    return asyncio.run(once()), time.monotonic() - started
