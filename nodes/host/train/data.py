"""Examples of a training inside ComfyUI: a fixed number of crops of each pair, so that they can be cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ....hywu_core.images import MAX_SIDE, read_image
from ....hywu_core.training.base import Batch
from ....hywu_core.training.data import whole
from ....hywu_core.training.pairs import Pair, number_of_references

#: Bytes of decoded crops that stay in memory.
IN_MEMORY = 256 << 20


class FixedCrops:
    """step -> batch: each epoch shows every crop of every pair once, in another order.

    The first crop of a pair is its largest square, in the middle; the others lie at random places and
    are of random sizes down to `size` pixels. All are scaled to ``size x size``; source and target are
    cut at the same place. References are seen whole, of about as many pixels. Raises HYWUError unless
    every pair has as many.
    """

    def __init__(
        self, pairs: Sequence[Pair], batch_size: int, size: int, crops: int, seed: int
    ) -> None:
        self.pairs, self.batch_size, self.size = list(pairs), batch_size, size
        self.crops, self.seed = crops, seed
        self.references = number_of_references(self.pairs)
        self._cut = lru_cache(max(1, IN_MEMORY // (6 * size * size)))(self._read)
        self._whole = lru_cache(max(1, IN_MEMORY // (12 * size * size)))(self._read_whole)

    def __len__(self) -> int:
        return len(self.pairs) * self.crops

    def __call__(self, step: int) -> Batch:
        return self.batch([self._pick(step * self.batch_size + i) for i in range(self.batch_size)])

    def batch(self, places: Sequence[int]) -> Batch:
        """Crops by their number, below ``len(self)``; a pair's follow one another."""
        cuts = [self._cut(*divmod(place, self.crops)) for place in places]
        pairs = [self.pairs[place // self.crops] for place in places]
        source, target = (torch.stack([cut[side] for cut in cuts]).float() / 255 for side in (0, 1))
        further = tuple(tuple(map(self._whole, p.references)) for p in pairs)
        return Batch(
            source, target, tuple(p.instruction for p in pairs), tuple(p.task for p in pairs),
            further if self.references else (),
        )  # fmt: skip

    def singles(self) -> Iterator[Batch]:
        """Every crop by itself."""
        for place in range(len(self)):
            yield self.batch([place])

    def samples(self, count: int) -> Batch:
        """The first crop of `count` pairs, of as many different instructions as there are."""
        first: dict[str, int] = {}
        for i, pair in enumerate(self.pairs):
            first.setdefault(pair.instruction, i)
        chosen = list(dict.fromkeys([*first.values(), *range(len(self.pairs))]))[:count]
        return self.batch([i * self.crops for i in chosen])

    def _pick(self, index: int) -> int:
        epoch, place = divmod(index, len(self))
        return int(_order(len(self), self.seed * 7919 + epoch)[place])

    @property
    def _side(self) -> int:
        """Pixels of the longer side at which images are read."""
        return max(MAX_SIDE, 2 * self.size)

    def _read_whole(self, path: Path) -> Tensor:
        return whole(read_image(path, self._side), self.size)

    def _read(self, index: int, crop: int) -> tuple[Tensor, Tensor]:
        """uint8 ``[3, size, size]`` of source and target."""
        pair, side = self.pairs[index], self._side
        both = torch.stack([read_image(pair.source, side), read_image(pair.target, side)]).float()
        height, width = both.shape[2:]
        short = min(height, width)
        zoom, y, x = 1.0, 0.5, 0.5
        if crop:
            generator = torch.Generator().manual_seed((self.seed * 7919 + index) * 1009 + crop)
            zoom, y, x = torch.rand(3, generator=generator).tolist()
        edge = round(min(self.size, short) * (short / min(self.size, short)) ** zoom)
        top, left = round(y * (height - edge)), round(x * (width - edge))
        both = both[:, :, top : top + edge, left : left + edge]
        both = F.interpolate(both, (self.size, self.size), mode="bilinear", antialias=True)
        source, target = both.round().clamp(0, 255).byte()
        return source, target


@lru_cache(4)
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
