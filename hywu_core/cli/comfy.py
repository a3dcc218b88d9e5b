"""Run an API-format workflow on a ComfyUI server and download what it makes.

  hywu comfy run workflow.json --server http://127.0.0.1:8188 --image photo.jpg \\
      --set KSampler.seed=7 --out results

exit codes: 0 done, 1 a file or argument is wrong, 2 wrong usage, 3 server unreachable or gone,
4 the server refused the workflow, 5 a node failed, 6 interrupted on the server, 7 timeout,
130 Ctrl-C (the prompt is interrupted on the server).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..headless.client import Client, ServerError, outputs
from ..headless.graph import image_node, read_graph, set_input
from .console import say


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hywu comfy`."""
    parser.add_argument("action", choices=["run"], help="run a workflow")
    parser.add_argument("workflow", type=Path, help="API-format JSON (Workflow > Export (API))")
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="default: %(default)s")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.input=value",
        help="set an input; NODE is an id, a title or a class; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--image", action="append", default=[], metavar="[NODE=]PATH",
        help="upload an image and load it in the LoadImage node",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("output"), help="default: %(default)s")
    parser.add_argument("--timeout", type=float, help="seconds the prompt may take")


def run(args: argparse.Namespace) -> int:
    """Run the workflow; returns the exit code documented above."""
    graph = read_graph(args.workflow)
    for assignment in args.set:
        set_input(graph, assignment)
    images = [image_node(graph, argument) for argument in args.image]
    try:
        asyncio.run(_run(args, graph, images))
    except ServerError as error:
        sys.stderr.write(f"hywu comfy: {error}\n")
        return error.exit_code
    return 0


async def _run(args: argparse.Namespace, graph: dict, images: list[tuple[str, str]]) -> None:
    async with Client(args.server, timeout=args.timeout) as client:
        for node, path in images:
            graph[node]["inputs"]["image"] = await client.upload(path)
        started = time.monotonic()
        with tqdm(total=1, desc="queued", disable=not sys.stderr.isatty()) as bar:

            def show(node: str | None, done: int, total: int) -> None:
                bar.set_description(graph.get(str(node), {}).get("class_type", "running"))
                bar.total, bar.n = total, done
                bar.refresh()

            record = await client.run(graph, show)
        seconds = time.monotonic() - started
        written = [
            await _save(client, args.out, node, name, number, item)
            for number, (node, name, item) in enumerate(outputs(record))
        ]
        paths = [path for path in written if path is not None]
        for path in paths:
            say(str(path))
        say(f"{len(paths)} outputs in {seconds:.1f} s")


def safe_name(name: str) -> str:
    """A file name without folders, drive letters or characters some system refuses."""
    last = re.split(r"[/\\]", name)[-1]
    return re.sub(r"[^\w.() -]", "_", last).lstrip(".") or "unnamed"


def free_path(path: Path) -> Path:
    """`path`, or the first `stem-2`, `stem-3`, … that nothing has yet."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


async def _save(
    client: Client, out: Path, node: str, name: str, number: int, item: Any
) -> Path | None:
    if isinstance(item, dict) and "filename" in item:
        content, file = await client.fetch(item), safe_name(item["filename"])
    elif isinstance(item, str):
        try:
            json.loads(item)
            suffix = "json"
        except ValueError:
            suffix = "txt"
        content, file = item.encode(), safe_name(f"{node}-{name}-{number}.{suffix}")
    else:
        return None  # flags such as `animated`
    out.mkdir(parents=True, exist_ok=True)
    path = free_path(out / file)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
    return path
