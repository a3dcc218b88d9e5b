"""Batches of crops from a user's own pairs.

A source of batches is a function of the step (`BatchSource`), so that a resumed run sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import HYWUError
from ..images import MAX_SIDE
from .base import Batch
from .crops import POLICIES, Order, Size, cut, nearest, sizes_of, whole
from .decoding import Ahead, Images
from .pairs import Pair, number_of_references, size_of

__all__ = ["Ahead", "Images", "PairBatches", "whole"]


class PairBatches:
    """Batches of crops from a user's own pairs: the same place in source and target, mirrored by chance.
    Images smaller than a crop are enlarged. An epoch shows each pair once. References are seen whole.

    size: pixels per side of a crop; or several (height, width): each pair goes to the one whose proportions are
        nearest, and each batch is of one.
    only: train on the pairs of this task alone.
    crop: of `POLICIES`.
    max_side: pixels per side that images are scaled down to when they are read; None for 512, or the crop's.
    cache: folder of decoded images, see `Images`.
    workers: threads that decode.
    Raises HYWUError unless every pair has as many references.
    """

    def __init__(
        self, pairs: Sequence[Pair], batch_size: int, size: int | Sequence[Size], seed: int = 0, only: str = "",
        *, crop: str = "random", max_side: int | None = None, cache: Path | None = None, workers: int | None = None,
    ) -> None:  # fmt: skip
        if only:
            tasks = list(dict.fromkeys(pair.task for pair in pairs))
            pairs = [pair for pair in pairs if pair.task == only]
            if not pairs:
                raise HYWUError(
                    f"training: no pair is of the task '{only}'; there are {', '.join(tasks)}."
                )
        if not pairs:
            raise HYWUError("training: there are no pairs to train on.")
        if crop not in POLICIES:
            raise HYWUError(f"training: the crop '{crop}'; it is one of {', '.join(POLICIES)}.")
        self.pairs, self.batch_size, self.seed, self.crop = list(pairs), batch_size, seed, crop
        self.sizes = sizes_of(size)
        self.references = number_of_references(self.pairs)
        self.images = Images(
            max_side=max_side or max(MAX_SIDE, *map(max, self.sizes)), folder=cache, workers=workers
        )
        self._order = Order(self._groups(), batch_size, seed)

    def _groups(self) -> list[list[int]]:
        """The pairs of each size that has any; `sizes` keeps those."""
        groups: dict[int, list[int]] = {}
        for i, pair in enumerate(self.pairs):
            width, height = size_of(pair) if len(self.sizes) > 1 else (1, 1)
            groups.setdefault(nearest((height, width), self.sizes), []).append(i)
        self.sizes = tuple(self.sizes[which] for which in sorted(groups))
        return [groups[which] for which in sorted(groups)]

    def __call__(self, step: int) -> Batch:
        group, chosen = self._order(step)
        return self._batch(chosen, self.sizes[group], self.seed * 1_000_003 + step)

    def once(self) -> list[Batch]:
        """Every pair once, in batches; the same crops on every call."""
        return [
            self._batch(group[i : i + self.batch_size], size, self.seed + i)
            for group, size in zip(self._order.groups, self.sizes, strict=True)
            for i in range(0, len(group), self.batch_size)
        ]

    def _batch(self, chosen: Sequence[int], size: Size, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        pairs = [self.pairs[i] for i in chosen]
        # all are under way before the first is waited for, and none is lost to the limit on memory meanwhile
        held = {image: self.images.future(image) for pair in pairs for image in pair.images}
        read = {image: future.result() for image, future in held.items()}
        crops = [
            cut(torch.stack([read[p.source], read[p.target]]), size, self.crop, generator)
            for p in pairs
        ]
        side = round(math.sqrt(math.prod(size)))
        seen = [tuple(whole(read[image], side) for image in p.references) for p in pairs]
        return Batch(
            torch.stack([source for source, _ in crops]),
            torch.stack([target for _, target in crops]),
            tuple(pair.instruction for pair in pairs),
            tuple(pair.task for pair in pairs),
            tuple(seen) if self.references else (),
        )
