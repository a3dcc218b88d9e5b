"""Run many images through an API-format workflow, on one ComfyUI server or several at once.

  hywu comfy batch photos --workflow workflows/api/edit_bundled.json --instruction "make it vintage" \\
      --server http://gpu1:8188 --server http://gpu2:8188 --out results
  hywu comfy batch --items items.jsonl --workflow workflow.json --out results

Rows of --items: {"source": "a.png", "instruction": "…", "name": "…", "set": {"Sample.seed": 7}}, all but
source optional, paths counting from the file. Results are named after their source; results.jsonl has a line for each.
The same command goes on after a kill, and makes what failed once more; failures.jsonl says why.

exit codes: 0 done, 1 a file or argument is wrong, 2 wrong usage, 3 no server for --give-up seconds, 5 some
images failed, 130 Ctrl-C or SIGTERM (the prompts are taken back from the servers).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from pathlib import Path

from tqdm import tqdm

from ..errors import HYWUError
from ..headless.batch import Batch, items_of, read_items
from ..headless.client import ServerError
from ..headless.graph import image_node, instruction_input, locate, read_graph, set_input
from ..headless.pool import Pool
from ..headless.saving import check_folder
from .comfy import TOKEN
from .console import say


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hywu comfy batch`."""
    parser.add_argument("inputs", nargs="*", type=Path, help="images, and folders of images")
    parser.add_argument("--items", type=Path, help="a .jsonl file in place of INPUTS")
    parser.add_argument("--workflow", type=Path, required=True, help="API-format JSON")
    parser.add_argument("--instruction", help="for all images that have none of their own")
    parser.add_argument(
        "--instruction-input", metavar="NODE.input",
        help="what takes it (default: the input of this name, or the text connected to it)",
    )  # fmt: skip
    parser.add_argument(
        "--image-node", metavar="NODE", help="what loads the image (default: the only LoadImage)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.input=value", help="for all images"
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder, or one begun before")
    parser.add_argument(
        "--server", action="append", help="may be repeated (default: http://127.0.0.1:8188)"
    )
    parser.add_argument(
        "--token-env", default=TOKEN, metavar="NAME",
        help="environment variable with a bearer token for all servers (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ahead", type=int, default=1, metavar="N",
        help="prompts that wait on each server behind the running one (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--timeout", type=float, help="seconds that a prompt may run")
    parser.add_argument("--tries", type=int, default=2, help="of an image (%(default)s)")
    parser.add_argument(
        "--give-up", type=float, default=600, help="seconds without any server (%(default)s)"
    )
    parser.add_argument(
        "--shard", default="1/1", metavar="i/n", help="only the i-th of n parts of the images"
    )


def run(args: argparse.Namespace) -> int:
    """Run what is missing; returns the exit code documented above."""
    graph = read_graph(args.workflow)
    for assignment in args.set:
        set_input(graph, assignment)
    if bool(args.items) == bool(args.inputs):
        raise HYWUError("Name the images, or --items FILE with them: one of the two.")
    items = (
        read_items(args.items, args.instruction)
        if args.items
        else items_of(args.inputs, args.instruction)
    )
    image = image_node(graph, f"{args.image_node}=" if args.image_node else "")[0], "image"
    place = None
    if args.instruction_input:
        place = locate(graph, args.instruction_input)
    elif any(item.instruction for item in items):
        place = instruction_input(graph)
    check_folder(args.out)
    batch = Batch(args.out, items, graph, image, place, _shard(args.shard))
    token = os.environ.get(args.token_env, "").strip() or None
    servers = args.server or ["http://127.0.0.1:8188"]
    options = {"ahead": args.ahead, "timeout": args.timeout, "give_up": args.give_up}
    try:
        done = asyncio.run(_run(batch, Pool(servers, token=token, tries=args.tries, **options)))
    except ServerError as error:
        sys.stderr.write(f"hywu comfy batch: {error} The same command goes on.\n")
        return 3
    say(f"{args.out}: {len(batch.items)} images, " + done)
    if batch.failed:
        say(f"{len(batch.failed)} failed, see {batch.failures}; the same command tries them again")
    return 5 if batch.failed else 0


async def _run(batch: Batch, pool: Pool) -> str:
    """Run with a progress bar; what each server did."""
    with tqdm(total=len(batch.items), unit="image") as bar:

        def show(done: int, failed: int) -> None:
            bar.n = done
            bar.set_postfix_str(f"servers {pool.describe()}, failed {failed}")

        await batch.run(pool, show)
    return ", ".join(f"{url}: {count}" for url, count in pool.done().items())


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= of:
        raise HYWUError(f"--shard {text}: must be i/n, for instance 1/4 to 4/4.")
    return part, of
