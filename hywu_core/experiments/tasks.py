"""The conflict pairs, kept out of the pretraining, and batches of any task.

A task turns clean photographs into (source, target) pairs, batched in torch, and has phrasings. The
two directions of a pair draw their sources from one function, so that only the instruction tells them
apart; the degree of the source varies and is not told. The last two phrasings of a task are held out
of every training and share no template with the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import HYWUError
from ..training.base import Batch
from . import edits, phrasings
from .edits import HELD_OUT, Make, Task, task, uniform
from .images import ImagePool
from .pretraining_tasks import PRETRAINING

#: Goes up when a task makes other images or texts of the same draws: what was trained on others can't go on.
VERSION = 2

__all__ = ["CONFLICT", "HELD_OUT", "PRETRAINING", "TASKS", "Make", "Task", "TaskBatches"]

# -- conflict pairs: one distribution of sources for both directions, clearly degraded ----------------


def _blurred(x: Tensor, g: torch.Generator) -> Tensor:
    return edits.blur(x, uniform(x, 0.5, 2.5, g))


def _aged(x: Tensor, g: torch.Generator) -> Tensor:
    return edits.aged(x, uniform(x, 0.4, 1.0, g), g)


def _exposed(x: Tensor, g: torch.Generator) -> Tensor:
    return x * uniform(x, 0.4, 0.8, g)


def _hazy(x: Tensor, g: torch.Generator) -> Tensor:
    return edits.foggy(x, uniform(x, 0.3, 0.65, g))


def _make_blur(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    source = _blurred(x, g)
    return source, edits.blur(source, 3.0)


def _make_deblur(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return _blurred(x, g), x


def _make_age(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    source = _aged(x, g)
    # without fresh grain or scratches, which no model could foretell
    return source, torch.lerp(edits.sepia(source), torch.full_like(x, 0.62), 0.35).clamp(0, 1)


def _make_restore(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return _aged(x, g), x


def _make_darken(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    # to an absolute exposure: how much to darken must be read off the image
    return _exposed(x, g), 0.25 * x


def _make_brighten(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return _exposed(x, g), x


def _make_fog(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    # as thick whatever the source: how much to add must be read off the image
    return _hazy(x, g), edits.foggy(x, 0.85)


def _make_dehaze(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return _hazy(x, g), x


CONFLICT: dict[str, Task] = {
    each.name: each
    for each in (
        task("blur", _make_blur, "deblur", *phrasings.BLUR),
        task("deblur", _make_deblur, "blur", *phrasings.DEBLUR),
        task("age", _make_age, "restore", *phrasings.AGE),
        task("restore", _make_restore, "age", *phrasings.RESTORE),
        task("darken", _make_darken, "brighten", *phrasings.DARKEN),
        task("brighten", _make_brighten, "darken", *phrasings.BRIGHTEN),
        task("fog", _make_fog, "dehaze", *phrasings.FOG),
        task("dehaze", _make_dehaze, "fog", *phrasings.DEHAZE),
    )
}

TASKS: dict[str, Task] = {**PRETRAINING, **CONFLICT}


def get_task(name: str) -> Task:
    """Raises HYWUError that lists the tasks."""
    if name not in TASKS:
        raise HYWUError(f"There is no task '{name}'; there are: {', '.join(TASKS)}.")
    return TASKS[name]


def make_batch(
    clean: Tensor, tasks: Sequence[str], generator: torch.Generator, held_out: bool = False,
    carriers: bool = False, composed: float = 1.0,
) -> Batch:  # fmt: skip
    """Examples from clean images ``[B, 3, H, W]`` in 0..1, item i by ``tasks[i]``.

    held_out: phrasings from those kept out of training, instead of the seen ones.
    carriers: put words around most of the seen ones that say nothing of the edit ("please …, thanks").
    composed: the share of items whose phrasing is drawn from all seen ones; the others' is from a task's
        first few.
    """
    if len(tasks) != clean.shape[0]:
        raise HYWUError(f"{len(tasks)} tasks for {clean.shape[0]} images; give one for each.")
    source, target = torch.empty_like(clean), torch.empty_like(clean)
    instructions = [""] * len(tasks)
    for name in dict.fromkeys(tasks):
        asked = get_task(name)
        items = [i for i, other in enumerate(tasks) if other == name]
        source[items], target[items] = asked.make(clean[items], generator)
        choices = asked.held_out if held_out else asked.seen
        picks = torch.randint(len(choices), (len(items),), generator=generator).tolist()
        if composed < 1:
            kinds = torch.rand(len(items), generator=generator).tolist()
            picks = [
                pick if kind < composed else pick % phrasings.WRITTEN
                for pick, kind in zip(picks, kinds, strict=True)
            ]
        for item, pick in zip(items, picks, strict=True):
            instructions[item] = choices[pick]
    if carriers and not held_out:
        instructions = [_carried(text, generator) for text in instructions]
    return Batch(source, target, tuple(instructions), tuple(tasks))


def _carried(text: str, generator: torch.Generator) -> str:
    chance = torch.rand(2, generator=generator).tolist()
    if chance[0] >= phrasings.CARRIED:
        return text
    return phrasings.CARRIERS[int(chance[1] * len(phrasings.CARRIERS))].format(text)


class TaskBatches:
    """Batches that hold each task equally often, ``batch_size / len(tasks)`` times, in random crops.

    only: keep just this task's items of the same batches, so that what is trained on one task sees exactly
        the examples of it that the others see.
    written_steps: over so many steps the share of composed phrasings grows from nothing to all.
    Raises HYWUError when the split isn't even.
    """

    def __init__(
        self, pool: ImagePool, tasks: Sequence[str], batch_size: int, size: int, seed: int = 0,
        only: str = "", written_steps: int = 0,
    ) -> None:  # fmt: skip
        if batch_size % len(tasks):
            raise HYWUError(
                f"training: a batch of {batch_size} can't hold {len(tasks)} tasks equally often; "
                f"choose a multiple of {len(tasks)}."
            )
        self.pool, self.size, self.seed, self.only = pool, size, seed, only
        self.written_steps = written_steps
        self.names = list(tasks) * (batch_size // len(tasks))

    def __call__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        clean = self.pool.crops(len(self.names), self.size, generator)
        composed = min(1.0, step / self.written_steps) if self.written_steps else 1.0
        batch = make_batch(clean, self.names, generator, carriers=True, composed=composed)
        if not self.only:
            return batch
        return batch.select([i for i, task in enumerate(batch.task) if task == self.only])
