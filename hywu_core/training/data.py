"""Batches of crops from a user's own pairs, cached and made ahead.

A source of batches is a function of the step (`BatchSource`), so that a resumed run sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HYWUError
from .base import Batch, BatchSource
from .pairs import Pair, Source, number_of_references, read_source

#: Bytes of decoded images that stay in memory.
IN_MEMORY = 1 << 30


def whole(image: Tensor, size: int) -> Tensor:
    """uint8 ``[3, H, W]`` -> float32 in 0..1 with about ``size x size`` pixels and the same proportions."""
    sides = image.shape[1:]
    zoom = size / math.sqrt(math.prod(sides))
    wanted = [max(1, round(side * zoom)) for side in sides]
    pixels = image[None].float() / 255
    if list(sides) != wanted:
        pixels = F.interpolate(pixels, wanted, mode="bilinear", antialias=True)
    return pixels[0].clamp(0, 1)


class Images:
    """Decoded images, uint8 ``[3, H, W]``; the last ones used stay in memory, up to `most` bytes."""

    def __init__(self, most: int = IN_MEMORY) -> None:
        self.most, self.bytes = most, 0
        self._kept: OrderedDict[Source, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, source: Source) -> Tensor:
        with self._lock:
            if source in self._kept:
                self._kept.move_to_end(source)
                return self._kept[source]
        image = read_source(source)
        with self._lock:
            if source not in self._kept:
                self._kept[source] = image
                self.bytes += image.nbytes
            while self.bytes > self.most:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes
        return image


class Ahead:
    """A source of batches that makes the next step's batch while this one's is trained on.

    batches: step -> batch, called from another thread.
    Which step is made ahead changes no batch.
    """

    def __init__(self, batches: BatchSource) -> None:
        self.batches = batches
        self._pool = ThreadPoolExecutor(1, "hywu-batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        made, self._next = self._next, None
        batch = made[1].result() if made and made[0] == step else self.batches(step)
        self._next = (step + 1, self._pool.submit(self.batches, step + 1))
        return batch


class PairBatches:
    """Batches from a user's own pairs: random crops, the same place in source and target, mirrored by chance.
    Images smaller than a crop are enlarged. An epoch shows each pair once. References are seen whole.

    only: train on the pairs of this task alone.
    Raises HYWUError unless every pair has as many references.
    """

    def __init__(
        self, pairs: Sequence[Pair], batch_size: int, size: int, seed: int = 0, only: str = ""
    ) -> None:
        if only:
            tasks = list(dict.fromkeys(pair.task for pair in pairs))
            pairs = [pair for pair in pairs if pair.task == only]
            if not pairs:
                raise HYWUError(
                    f"training: no pair is of the task '{only}'; there are {', '.join(tasks)}."
                )
        if not pairs:
            raise HYWUError("training: there are no pairs to train on.")
        self.pairs, self.batch_size, self.size, self.seed = list(pairs), batch_size, size, seed
        self.references = number_of_references(self.pairs)
        self._image = Images()

    def __call__(self, step: int) -> Batch:
        chosen = [self._pick(step * self.batch_size + i) for i in range(self.batch_size)]
        return self._batch(chosen, self.seed * 1_000_003 + step)

    def once(self) -> list[Batch]:
        """Every pair once, in batches; the same crops on every call."""
        parts = range(0, len(self.pairs), self.batch_size)
        return [self._batch(self.pairs[i : i + self.batch_size], self.seed + i) for i in parts]

    def _batch(self, chosen: Sequence[Pair], seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        crops = [self._crop(pair, generator) for pair in chosen]
        return Batch(
            torch.stack([source for source, _ in crops]),
            torch.stack([target for _, target in crops]),
            tuple(pair.instruction for pair in chosen),
            tuple(pair.task for pair in chosen),
            tuple(map(self._seen_whole, chosen)) if self.references else (),
        )

    def _seen_whole(self, pair: Pair) -> tuple[Tensor, ...]:
        return tuple(whole(self._image(image), self.size) for image in pair.references)

    def _pick(self, index: int) -> Pair:
        """The index-th pair of an endless row of shuffled epochs."""
        epoch, place = divmod(index, len(self.pairs))
        generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
        order = torch.randperm(len(self.pairs), generator=generator)
        return self.pairs[int(order[place])]

    def _crop(self, pair: Pair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        both = torch.stack([self._image(pair.source), self._image(pair.target)]).float() / 255
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
