"""Many images through one workflow, over several servers; after a kill it goes on, nothing is done twice.

In the folder: the files of each result, named after its source, `results.jsonl` with a line once they are on the
disk, `failures.jsonl`, and `.batch/SHARD/prompts.jsonl` with a line before each prompt is queued, by which a
later run finds what servers still have.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import fingerprint
from ..errors import HYWUError
from ..files import (
    append_line,
    atomic_path,
    check_fields,
    folder_lock,
    read_json_lines,
    same_name,
    write_text,
)
from ..images import SUFFIXES
from .client import Client, ServerError, outputs
from .graph import Graph, locate
from .pool import Pool
from .saving import safe_name
from .work import Finished, Work

#: Prompts that a run which was killed may have left unfinished, at most.
IN_FLIGHT = 64


@dataclass(frozen=True)
class Item:
    """An image and what becomes of it: the instruction, and values of further inputs ("NODE.input")."""

    source: Path
    instruction: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


def items_of(inputs: Iterable[Path], instruction: str | None) -> list[Item]:
    """An item for each image: of files, and of all there are below folders."""
    found: list[Path] = []
    for path in inputs:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        found += inside if path.is_dir() else [path]
    return named([Item(path, instruction) for path in found])


def read_items(path: Path, instruction: str | None = None) -> list[Item]:
    """Rows `{"source", "instruction", "name", "set": {"NODE.input": value}}`; all but source may be left out.

    Sources count from the file's folder. Raises HYWUError naming the line.
    """
    items = []
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        if isinstance(row, HYWUError):
            raise row
        if not isinstance(row, dict) or "source" not in row:
            raise HYWUError(f"{where}: is no object with a 'source'.")
        check_fields(row, {"source": str, "instruction": str, "name": str, "set": dict}, where)
        text = row.get("instruction") or instruction
        source = path.parent / row["source"]
        items.append(Item(source, text, row.get("set") or {}, row.get("name") or ""))
    return named(items)


def named(items: Sequence[Item]) -> list[Item]:
    """The items, each under a name of its own: that of its source, with a number where it is taken.

    Raises HYWUError where there are none, or sources are missing.
    """
    missing = [str(item.source) for item in items if not item.source.is_file()]
    if missing or not items:
        listed = ", ".join(missing[:5]) or "none was named"
        raise HYWUError(f"There are no such images: {listed} ({len(missing)} of {len(items)}).")
    taken: set[str] = {"results", "failures"}
    result = []
    for item in items:
        stem = name = safe_name(item.name or item.source.stem)
        number = 1
        while same_name(name) in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(same_name(name))
        result.append(Item(item.source, item.instruction, item.values, name))
    return result


class Batch:
    """Items through a graph into a folder. `todo`: without a result; `failed`: name -> why, of this run.

    image, instruction: (node, input) that takes them.
    shard: (i, n), this process's part of all items, i from 1.
    Raises HYWUError on a folder of something else, and on values for inputs that aren't there.
    """

    def __init__(
        self, folder: Path, items: Sequence[Item], graph: Graph, image: tuple[str, str],
        instruction: tuple[str, str] | None, shard: tuple[int, int] = (1, 1),
    ) -> None:  # fmt: skip
        self.folder, self.graph, self.image, self.instruction = folder, graph, image, instruction
        for item in items:
            for name in item.values:
                locate(graph, name)
        part = "" if shard == (1, 1) else f"-{shard[0]}-of-{shard[1]}"
        self.state = folder / ".batch" / (part[1:] or "all")
        self._check_folder(shard)
        self.results = folder / f"results{part}.jsonl"
        self.failures = folder / f"failures{part}.jsonl"
        self.items = list(items)[shard[0] - 1 :: shard[1]]
        self._graph = fingerprint.of_json(graph, 32, sort_keys=True)
        self.failed: dict[str, str] = {}
        self.todo: list[Item] = []

    def _check_folder(self, shard: tuple[int, int]) -> None:
        there = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
        if there and ".batch" not in there:
            raise HYWUError(f"--out {self.folder}: holds other files ({there[0]}); name a new one.")
        for other in self.state.parent.glob("*"):
            if other.name.rpartition("-of-")[2] != self.state.name.rpartition("-of-")[2]:
                raise HYWUError(
                    f"--out {self.folder}: was begun as the part {other.name}, this is {self.state.name}; go on "
                    "with the same --shard, or name another folder."
                )

    def _key(self, item: Item) -> str:
        """What decides a result."""
        about = [self._graph, item.instruction, dict(item.values), item.name]
        return fingerprint.of_json([fingerprint.sampled([item.source]), *about], 32)

    async def run(self, pool: Pool, progress: Callable[[int, int], None]) -> None:
        """Make what is missing.

        progress: called with (results there, failed).
        Raises ServerError where no server is left; what fails on its own stands in `failed`.
        """
        with folder_lock(self.state):
            found, left = self._begin(set(pool.urls))
            await pool.empty(left)
            done = len(self.items) - len(self.todo)
            waiting, running = iter(self.todo), {}
            progress(done, 0)
            try:
                async with pool:
                    while True:
                        while len(running) < 2 * pool.capacity and (item := next(waiting, None)):
                            work = self._work(item, found.get(item.name))
                            running[asyncio.create_task(pool.run(work))] = item
                        if not running:
                            break
                        ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                        for task in ended:
                            done += self._end(running.pop(task), task, pool)
                        progress(done, len(self.failed))
            finally:
                await asyncio.gather(*running, return_exceptions=True)
                self._write_failures()

    def _begin(
        self, servers: set[str]
    ) -> tuple[dict[str, tuple[str, str, str]], list[tuple[str, str]]]:
        """Find what is to do; name -> where a run that was killed had queued it; uploads it may have left."""
        keys = {item.name: self._key(item) for item in self.items}
        done = set()
        for row in _rows(self.results):
            if keys.get(row["name"], row["key"]) != row["key"]:
                raise HYWUError(
                    f"{self.results}: '{row['name']}' was made of another image, instruction or workflow; name "
                    "another --out folder."
                )
            done.add(row["name"])
        self.todo = [item for item in self.items if item.name not in done]
        self._keys = keys
        prompts = [r for r in _rows(self.state / "prompts.jsonl") if r["server"] in servers]
        found = {
            row["name"]: (row["server"], row["prompt"], row["upload"])
            for row in prompts
            if row["name"] not in done and keys.get(row["name"]) == row["key"]
        }
        kept = {upload for _, _, upload in found.values()}
        last = [(r["server"], r["upload"]) for r in prompts[-IN_FLIGHT:] if r["upload"] not in kept]
        return found, last

    def _work(self, item: Item, found: tuple[str, str, str] | None) -> Work:
        graph = copy.deepcopy(self.graph)
        values = {locate(graph, name): value for name, value in item.values.items()}
        if item.instruction is not None and self.instruction:
            values[self.instruction] = item.instruction
        for (node, key), value in values.items():
            graph[node]["inputs"][key] = value

        def begun(server: str, prompt: str, upload: str) -> None:
            row = {"name": item.name, "key": self._keys[item.name], "server": server}
            _append(self.state / "prompts.jsonl", {**row, "prompt": prompt, "upload": upload})

        def read() -> tuple[bytes, str]:
            return item.source.read_bytes(), item.source.suffix.lower()

        async def collect(client: Client, record: dict[str, Any]) -> dict[str, Any]:
            return await self._collect(item, client, record)

        return Work(graph, self.image, read, collect, begun, found)

    async def _collect(self, item: Item, client: Client, record: dict[str, Any]) -> dict[str, Any]:
        """Save a prompt's files; their names, and its texts by "NODE.output"."""
        texts: dict[str, list[str]] = {}
        files = []
        for node, name, value in outputs(record):
            if isinstance(value, str):
                texts.setdefault(f"{node}.{name}", []).append(value)
            elif isinstance(value, dict) and isinstance(value.get("filename"), str):
                files.append(value)
        files = [file for file in files if file.get("type") == "output"] or files
        if not files and not texts:
            raise ServerError("The workflow gave no file and no text.")
        names = []
        for number, file in enumerate(files, 1):
            suffix = Path(safe_name(file["filename"])).suffix
            name = item.name + suffix if len(files) == 1 else f"{item.name}/{number}{suffix}"
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            content = await client.fetch(file)
            with atomic_path(self.folder / name, overwrite=True) as path:
                path.write_bytes(content)
            names.append(name)
        return {"files": names, "texts": texts}

    def _end(self, item: Item, task: asyncio.Task[Finished], pool: Pool) -> bool:
        """Note an item's end; whether it has a result."""
        try:
            end = task.result()
        except (HYWUError, OSError) as error:
            if pool.failed:
                raise pool.failed from error
            self.failed[item.name] = str(error)
            return False
        about = {"name": item.name, "source": str(item.source), "instruction": item.instruction}
        where = {"server": end.server, "prompt": end.prompt, "seconds": round(end.seconds, 2)}
        _append(self.results, about | end.result | where | {"key": self._keys[item.name]})
        return True

    def _write_failures(self) -> None:
        rows = [
            {"name": i.name, "source": str(i.source), "error": self.failed[i.name]}
            for i in self.todo
            if i.name in self.failed
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if lines or self.failures.exists():
            write_text(self.failures, lines)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, if it is there: a kill may have left half of one."""
    rows = [row for _, row in read_json_lines(path)] if path.exists() else []
    return [row for row in rows if isinstance(row, dict) and {"name", "key"} <= row.keys()]


def _append(path: Path, row: dict[str, Any]) -> None:
    append_line(path, json.dumps(row).encode(), durable=False)
