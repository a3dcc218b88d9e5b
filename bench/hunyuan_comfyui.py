"""HunyuanImage-3 inside ComfyUI servers: its dynamic VRAM against this project's streaming, with less and less memory.

    python3 dev.py bench hunyuan_comfyui --json FILE                     two layers of the real widths (10 GB, random)
    python3 dev.py bench hunyuan_comfyui --folder FOLDER --json FILE     a real folder, or a quantized one
    python3 dev.py bench hunyuan_comfyui --cpu --tiny --json FILE        the whole course on a CPU, for the tests

COMFYUI_PATH names the ComfyUI (0.33 or newer for dynamic VRAM). A server per way and per --reserve (gigabytes of
the card that ComfyUI must leave free): an image from text, twice; the first time loads the weights.

step_s    a later step, the median of the second image's
first_s   from the prompt to its first step: the prefix, and what is loaded again
word_s    a word of thought
dynamic   whether the server said that it uses dynamic VRAM
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import dev
from hywu_core.bases.hunyuan_image3 import tiny
from hywu_core.cli.console import say, table
from hywu_core.headless.client import Client

from .comfyui import node
from .hunyuan_base import WIDTHS
from .measure import write_json

#: ComfyUI's arguments of each way.
WAYS = {"dynamic": [], "own": ["--disable-dynamic-vram"]}
#: What the server's log says.
DYNAMIC = "DynamicVRAM support detected and enabled"
WORDS = 16


def write_folder(path: Path, layers: int | None) -> Path:
    """A base with random weights: of so many layers of the published widths, or the tiny one (None)."""
    if layers is None:
        return tiny.write_tiny(path) / "base"
    config = tiny._config

    def wide(*args: Any) -> dict[str, Any]:
        return config(*args) | WIDTHS | {"max_position_embeddings": 22800}

    longer = {**tiny._GENERATION, "max_length": 22800}
    sizes = {
        "LAYERS": layers,
        "HIDDEN": WIDTHS["hidden_size"],
        "WIDTH": WIDTHS["moe_intermediate_size"],
    }
    with mock.patch.multiple(tiny, _config=wide, _GENERATION=longer, **sizes):
        path.mkdir()
        tiny._write_base(path / "base", False)
    return path / "base"


def graph(folder: str, size: str, steps: int, seed: int) -> dict[str, dict]:
    """An image from text, without decoding it."""
    return {
        "base": node("HYWULoadHunyuanImage3", folder=folder, precision="auto"),
        "prompt": node(
            "HYWUHunyuanEditPrompt", hunyuan=["base", 2], instruction="a red hat", size=size, seed=1
        ),
        "sample": node(
            "KSampler", model=["base", 0], seed=seed, steps=steps, cfg=2.5, sampler_name="euler",
            scheduler="simple", positive=["prompt", 0], negative=["prompt", 1],
            latent_image=["prompt", 2], denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="bench"),
    }  # fmt: skip


def thought(folder: str, size: str, seed: int) -> dict[str, dict]:
    kept = graph(folder, size, 1, 1)["base"]
    think = node(
        "HYWUHunyuanThink", model=["base", 0], instruction="a red hat", size=size, seed=seed,
        task="think", max_tokens=WORDS, temperature=1.0,
    )  # fmt: skip
    return {"base": kept, "think": think, "show": node("PreviewAny", source=["think", 0])}


async def timed(client: Client, asked: dict[str, dict], name: str) -> dict[str, Any]:
    """When a node of a prompt began and told its progress, seconds from the prompt's start."""
    found: dict[str, Any] = {"progress": []}
    start = time.perf_counter()

    def event(kind: str, data: dict[str, Any]) -> None:
        now = time.perf_counter() - start
        if kind == "executing" and data.get("node") == name:
            found["began"] = now
        elif kind == "progress" and data.get("node") == name:
            found["progress"].append(now)

    await client.run(asked, events=event)
    return found


async def measure(url: str, folder: str, size: str, steps: int) -> dict[str, Any]:
    """Figures of one server."""
    async with Client(url) as client:
        await timed(client, graph(folder, size, 2, 1), "sample")
        run = await timed(client, graph(folder, size, steps, 2), "sample")
        spans = [b - a for a, b in itertools.pairwise(run["progress"])]
        await timed(client, thought(folder, size, 1), "think")
        words = (await timed(client, thought(folder, size, 2), "think"))["progress"]
        between = [b - a for a, b in itertools.pairwise(words)]
    return {
        "step_s": statistics.median(spans),
        "first_s": run["progress"][0],
        # a text may end with its first word
        "word_s": statistics.median(between) if between else None,
    }


def course(args: argparse.Namespace, base: Path) -> dict[str, Any]:
    """All servers in turn; the JSON is written anew after each."""
    host = dev.prepare_host()
    folder = args.folder or write_folder(base / "drawn", None if args.tiny else args.layers)
    models = base / "models" / "hunyuan_image_3"
    models.mkdir(parents=True)
    (models / "bench").symlink_to(folder.resolve(), target_is_directory=True)
    figures: dict[str, Any] = {"comfyui": host.version, "folder": folder.name, "measured": {}}
    ways = {"cpu": ["--cpu"]} if args.cpu else WAYS
    for (name, more), reserve in itertools.product(ways.items(), args.reserve):
        arguments = [*more, *(["--reserve-vram", str(reserve)] if reserve else [])]
        try:
            with dev.server_of(host, base, arguments=arguments) as server:
                found = asyncio.run(measure(server.url, "bench", args.size, args.steps))
                found["dynamic"] = DYNAMIC in server.log.read_text("utf-8", "replace")
        except Exception as error:  # what the others say stays
            found = {"failed": str(error).splitlines()[0]}
        figures["measured"][f"{name}/{reserve:g}"] = found
        write_json(args.json, figures)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="an official or quantized folder")
    parser.add_argument(
        "--layers", type=int, default=2, help="of the one that is drawn (default 2)"
    )
    parser.add_argument("--tiny", action="store_true", help="draw the tiny one")
    parser.add_argument("--cpu", action="store_true", help="servers on the CPU")
    parser.add_argument("--reserve", type=float, nargs="+", default=[0.0], metavar="GB")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as base:
        figures = course(args, Path(base))
    rows = []
    for name, found in figures["measured"].items():
        shown = [found.get(key) for key in ("step_s", "first_s", "word_s")]
        values = ("" if value is None else f"{value:.3g}" for value in shown)
        rows.append((name, *values, str(found.get("dynamic", found.get("failed")))))
    table(rows, ("way/GB left free", "step s", "first s", "word s", "dynamic"))
    say(f"written: {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
