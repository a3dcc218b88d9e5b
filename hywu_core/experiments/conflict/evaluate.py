"""Edits of held-out images by each strategy and by the controls, measured by `hywu_core.evaluation`.

Controls tell what a generator's conditions are good for. Shuffled conditions: each item gets the LoRA of
another. Mean LoRA: the average change of the weights, for all items or for those of one task; if the latter
does as well, the generator only switches tasks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...discovery import submodule
from ...errors import HYWUError
from ...evaluation.judges.reference import psnr, ssim
from ...injection import inject
from ...lora import GeneratedLoRA
from ...training.base import BaseModel, Batch, device_of
from ...training.strategies import HyperNetwork
from ..images import ImagePool, held_out_images
from ..tasks import CONFLICT, make_batch
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


def evaluation_set(plan: ConflictPlan) -> EvaluationSet:
    """The same for the same plan. Both phrasings of an item share source and target."""
    images = held_out_images()
    names = list(images)[: plan.max_images or None]
    clean, image, crop = [], [], []
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(plan.seed * 10_007 + index)
        crops = ImagePool.of([images[name]]).crops(plan.crops, plan.evaluation_size, generator)
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


def derangement(count: int, seed: int = 0) -> list[int]:
    """A random order in which no item keeps its place (one cycle through all; Sattolo 1986)."""
    if count < 2:
        raise HYWUError(f"Conditions can't be shuffled among {count} items; give 2 or more.")
    generator = torch.Generator().manual_seed(seed)
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = int(torch.randint(i, (), generator=generator))
        order[i], order[j] = order[j], order[i]
    return order


class MeanChange:
    """Running mean of ``scale·B·A`` over LoRAs, exact: the mean of products, not of factors.

    Targets with experts are not supported (HYWUError).
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, lora: GeneratedLoRA) -> None:
        """Take in every item of a batch of LoRAs."""
        for path, (a, b) in lora.items():
            if a.ndim != 3:
                raise HYWUError(f"{path}: the mean change of expert modules is not supported.")
            # the sum of products over items is one product of stacked factors
            total = torch.einsum("bor,bri->oi", b.float(), a.float()) * lora.scale
            self._sums[path] = self._sums[path] + total if path in self._sums else total
        self.count += lora.batch_size

    def mean(self) -> dict[str, Tensor]:
        """Target path -> float32 ``[out, in]``."""
        if not self.count:
            raise HYWUError("The mean of no LoRAs does not exist; add some first.")
        return {path: total / self.count for path, total in self._sums.items()}


@contextlib.contextmanager
@torch.no_grad()
def changed(module: nn.Module, change: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """`module` with `change` added to its weights inside the block; restored bit by bit after it."""
    weights: dict[str, nn.Parameter] = {}
    for path, delta in change.items():
        target = submodule(module, path)
        if target is None or target.weight.numel() != delta.numel():
            raise HYWUError(f"{path}: the module has no such weight of {delta.numel()} values.")
        weights[path] = target.weight
    kept = {path: weight.detach().clone() for path, weight in weights.items()}
    try:
        for path, weight in weights.items():
            weight.add_(change[path].reshape(weight.shape).to(weight))
        yield module
    finally:
        for path, weight in weights.items():
            weight.copy_(kept[path])


# -- measuring ------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    base: BaseModel, adapt: Adapted, items: Batch, batch_size: int, by_task: bool = False
) -> Tensor:
    """Edits ``[N, 3, H, W]`` of all items, in their order, on the CPU.

    by_task: batches of one task each.
    """
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
    """One row per item: image, crop, task, phrasing, psnr (dB), ssim (of RGB)."""
    rows = []
    for i, (edit, target) in enumerate(zip(edits, data.seen.target, strict=True)):
        pair = [x.permute(1, 2, 0).double().numpy() for x in (edit, target)]
        row = {"image": data.image[i], "crop": data.crop[i], "task": data.seen.task[i]}
        row |= {"phrasing": phrasing, "psnr": round(min(PSNR_LIMIT, psnr(*pair)), 4)}
        rows.append({**row, "ssim": round(ssim(*pair), 5)})
    return rows
