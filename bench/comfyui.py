"""The bundled edit inside a real ComfyUI server: where the time goes, LoRA exchange, memory of a long run.

split     warm edits through the API, every prompt another instruction: seconds per node, and the share of
          encode + generate + apply in the whole
exchange  another LoRA with every prompt, from a file: prompt to first sampling step, unmerged and merged
          Apply against the stock LoRA loader, in turn on one server
soak      many prompts with changing instructions: resident memory of the server and the LoRA cache

python3 dev.py bench comfyui [--prompts 200] [--size 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

import dev
from hywu_core.headless.client import Client
from hywu_core.headless.local import LocalServer

from .measure import show_json

PHOTO = "bench.png"
#: The long run is about memory: a small image keeps it short.
SMALL = "bench-small.png"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def sampling(model: list, text: str) -> dict[str, dict]:
    """Stock nodes from a model to a preview."""
    return {
        "photo": node("LoadImage", image=PHOTO),
        "editor": node("HYWULoadBundledEditor"),
        "text": node("CLIPTextEncode", text=text, clip=["editor", 1]),
        "pair": node(
            "InstructPixToPixConditioning", positive=["text", 0], negative=["text", 0],
            vae=["editor", 2], pixels=["photo", 0],
        ),
        "sample": node(
            "KSampler", model=model, seed=1, steps=4, cfg=1.0, sampler_name="euler",
            scheduler="simple", positive=["pair", 0], negative=["pair", 1],
            latent_image=["pair", 2], denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["editor", 2]),
        "show": node("PreviewImage", images=["decode", 0]),
    }  # fmt: skip


def edit(text: str, save: str | None = None, photo: str = PHOTO) -> dict[str, dict]:
    """The whole edit; with `save` it keeps the LoRA as a file of that name."""
    graph = {
        "generator": node("HYWULoadGenerator", checkpoint="bundled", precision="auto"),
        "encode": node(
            "HYWUConditionEncode",
            generator=["generator", 0],
            image=["photo", 0],
            instruction=text,
        ),
        "generate": node("HYWUGenerateLoRA", generator=["generator", 0], condition=["encode", 0]),
        "apply": node(
            "HYWUApplyLoRA", model=["editor", 0], lora=["generate", 0], strength=1.0, mode="auto"
        ),
        **sampling(["apply", 0], text),
    }
    graph["photo"]["inputs"]["image"] = photo
    if save:
        graph["save"] = node(
            "HYWUSaveLoRA", lora=["generate", 0], filename_prefix=f"loras/{save}", format="ComfyUI"
        )
    return graph


def from_file(name: str, how: str) -> dict[str, dict]:
    """The same sampling with a LoRA from a file: `how` is stock, unmerged or merge."""
    graph = sampling(["apply", 0], "one text for all")
    if how == "stock":
        graph["apply"] = node(
            "LoraLoaderModelOnly", model=["editor", 0], lora_name=name, strength_model=1.0
        )
        return graph
    graph["load"] = node("HYWULoadLoRA", lora=name)
    graph["apply"] = node(
        "HYWUApplyLoRA", model=["editor", 0], lora=["load", 0], strength=1.0, mode=how
    )
    return graph


async def timeline(client: Client, graph: dict[str, dict]) -> dict[str, float]:
    """Seconds each node took, `first_step` and `whole` from the start of the execution on, as the client sees it.

    That the prompt has ended, and how, the server's history says; the websocket's events are only timed. Raises
    ServerError where the prompt failed, RuntimeError where events got lost: figures without them would be wrong.
    """
    took: dict[str, float] = {}
    current, start = None, time.perf_counter()
    since = start

    def event(kind: str, data: dict[str, Any]) -> None:
        nonlocal current, since, start
        now = time.perf_counter()
        if kind == "execution_start":
            start = since = now
        elif kind == "progress" and data.get("node") == "sample":
            took.setdefault("first_step", now - start)
        elif kind in ("executing", "execution_success"):
            if current:
                took[current] = took.get(current, 0.0) + now - since
            current, since = data.get("node"), now
            if kind == "execution_success":
                took["whole"] = now - start

    await client.run(graph, events=event)
    if not {"whole", "first_step"} <= took.keys():
        raise RuntimeError(
            f"of a prompt that ended well only {sorted(took)} were told: run it again"
        )
    return took


async def split(client: Client, repeats: int) -> dict[str, float]:
    """Median seconds a stage over warm edits with ever new instructions."""
    await timeline(client, edit("warm up"))
    runs = [await timeline(client, edit(f"blur the image {i}")) for i in range(repeats)]
    stages = ("encode", "generate", "apply", "sample", "whole")
    figures = {s: statistics.median(run.get(s, 0.0) for run in runs) for s in stages}
    shares = [sum(run[s] for s in ("encode", "generate", "apply")) / run["whole"] for run in runs]
    return figures | {"share_of_hywu": statistics.median(shares)}


async def exchange(client: Client, output: Path, repeats: int) -> dict[str, float]:
    """Median seconds from prompt to first step with a new LoRA file each time, and ratios to stock."""
    for i in range(repeats):
        await timeline(client, edit(f"blur the image {i} times", f"bench-{i}"))
    files = sorted(f"{p.name}" for p in (output / "loras").glob("bench-*.safetensors"))
    times: dict[str, list[float]] = {"stock": [], "unmerged": [], "merge": []}
    for name in files:
        for how, kept in times.items():
            kept.append((await timeline(client, from_file(name, how)))["first_step"])
    # the first of each loads the model
    medians = {how: statistics.median(kept[1:]) for how, kept in times.items()}
    ratios = {
        f"{how}_to_stock": statistics.median(
            a / b for a, b in zip(times[how][1:], times["stock"][1:], strict=True)
        )
        for how in ("unmerged", "merge")
    }
    return medians | ratios


async def soak(client: Client, process: psutil.Process, prompts: int) -> dict[str, float]:
    """Resident MiB of the server after a tenth of the prompts and at the end, and LoRA bytes made."""
    marks, made = [], 0
    for i in range(prompts):
        record = await client.run(edit(f"prompt {i}: change something", photo=SMALL))
        report = json.loads(record["outputs"]["generate"]["text"][0])
        made += report["bytes"] * (not report["cached"])
        marks.append(process.memory_info().rss / 2**20)
    early = marks[max(0, prompts // 10 - 1)]
    return {
        "prompts": prompts,
        "rss_mib_early": early,
        "rss_mib_end": marks[-1],
        "growth_mib": marks[-1] - early,
        "lora_mib_made": made / 2**20,
    }


async def measure(server: LocalServer, args: argparse.Namespace) -> dict[str, Any]:
    async with Client(server.url) as client:
        process = psutil.Process(server.process.pid)
        figures: dict[str, Any] = {"split": await split(client, args.repeats)}
        figures["exchange"] = await exchange(client, server.base / "output", args.repeats)
        if args.prompts:
            figures["soak"] = await soak(client, process, args.prompts)
        return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256, help="side of the image in pixels")
    parser.add_argument("--repeats", type=int, default=15, help="prompts of each kind")
    parser.add_argument("--prompts", type=int, default=200, help="of the long run; 0 leaves it out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    host = dev.prepare_host()
    with tempfile.TemporaryDirectory() as base, dev.server_of(host, Path(base)) as server:
        pixels = np.random.default_rng(0).integers(0, 256, (args.size, args.size, 3), np.uint8)
        Image.fromarray(pixels).save(server.base / "input" / PHOTO)
        Image.fromarray(pixels[:64, :64]).save(server.base / "input" / SMALL)
        figures = asyncio.run(measure(server, args))
    figures = {"comfyui": host.version, "size": args.size, **figures}
    show_json(args.json, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
