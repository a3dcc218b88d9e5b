"""Edits of held-out images by each strategy and by the controls, measured against the targets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import need
from ...injection import inject
from ...training.base import BaseModel, Batch, device_of
from ...training.strategies import HyperNetwork
from ..images import ImagePool, held_out_images
from ..tasks import CONFLICT, make_batch
from .controls import MeanChange, derangement
from .plan import ConflictPlan

#: Equal images have no finite PSNR; nothing here comes near.
PSNR_LIMIT = 60.0

#: items -> the base as adapted for them
Adapted = Callable[[Batch], contextlib.AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class EvaluationSet:
    """Items in the order image, crop, task; `image` and `crop` say which each one is of."""

    seen: Batch
    held_out: Batch
    image: tuple[str, ...]
    crop: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seen)


def evaluation_set(plan: ConflictPlan, size: int) -> EvaluationSet:
    """The same for the same plan. Both phrasings of an item share source and target."""
    images = held_out_images()
    names = list(images)[: plan.max_images or None]
    clean, image, crop = [], [], []
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(plan.seed * 10_007 + index)
        crops = ImagePool.of([images[name]]).crops(plan.crops, size, generator)
        for number in range(plan.crops):
            clean += [crops[number]] * len(plan.tasks)
            image += [name] * len(plan.tasks)
            crop += [number] * len(plan.tasks)
    tasks = list(plan.tasks) * (len(names) * plan.crops)
    generator = torch.Generator().manual_seed(plan.seed + 5)
    seen = make_batch(torch.stack(clean), tasks, generator)
    picks = torch.randint(2**31, (len(tasks),), generator=generator).tolist()
    texts = [
        CONFLICT[t].held_out[p % len(CONFLICT[t].held_out)]
        for t, p in zip(tasks, picks, strict=True)
    ]
    held = Batch(seen.source, seen.target, tuple(texts), seen.task)
    return EvaluationSet(seen, held, tuple(image), tuple(crop))


# -- ways to adapt the base for a batch ---------------------------------------------------------------


def unadapted(base: BaseModel) -> Adapted:
    return lambda batch: contextlib.nullcontext(base.module)


def shuffled(base: BaseModel, strategy: HyperNetwork, seed: int = 0) -> Adapted:
    """Each item gets the LoRA that was generated for another item of the batch."""

    @contextlib.contextmanager
    def adapt(batch: Batch) -> Iterator[nn.Module]:
        lora = strategy.loras(batch)
        with inject(base.module, lora.select(derangement(len(batch), seed))) as module:
            yield module

    return adapt


@torch.no_grad()
def mean_changes(strategy: HyperNetwork, batches: list[Batch]) -> dict[str, dict[str, Tensor]]:
    """Task -> mean change of the weights over that task's items, and "" -> over all of them."""
    means: dict[str, MeanChange] = {}
    for batch in batches:
        lora = strategy.loras(batch.to(device_of(strategy.base.module)))
        for name in ("", *dict.fromkeys(batch.task)):
            items = [i for i, task in enumerate(batch.task) if name in ("", task)]
            means.setdefault(name, MeanChange()).add(lora.select(items))
    return {name: mean.mean() for name, mean in means.items()}


# -- measuring ------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    base: BaseModel, adapt: Adapted, items: Batch, batch_size: int, by_task: bool = False
) -> Tensor:
    """Edits ``[N, 3, H, W]`` of all items, in their order, on the CPU. by_task: batches of one task each."""
    device = device_of(base.module)
    edits = torch.empty_like(items.source)
    order = list(range(len(items)))
    groups = [order]
    if by_task:
        groups = [[i for i in order if items.task[i] == task] for task in dict.fromkeys(items.task)]
    for group in groups:
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            batch = items.select(part).to(device)
            with adapt(batch) as module:
                edits[part] = base.edit(module, batch, 0).to(edits)
    return edits


def measure(edits: Tensor, data: EvaluationSet, phrasing: str) -> list[dict[str, Any]]:
    """One row an item: image, crop, task, phrasing, psnr (dB), ssim."""
    metrics = need("skimage.metrics", "to measure SSIM", "scikit-image")
    rows = []
    for i, (edit, target) in enumerate(zip(edits, data.seen.target, strict=True)):
        pair = [x.permute(1, 2, 0).double().numpy() for x in (edit, target)]
        error = float(np.square(pair[0] - pair[1]).mean())
        psnr = min(PSNR_LIMIT, -10 * np.log10(max(error, 1e-12)))
        ssim = metrics.structural_similarity(*pair, channel_axis=2, data_range=1.0)
        rows.append(
            {
                "image": data.image[i],
                "crop": data.crop[i],
                "task": data.seen.task[i],
                "phrasing": phrasing,
                "psnr": round(float(psnr), 4),
                "ssim": round(float(ssim), 5),
            }
        )
    return rows
