"""Crops of pairs: where they are cut, at what scale, in which resolutions; which pairs make a step's batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HYWUError

#: Policy -> what it does, for messages and help.
POLICIES = {
    "random": "at a random place of the image as it was read",
    "cover": "the image scaled until it just covers the crop, at a random place along the longer side",
    "zoom": "at a random place and a random scale between the two",
    "center": "as cover, from the middle, never mirrored: the same on every call",
}

#: (height, width) in pixels.
Size = tuple[int, int]


def sizes_of(size: int | Sequence[Size]) -> tuple[Size, ...]:
    """One square, or several resolutions. Raises HYWUError on none, and on sides below 1."""
    sizes = ((size, size),) if isinstance(size, int) else tuple((int(h), int(w)) for h, w in size)
    if not sizes or min(map(min, sizes)) < 1 or len(set(sizes)) < len(sizes):
        raise HYWUError(
            f"training: the crops' sizes are {size}; give each once, sides of 1 or more."
        )
    return sizes


def nearest(image: Size, sizes: Sequence[Size]) -> int:
    """Index of the size whose proportions are nearest; of equal ones the largest that needs no enlarging."""

    def distance(i: int) -> tuple[float, bool, float]:
        height, width = sizes[i]
        apart = abs(math.log(height / width) - math.log(image[0] / image[1]))
        enlarged = height > image[0] or width > image[1]
        area = height * width
        return round(apart, 9), enlarged, area if enlarged else -area

    return min(range(len(sizes)), key=distance)


def cut(both: Tensor, size: Size, policy: str, generator: torch.Generator) -> Tensor:
    """uint8 ``[N, 3, H, W]`` -> float32 ``[N, 3, height, width]`` in 0..1: one place of all N, mirrored by chance.

    policy: of `POLICIES`. Images smaller than the crop are enlarged.
    """
    sides = both.shape[2:]
    pixels = both.float() / 255
    y, x, mirror = torch.rand(3, generator=generator).tolist()
    covers = max(wanted / side for wanted, side in zip(size, sides, strict=True))
    factor = covers if policy in ("cover", "center") else max(1.0, covers)
    if policy == "zoom":
        at = float(torch.rand(1, generator=generator))
        factor = covers ** (1 - at) * factor**at
    if factor != 1:
        shape = [max(w, round(s * factor)) for w, s in zip(size, sides, strict=True)]
        pixels = F.interpolate(pixels, shape, mode="bilinear", antialias=True).clamp(0, 1)
    if policy == "center":
        y = x = 0.5
        mirror = 1.0
    top, left = (
        int(at * (side - wanted + 1))
        for at, side, wanted in zip((y, x), pixels.shape[2:], size, strict=True)
    )
    pixels = pixels[:, :, top : top + size[0], left : left + size[1]]
    return pixels.flip(3) if mirror < 0.5 else pixels


def whole(image: Tensor, size: int) -> Tensor:
    """uint8 ``[3, H, W]`` -> float32 in 0..1 with about ``size x size`` pixels and the same proportions."""
    sides = image.shape[1:]
    zoom = size / math.sqrt(math.prod(sides))
    wanted = [max(1, round(side * zoom)) for side in sides]
    pixels = image[None].float() / 255
    if list(sides) != wanted:
        pixels = F.interpolate(pixels, wanted, mode="bilinear", antialias=True)
    return pixels[0].clamp(0, 1)


class Order:
    """Which examples make a step's batch: an epoch shows each once, in another order; a function of (seed, step).

    groups: the examples (their numbers) that may stand in one batch, a group per resolution. With several groups
    every batch is of one, their batches come in random order, and the last one of a group and epoch is filled up
    with examples of the same group.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        self.groups, self.batch_size, self.seed = [list(g) for g in groups], batch_size, seed
        self._parts = [
            (group, part)
            for group, members in enumerate(self.groups)
            for part in range(math.ceil(len(members) / batch_size))
        ]

    def __call__(self, step: int) -> tuple[int, list[int]]:
        """(group, the numbers of its examples)."""
        if len(self.groups) == 1:  # batches go across the ends of epochs
            places = range(step * self.batch_size, (step + 1) * self.batch_size)
            return 0, [self._at(0, *divmod(place, len(self.groups[0]))) for place in places]
        epoch, place = divmod(step, len(self._parts))
        order = shuffled(len(self._parts), self.seed * 7919 + epoch)
        group, part = self._parts[int(order[place])]
        count = len(self.groups[group])
        places = range(part * self.batch_size, (part + 1) * self.batch_size)
        return group, [self._at(group, epoch, place % count) for place in places]

    def _at(self, group: int, epoch: int, place: int) -> int:
        members = self.groups[group]
        # the seed of a single group is that of former versions
        order = shuffled(len(members), self.seed * 7919 + epoch + 1_000_003 * group)
        return members[int(order[place])]


@lru_cache(64)
def shuffled(count: int, seed: int) -> Tensor:
    """``[count]``, a random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
