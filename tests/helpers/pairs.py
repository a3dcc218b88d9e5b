"""Pairs of smooth random images for the tests of training: each task changes the same sources its own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

#: task -> (what is asked, what is added to red and taken from blue, in 0..1)
TASKS = {"warm": ("make it warm", 0.3), "cold": ("make it cold", -0.3)}
SIZE = 64


def make_pairs(
    folder: Path, count: int = 4, tasks: tuple[str, ...] = tuple(TASKS), references: int = 0
) -> Path:
    """Pairs of smooth random images; each task changes the same sources the opposite way.

    references: further images of each row, parts of its source in other shapes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        small = torch.rand(1, 3, 4, 4, generator=generator) * 0.4 + 0.3
        image = nn.functional.interpolate(small, (SIZE, SIZE), mode="bicubic")[0].clamp(0, 1)
        _save(image, folder / f"{i}.png")
        for place in range(references):
            part = image.flip(1 + place)[:, : SIZE - 16 * place, : SIZE // 2]
            _save(part, folder / f"{i}_{place}.png")
        for task in tasks:
            text, shift = TASKS[task]
            tint = torch.tensor([shift, 0.0, -shift])[:, None, None]
            _save((image + tint).clamp(0, 1), folder / f"{i}_{task}.png")
            further = [f"{i}_{place}.png" for place in range(references)]
            rows.append(
                {
                    "source": f"{i}.png",
                    "target": f"{i}_{task}.png",
                    "instruction": text,
                    "task": task,
                    **({"references": further} if references else {}),
                }
            )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _save(image: Tensor, path: Path) -> None:
    pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)
