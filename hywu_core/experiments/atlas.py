"""Crops made on the device: all images in one uint8 buffer, with halved copies of each, read by index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Sizes of each image: whole, and halved twice; crops are reduced up to 4 times.
LEVELS = 3


class Atlas:
    """As `ImagePool`, on a device: a whole batch of crops in a few operations, without waiting for it.

    images: uint8 ``[3, H, W]`` of any sizes.
    Crops fall where `ImagePool`'s do; reduced ones are read between the pixels of a halved copy, so that they
    differ from its antialiased ones a little.
    """

    def __init__(self, images: Sequence[Tensor], device: torch.device | str) -> None:
        self.device = torch.device(device)
        pieces, shapes, starts, start = [], [], [], 0
        for image in images:
            level = image
            for _ in range(LEVELS):
                pieces.append(level.flatten())
                shapes.append(level.shape[1:])
                starts.append(start)
                start += level.numel()
                level = _halved(level)
        self._pixels = torch.cat(pieces).to(self.device)
        self._starts = torch.tensor(starts).view(-1, LEVELS)
        self._shapes = torch.tensor([list(shape) for shape in shapes]).view(-1, LEVELS, 2)

    def crops(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """float32 ``[count, 3, size, size]`` in 0..1: random places, 1 to 4 times reduced, mirrored."""
        index = torch.randint(len(self._starts), (count,), generator=generator)
        zoom, y, x, mirror = torch.rand(count, 4, generator=generator).unbind(1)
        shape = self._shapes[index, 0]
        side = (size * 4.0**zoom).minimum(shape.amin(1)).round()
        top, left = ((a * (n - side + 1)).floor() for a, n in zip((y, x), shape.T, strict=True))
        return self.cut(index, side, top, left, mirror < 0.5, size)

    def cut(
        self, index: Tensor, side: Tensor, top: Tensor, left: Tensor, mirror: Tensor, size: int
    ) -> Tensor:
        """Squares of images, all arguments but size ``[count]`` in host memory, reduced to `size` pixels."""
        level = (side / size).clamp(min=1).log2().floor().long().clamp(max=LEVELS - 1)
        height, width = self._shapes[index, level].unbind(1)
        start, scale = self._starts[index, level], 0.5 ** level.float()
        moved = [
            t.to(self.device, non_blocking=True)
            for t in (start, height, width, side * scale, top * scale, left * scale, mirror)
        ]
        start, height, width, side, top, left, mirror = moved
        at = (torch.arange(size, device=self.device) + 0.5) / size
        columns = torch.where(mirror[:, None], at.flip(0), at)
        y0, y1, fy = _between(top[:, None] + at * side[:, None], height)
        x0, x1, fx = _between(left[:, None] + columns * side[:, None], width)
        channel = torch.arange(3, device=self.device)[:, None, None]
        base = start[:, None, None, None] + channel * (height * width)[:, None, None, None]

        def read(rows: Tensor, columns: Tensor) -> Tensor:
            place = base + (rows * width[:, None])[:, None, :, None] + columns[:, None, None, :]
            return self._pixels[place].float()

        fy, fx = fy[:, None, :, None], fx[:, None, None, :]
        above = torch.lerp(read(y0, x0), read(y0, x1), fx)
        below = torch.lerp(read(y1, x0), read(y1, x1), fx)
        return torch.lerp(above, below, fy).div_(255)


def _between(at: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels on both sides of positions ``[count, size]`` (pixel centres at halves), and the second's share."""
    at = (at - 0.5).clamp(min=0).minimum((length - 1)[:, None].float())
    low = at.floor()
    high = (low + 1).minimum((length - 1)[:, None].float())
    return low.long(), high.long(), at - low


def _halved(image: Tensor) -> Tensor:
    """Half as many pixels per side, rounded up, each the mean of those it covers; uint8."""
    return F.avg_pool2d(image[None].float(), 2, ceil_mode=True)[0].round().byte()
