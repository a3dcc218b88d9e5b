"""Photographs edited at fixed, clearly visible degrees, and what no task asks for: unknown words, flat areas.

The main table's degrees are drawn at random on crops; these are a user's whole edits, 256 pixels wide, each
measured against leaving the image alone. Sharpness is the mean square of the luminance's Sobel gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...training.base import BaseModel, Batch, device_of
from .. import edits
from ..images import held_out_images
from ..tasks import CONFLICT
from .evaluate import PSNR_LIMIT, Adapted

#: How many held-out images, photographs first, and their sides in pixels.
IMAGES, SIZE = 8, 256
#: Task -> what users type first.
SHORT: Mapping[str, tuple[str, ...]] = {
    "deblur": ("deblur", "sharpen this up", "make it sharp", "unblur this"),
    "blur": ("blur", "make it blurry"),
    "restore": ("restore", "fix this old photo"),
    "age": ("age it", "make it look old"),
    "brighten": ("brighten", "make it brighter"),
    "darken": ("darken", "make it darker"),
    "dehaze": ("dehaze", "remove the haze"),
    "fog": ("fog", "make it foggy"),
}
#: What neither the editor nor a task knows.
UNKNOWN = ("add a red hat", "a photo of a dog", "make it look like winter", "remove the person")


@dataclass(frozen=True)
class Case:
    """source, target ``[N, 3, H, W]`` in 0..1 of a task at one degree."""

    name: str
    task: str
    source: Tensor
    target: Tensor


def held_out_squares(count: int | None = None, size: int | None = None) -> Tensor:
    """``[N, 3, size, size]`` in 0..1: the middles of held-out images, made no smaller than half as large again."""
    found = []
    for image in list(held_out_images().values())[: count or IMAGES]:
        found.append(square(image[None].float() / 255, size or SIZE))
    return torch.cat(found).clamp(0, 1)


def square(image: Tensor, size: int) -> Tensor:
    """The middle of ``[1, 3, H, W]``, shrunk until its shorter side is half as long again as `size`."""
    factor = min(1.0, 1.5 * size / min(image.shape[2:]))
    factor = max(factor, size / min(image.shape[2:]))
    sides = [max(size, round(side * factor)) for side in image.shape[2:]]
    image = F.interpolate(image, sides, mode="bilinear", antialias=True)
    top, left = ((side - size) // 2 for side in sides)
    return image[..., top : top + size, left : left + size]


def cases(clean: Tensor) -> list[Case]:
    """Every task at its degrees on images ``[N, 3, H, W]`` in 0..1."""
    generator = torch.Generator().manual_seed(5)
    soft = {sigma: edits.blur(clean, sigma) for sigma in (1.0, 2.0)}
    aged = edits.aged(clean, torch.full((len(clean), 1, 1, 1), 0.7), generator)
    old = torch.lerp(edits.sepia(aged), torch.full_like(clean, 0.62), 0.35).clamp(0, 1)
    dim, hazy = 0.6 * clean, edits.foggy(clean, 0.5)
    return [
        Case("blur, sharp source", "blur", clean, edits.blur(clean, 3.0)),
        Case("blur, sigma 1", "blur", soft[1.0], edits.blur(soft[1.0], 3.0)),
        Case("blur, sigma 2", "blur", soft[2.0], edits.blur(soft[2.0], 3.0)),
        Case("deblur, sigma 1", "deblur", soft[1.0], clean),
        Case("deblur, sigma 2", "deblur", soft[2.0], clean),
        Case("age, degree 0.7", "age", aged, old),
        Case("restore, degree 0.7", "restore", aged, clean),
        Case("darken, 0.6", "darken", dim, 0.25 * clean),
        Case("brighten, 0.6", "brighten", dim, clean),
        Case("fog, 0.5", "fog", hazy, edits.foggy(clean, 0.85)),
        Case("dehaze, 0.5", "dehaze", hazy, clean),
    ]


def flat_areas(size: int | None = None) -> Tensor:
    """``[2, 3, size, size]``: a gray card, and the gradient of a blue sky."""
    side = size or SIZE
    gray = torch.full((3, side, side), 0.5)
    down = torch.linspace(0, 1, side)[:, None].expand(side, side)
    sky = torch.stack([0.35 + 0.35 * down, 0.55 + 0.25 * down, 0.9 - 0.05 * down])
    return torch.stack([gray, sky])


# -- what is measured -----------------------------------------------------------------------------------


def measure_tasks(base: BaseModel, adapt: Adapted, tasks: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of every case of `tasks`, with the task's usual instruction."""
    clean, tasks = held_out_squares(), set(tasks)
    rows = []
    for case in cases(clean):
        if case.task in tasks:
            rows += _rows(base, adapt, case, CONFLICT[case.task].phrasings[0])
    return rows


