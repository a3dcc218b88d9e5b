"""Where a training's examples come from: the built-in tasks on an image pool, or a user's own pairs.

Each source is a function of the step (`BatchSource`), so that a resumed run sees what an uninterrupted one
would have seen.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..errors import HYWUError
from ..images import read_image
from .base import Batch
from .data import ImagePool, Pair
from .tasks import make_batch

logger = logging.getLogger(__name__)


class TaskBatches:
    """Batches that hold each task equally often, ``batch_size / len(tasks)`` times, in random crops.

    only: keep just this task's items of the same batches, so that what is trained on one task sees
    exactly the examples of it that the others see. written_steps: over so many steps the share of
    composed phrasings grows from nothing to all. Raises HYWUError when the split isn't even.
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


class PairBatches:
    """Batches from a user's own pairs: random crops, the same place in source and target, mirrored
    by chance. Pictures smaller than a crop are enlarged. An epoch shows each pair once.
    """

    def __init__(self, pairs: Sequence[Pair], batch_size: int, size: int, seed: int = 0) -> None:
        if not pairs:
            raise HYWUError("training: there are no pairs to train on.")
        self.pairs, self.batch_size, self.size, self.seed = list(pairs), batch_size, size, seed

    def __call__(self, step: int) -> Batch:
        chosen = [self._pick(step * self.batch_size + i) for i in range(self.batch_size)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        crops = [self._crop(pair, generator) for pair in chosen]
        return Batch(
            torch.stack([source for source, _ in crops]),
            torch.stack([target for _, target in crops]),
            tuple(pair.instruction for pair in chosen),
            tuple(pair.task for pair in chosen),
        )

    def _pick(self, index: int) -> Pair:
        """The index-th pair of an endless row of shuffled epochs."""
        epoch, place = divmod(index, len(self.pairs))
        generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
        order = torch.randperm(len(self.pairs), generator=generator)
        return self.pairs[int(order[place])]

    def _crop(self, pair: Pair, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.stack([read_image(pair.source), read_image(pair.target)]).float() / 255
        smallest = min(both.shape[2:])
        if smallest < self.size:
            factor = self.size / smallest
            shape = [max(self.size, round(side * factor)) for side in both.shape[2:]]
            both = F.interpolate(both, shape, mode="bilinear", antialias=True).clamp(0, 1)
        y, x, mirror = torch.rand(3, generator=generator).tolist()
        top, left = (
            int(at * (side - self.size + 1))
            for at, side in zip((y, x), both.shape[2:], strict=True)
        )
        both = both[:, :, top : top + self.size, left : left + self.size]
        source, target = both.flip(3) if mirror < 0.5 else both
        return source, target
