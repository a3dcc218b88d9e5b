"""Run an API-format workflow on a ComfyUI server and download what it makes.

  hywu comfy run workflow.json --server http://127.0.0.1:8188 --image photo.jpg \\
      --set KSampler.seed=7 --out results

A server behind a login: user:password@ or ?token=… in the address, or a bearer token in the environment
variable that --token-env names.

exit codes: 0 done, 1 a file or argument is wrong, 2 wrong usage, 3 server unreachable or gone,
4 the server refused the workflow, 5 a node failed, 6 interrupted on the server, 7 timeout,
8 removed from the server's queue, 9 the server's record of it was cleared, 10 the server was restarted,
130 Ctrl-C or SIGTERM (the prompt is interrupted on the server).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ..headless.client import Client, ServerError, outputs
from ..headless.graph import Graph, find_input, image_node, read_graph, set_input
from ..headless.saving import check_folder, save_output
from .console import say

#: Environment variable with the bearer token unless another is named.
TOKEN = "COMFY_TOKEN"


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hywu comfy`."""
    parser.add_argument("action", choices=["run"], help="run a workflow")
    parser.add_argument("workflow", type=Path, help="API-format JSON (Workflow > Export (API))")
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="default: %(default)s")
    parser.add_argument(
        "--token-env", default=TOKEN, metavar="NAME",
        help="environment variable with a bearer token, where the server wants one (%(default)s)",
    )  # fmt: skip
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
        find_input(graph, assignment)
    images = [image_node(graph, argument) for argument in args.image]
    check_folder(args.out)
    try:
        asyncio.run(_run(args, graph, images))
    except ServerError as error:
        sys.stderr.write(f"hywu comfy: {error}\n")
        return error.exit_code
    return 0


async def _run(args: argparse.Namespace, graph: Graph, images: list[tuple[str, str]]) -> None:
    token = os.environ.get(args.token_env, "").strip() or None
    async with Client(args.server, token=token, timeout=args.timeout) as client:
        for assignment in args.set:
            kind = graph[find_input(graph, assignment)[0]]["class_type"]
            set_input(graph, assignment, await client.declared(kind))
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
            await save_output(client, args.out, node, name, number, item)
            for number, (node, name, item) in enumerate(outputs(record))
        ]
        paths = [path for path in written if path is not None]
        for path in paths:
            say(str(path))
        say(f"{len(paths)} outputs in {seconds:.1f} s")
