"""A ComfyUI workflow as an editor for benchmarks, over the server's API."""

from __future__ import annotations

import asyncio
import copy
import io
import tempfile
import threading
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from PIL import Image

from ... import fingerprint
from ...headless.client import Client, ServerError, outputs
from ...headless.graph import find_node, locate, read_graph
from ...headless.pool import Pool
from ...headless.work import Work
from ...images import encode_image, load_image, write_image
from ..items import Item
from ..options import Kind, Option
from .base import ITEM_TIMEOUT, WORKERS, EditFailed


class ComfyEditor:
    """Runs an API-format workflow for each item.

    server: one address, or several with blanks between, which then share the items.
    image, instruction, seed: ``NODE.input`` that takes the uploaded image's name, the text and the seed (NODE
        by id, title or class; seed may be None).
    output: the node whose image counts, None where only one gives any.
    parallel: edits at once on each server.
    timeout: seconds per item.
    Raises HYWUError when the workflow lacks one of them.
    """

    def __init__(
        self,
        server: str,
        workflow: Path,
        image: str,
        instruction: str,
        seed: str | None = None,
        output: str | None = None,
        parallel: int = 1,
        timeout: float = 600.0,
    ) -> None:
        self.servers, self.timeout = server.split() or [server], timeout
        self.parallel = parallel * len(self.servers)
        self._pool: _Pool | None = None
        self._lock = threading.Lock()
        self._graph = read_graph(workflow)
        named = {"image": image, "instruction": instruction, "seed": seed}
        self._inputs = {role: locate(self._graph, name) for role, name in named.items() if name}
        self._output = None if output is None else find_node(self._graph, output)

    def describe(self) -> dict[str, Any]:
        """The workflow's hash and what is put where; the server's address changes nothing."""
        return {
            "kind": "comfy",
            "workflow": fingerprint.of_json(self._graph, 16, sort_keys=True),
            "inputs": {role: ".".join(place) for role, place in self._inputs.items()},
            "output": self._output,
        }

    def edit(self, source: Image.Image, item: Item, seed: int) -> Image.Image:
        """Upload, run, fetch. Raises EditFailed with the server's reason."""
        try:
            if len(self.servers) > 1:
                return self._shared(source, item, seed)
            return asyncio.run(self._edit(source, item, seed))
        except ServerError as error:
            raise EditFailed(str(error)) from error

    def close(self) -> None:
        """Take back what is on several servers."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
            self._pool = None

    def _shared(self, source: Image.Image, item: Item, seed: int) -> Image.Image:
        with self._lock:
            if self._pool is None:
                ahead = self.parallel // len(self.servers) - 1
                self._pool = _Pool(
                    Pool(self.servers, ahead=ahead, timeout=self.timeout, give_up=60)
                )
        values = {"image": "", "instruction": item.instruction, "seed": seed}

        async def collect(client: Client, record: dict[str, Any]) -> bytes:
            return await client.fetch(self._image(record))

        data = encode_image(source), ".png"
        work = Work(self._filled(values), self._inputs["image"], lambda: data, collect)
        return load_image(io.BytesIO(self._pool.run(work)))

    async def _edit(self, source: Image.Image, item: Item, seed: int) -> Image.Image:
        with tempfile.TemporaryDirectory(prefix="hywu_edit_") as folder:
            # A name of its own, since edits run at once and the server keeps one input folder
            path = Path(folder) / f"hywu_eval_{uuid.uuid4().hex}.png"
            write_image(source, path)
            async with Client(self.servers[0], timeout=self.timeout) as client:
                values = {"image": await client.upload(path), "instruction": item.instruction}
                record = await client.run(self._filled({**values, "seed": seed}))
                data = await client.fetch(self._image(record))
        return load_image(io.BytesIO(data))

    def _filled(self, values: dict[str, Any]) -> dict[str, Any]:
        graph = copy.deepcopy(self._graph)
        for role, (node, key) in self._inputs.items():
            graph[node]["inputs"][key] = values[role]
        return graph

    def _image(self, record: dict[str, Any]) -> dict[str, str]:
        found = [
            (node, value)
            for node, name, value in outputs(record)
            if name == "images" and self._output in (None, node)
        ]
        saved = [pair for pair in found if pair[1].get("type") == "output"] or found
        if not saved:
            raise EditFailed("the workflow gave no image")
        if len({node for node, _ in saved}) > 1:
            nodes = ", ".join(sorted({node for node, _ in saved}))
            raise EditFailed(f"the nodes {nodes} all give images; choose with --comfy-output")
        return saved[0][1]


class _Pool:
    """A pool whose loop runs in a thread, for callers in other threads."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.loop = pool, asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="hywu-pool", daemon=True)
        self.thread.start()
        self._do(pool.__aenter__())

    def _do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def run(self, work: Work) -> Any:
        return self._do(self.pool.run(work)).result

    def close(self) -> None:
        self._do(self.pool.__aexit__())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


def _make(
    server: str, workflow: str, comfy_image: str, comfy_instruction: str, comfy_seed: str | None,
    comfy_output: str | None, workers: int, item_timeout: float,
) -> ComfyEditor:  # fmt: skip
    places = {"image": comfy_image, "instruction": comfy_instruction, "seed": comfy_seed}
    options = {"output": comfy_output, "parallel": workers, "timeout": item_timeout}
    return ComfyEditor(server, Path(workflow), **places, **options)


KIND = Kind(
    "--editor",
    "comfy",
    "a workflow on a ComfyUI server",
    _make,
    (
        Option("server", "one, or several as 'URL URL' (%(default)s)", "http://127.0.0.1:8188"),
        Option("workflow", "the workflow in API format (JSON)", needed=""),
        Option("comfy_image", "takes the source's file name", metavar="NODE.INPUT", needed=""),
        Option("comfy_instruction", "takes the instruction", metavar="NODE.INPUT", needed=""),
        Option("comfy_seed", "takes the seed (optional)", metavar="NODE.INPUT"),
        Option("comfy_output", "whose image (default: the only one)", metavar="NODE"),
        WORKERS,
        ITEM_TIMEOUT,
    ),
)
