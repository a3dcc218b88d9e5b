"""The README's first command: one photograph, two opposite edits, by a ComfyUI server over its API.

`python3 dev.py demo` starts a server and calls `python -m workflows.demo --server URL --out FOLDER`.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from hywu_core.cli.console import say, table
from hywu_core.files import atomic_path
from hywu_core.headless.client import Client, ServerError
from hywu_core.headless.graph import find_node, read_graph, set_input

WORKFLOW = Path(__file__).parent / "api" / "conflict_blur_deblur.json"
#: title of a SaveImage node -> name of its image
RESULTS = {"Result: blur": "blur", "Result: deblur": "deblur"}
#: class of a node -> what it does, for nodes that report their seconds
STAGES = {"HYWUConditionEncode": "encode", "HYWUGenerateLoRA": "generate"}


def sharpness(image: Image.Image) -> float:
    """Tenengrad: mean squared Sobel gradient of the luminance (levels of 255); higher is sharper.

    Less moved by noise than the Laplacian's variance.
    """
    y = np.asarray(image.convert("L"), dtype=np.float64)
    down = y[:-2] + 2 * y[1:-1] + y[2:]
    across = y[:, :-2] + 2 * y[:, 1:-1] + y[:, 2:]
    gx, gy = down[:, 2:] - down[:, :-2], across[2:] - across[:-2]
    return float((np.square(gx / 8) + np.square(gy / 8)).mean())


def stages(graph: dict, record: dict, whole: float) -> dict[str, float]:
    """Seconds of both edits together, by stage, from the nodes' own reports and the whole."""
    seconds = dict.fromkeys(STAGES.values(), 0.0)
    for ident, node in graph.items():
        report = record["outputs"].get(ident, {}).get("text")
        if report and node["class_type"] in STAGES:
            seconds[STAGES[node["class_type"]]] += json.loads(report[0])["seconds"]
    rest = whole - sum(seconds.values())
    return {**seconds, "load, apply, sample, decode": rest, "whole": whole}


async def edit(server: str, photo: Path | None) -> tuple[dict[str, Image.Image], dict[str, float]]:
    """Run the workflow; returns the images by name, and seconds by stage."""
    graph = read_graph(WORKFLOW)
    async with Client(server, timeout=1800) as client:
        if photo is not None:
            set_input(graph, f"Photograph.image={await client.upload(photo)}")
        started = time.monotonic()
        with tqdm(desc="queued", disable=not sys.stderr.isatty()) as bar:

            def show(node: str | None, done: int, total: int) -> None:
                title = (graph.get(str(node), {}).get("_meta") or {}).get("title", "running")
                bar.set_description(title)
                bar.total, bar.n = total, done
                bar.refresh()

            record = await client.run(graph, show)
        whole = time.monotonic() - started
        source = graph[find_node(graph, "Photograph")]["inputs"]["image"]
        items = {"source": {"filename": source, "type": "input"}}
        for title, name in RESULTS.items():
            items[name] = record["outputs"][find_node(graph, title)]["images"][0]
        images = {
            name: Image.open(io.BytesIO(await client.fetch(item))).convert("RGB")
            for name, item in items.items()
        }
    return images, stages(graph, record, whole)


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """The images in a row, all as high as the first."""
    height = images[0].height
    images = [im.resize((round(im.width * height / im.height), height)) for im in images]
    sheet = Image.new("RGB", (sum(im.width for im in images), height))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet


def save(image: Image.Image, path: Path) -> None:
    with atomic_path(path, overwrite=True) as part:
        image.save(part, "PNG")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 dev.py demo", description=__doc__)
    parser.add_argument("--server", required=True, help="address of a running ComfyUI")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument(
        "--image", type=Path, help="a photograph of yours instead of the shipped one"
    )
    args = parser.parse_args()
    try:
        images, seconds = asyncio.run(edit(args.server, args.image))
    except ServerError as error:
        say(f"demo: {error}")
        return error.exit_code
    args.out.mkdir(parents=True, exist_ok=True)
    source, rows = sharpness(images["source"]), []
    for name, image in images.items():
        save(image, args.out / f"{name}.png")
        value = sharpness(image)
        rows.append((name, f"{value:.1f}", f"{value / source:.2f}", str(args.out / f"{name}.png")))
    together = args.out / "source_blur_deblur.png"
    save(side_by_side(list(images.values())), together)
    table(rows, ("image", "sharpness", "of the source's", "file"))
    say(f"side by side: {together}")
    table([(stage, f"{value:.2f}") for stage, value in seconds.items()], ("both edits", "seconds"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
