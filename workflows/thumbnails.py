"""Thumbnails for the template browser and the images of the documentation, from real runs."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

from PIL import Image, ImageOps

from hywu_core.errors import HYWUError
from hywu_core.headless.client import Client

#: Width and height of a thumbnail: the cards of the template browser are square.
THUMBNAIL = (400, 400)
LIMIT = 40_000
#: The loader of a model that only the user has; the bundled editor has the same three outputs.
OWN_MODEL = "CheckpointLoaderSimple"
STAND_IN = {"class_type": "HYWULoadBundledEditor", "inputs": {}}


def with_stand_in(graph: dict) -> dict:
    """`graph` with the bundled editor, sampled as it wants it, in place of a model of the user's."""
    if all(node["class_type"] != OWN_MODEL for node in graph.values()):
        return graph
    changed = {}
    for ident, node in graph.items():
        if node["class_type"] == OWN_MODEL:
            changed[ident] = {**node, **STAND_IN}
        elif node["class_type"] == "KSampler":
            changed[ident] = {**node, "inputs": {**node["inputs"], "steps": 4, "cfg": 1.0}}
        else:
            changed[ident] = node
    return changed


async def run(server: str, graph: dict) -> dict[str, Image.Image]:
    """Run it; "ID" and "ID:NUMBER" -> the images of its SaveImage nodes."""
    found: dict[str, Image.Image] = {}
    async with Client(server, timeout=1800) as client:
        record = await client.run(graph)
        for ident, node in graph.items():
            if node["class_type"] != "SaveImage":
                continue
            for number, item in enumerate(record["outputs"].get(ident, {}).get("images", [])):
                image = Image.open(io.BytesIO(await client.fetch(item))).convert("RGB")
                found.setdefault(ident, image)
                found[f"{ident}:{number}"] = image
    return found


def table(rows: list[list[Image.Image]], size: tuple[int, int], gap: int = 4) -> Image.Image:
    """Images in rows on a sheet of `size`, each cropped to its cell."""
    sheet = Image.new("RGB", size, "white")
    height = (size[1] - gap * (len(rows) - 1)) // len(rows)
    for at, row in enumerate(rows):
        width = (size[0] - gap * (len(row) - 1)) // len(row)
        for place, image in enumerate(row):
            cell = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
            sheet.paste(cell, (place * (width + gap), at * (height + gap)))
    return sheet


def jpeg(image: Image.Image, limit: int) -> bytes:
    """The best quality that stays under `limit` bytes."""
    for quality in range(92, 20, -6):
        content = io.BytesIO()
        image.save(content, "JPEG", quality=quality, optimize=True)
        if content.tell() < limit:
            return content.getvalue()
    raise HYWUError(f"The image doesn't fit into {limit} bytes.")


def thumbnail_and_sheet(
    server: str, inputs: Path, graph: dict, layout: dict
) -> tuple[bytes, bytes | None]:
    """The thumbnail, and the documentation's image where the layout names one, as JPEG.

    inputs: the folder of the images that come along.
    The layout's `sheet` are the rows of the latter, where they aren't those of the thumbnail.
    """
    results = asyncio.run(run(server, with_stand_in(graph)))

    def rows(wanted: list[list[str]]) -> list[list[Image.Image]]:
        return [[_image(results, inputs, entry) for entry in row] for row in wanted]

    small = jpeg(table(rows(layout["thumbnail"]), THUMBNAIL), LIMIT)
    if not layout.get("image"):
        return small, None
    large = rows(layout.get("sheet", layout["thumbnail"]))
    side, gap = 256, 4
    columns = max(map(len, large))
    size = (columns * (side + gap) - gap, len(large) * (side + gap) - gap)
    return small, jpeg(table(large, size, gap), 150_000)


def _image(results: dict[str, Image.Image], inputs: Path, entry: str) -> Image.Image:
    return results[entry] if entry in results else Image.open(inputs / entry).convert("RGB")