def measure_words(
    base: BaseModel, adapt: Adapted, tasks: Iterable[str]
) -> dict[str, list[dict[str, Any]]]:
    """Short forms, against the same cases; unknown requests, against the image as it is."""
    clean, tasks = held_out_squares(), set(tasks)
    short = [
        row
        for case in cases(clean)
        if case.task in tasks and case.name != "blur, sharp source"
        for text in SHORT[case.task]
        for row in _rows(base, adapt, case, text)
    ]
    unknown = [
        row
        for text in UNKNOWN
        for row in _rows(base, adapt, Case("unknown", "unknown", clean, clean), text)
    ]
    return {"short": short, "unknown": unknown}


def measure_flat(base: BaseModel, adapt: Adapted, tasks: Iterable[str]) -> list[dict[str, Any]]:
    """How much is left on flat areas beside a smooth image: standard deviations, of full range."""
    areas, rows = flat_areas(), []
    for task in tasks:
        for name, area in zip(("gray card", "blue sky"), areas, strict=True):
            edit = _edit(base, adapt, area[None], CONFLICT[task].phrasings[0], task)
            rows.append({"area": name, "task": task, "residual": round(residual(edit), 6)})
    return rows


def residual(image: Tensor) -> float:
    """Standard deviation of what a blur of 4 pixels takes from ``[1, 3, H, W]``, borders left out."""
    rest = (image - edits.blur(image, 4.0))[..., 16:-16, 16:-16]
    return float(rest.std())


def sharpness(image: Tensor) -> Tensor:
    """``[N]``: mean square of the luminance's Sobel gradient of ``[N, 3, H, W]``."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])[None, None]
    y = edits.luminance(image)
    across, down = (F.conv2d(y, k) for k in (kernel, kernel.mT))
    return (across.square() + down.square()).mean((1, 2, 3))


def _psnr(one: Tensor, other: Tensor) -> Tensor:
    squared = (one - other).square().mean((1, 2, 3))
    return (-10 * squared.clamp_min(1e-12).log10()).clamp(max=PSNR_LIMIT)


def _rows(base: BaseModel, adapt: Adapted, case: Case, text: str) -> list[dict[str, Any]]:
    images = zip(case.source.split(1), case.target.split(1), strict=True)
    rows = []
    for number, (source, target) in enumerate(images):
        edit = _edit(base, adapt, source, text, case.task)
        sharp = sharpness(torch.cat([edit, target, source]))
        rows.append({
            "case": case.name, "task": case.task, "instruction": text, "image": number,
            "psnr": round(float(_psnr(edit, target)), 3),
            "gain": round(float(_psnr(edit, target) - _psnr(source, target)), 3),
            "sharpness_of_source": round(float(sharp[0] / sharp[2]), 4),
            "sharpness_of_target": round(float(sharp[0] / sharp[1]), 4),
        })  # fmt: skip
    return rows


def _edit(base: BaseModel, adapt: Adapted, source: Tensor, text: str, task: str) -> Tensor:
    batch = Batch(source, source, (text,), (task,)).to(device_of(base.module))
    with torch.no_grad(), adapt(batch) as module:
        return base.edit(module, batch, 0).cpu()


# -- what is told -------------------------------------------------------------------------------------------


def summary(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """name -> what `Experiment` measured of it -> means and medians for ``figures.json``."""
    about: dict[str, Any] = {}
    for name, parts in found.items():
        kept: dict[str, Any] = {"cases": _by(parts["tasks"], "case", _mean_of_rows)}
        if "short" in parts:
            usual = kept["cases"]
            kept["short"] = {
                text: round(
                    fmean(
                        _mean_of_rows(rows)["psnr"] - usual[case]["psnr"]
                        for case, rows in _groups(
                            [r for r in parts["short"] if r["instruction"] == text], "case"
                        ).items()
                    ),
                    2,
                )
                for text in dict.fromkeys(row["instruction"] for row in parts["short"])
            }
        for key, by in (("unknown", "instruction"), ("flat", "task")):
            if key in parts:
                kept[key] = _by(parts[key], by, _unknown if key == "unknown" else _flat)
        about[name] = kept
    return about


def _groups(rows: Iterable[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def _by(rows: Iterable[Mapping[str, Any]], key: str, of: Callable) -> dict[str, Any]:
    return {name: of(group) for name, group in _groups(rows, key).items()}


def _mean_of_rows(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "psnr": round(fmean(row["psnr"] for row in rows), 2),
        "gain": round(fmean(row["gain"] for row in rows), 2),
        "sharpness_of_source": round(median(row["sharpness_of_source"] for row in rows), 3),
        "sharpness_of_target": round(median(row["sharpness_of_target"] for row in rows), 3),
    }


def _unknown(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    values = [row["psnr"] for row in rows]
    return {"mean": round(fmean(values), 2), "lowest": round(min(values), 2)}


def _flat(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    return {row["area"]: row["residual"] for row in rows}
