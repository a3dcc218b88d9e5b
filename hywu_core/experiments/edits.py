"""Edits made by arithmetic on images ``[B, 3, H, W]`` in 0..1: filters, degradations, drawings.

All in torch on the images' device; random draws come from a generator, wherever it lives, so that the
same seed gives the same examples. Only JPEG goes through Pillow.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..images import encode_image, load_image, to_pillow, to_tensor

#: clean ``[B, 3, H, W]`` in 0..1, random generator -> (source, target), the same shape and range
Make = Callable[[Tensor, Generator], tuple[Tensor, Tensor]]

HELD_OUT = 2


@dataclass(frozen=True)
class Task:
    """One edit: its name, its phrasings (the last `HELD_OUT` never trained on), and what makes it.

    opposite: the pair's other task.
    """

    name: str
    phrasings: tuple[str, ...]
    make: Make
    opposite: str = ""

    @property
    def seen(self) -> tuple[str, ...]:
        return self.phrasings[:-HELD_OUT]

    @property
    def held_out(self) -> tuple[str, ...]:
        return self.phrasings[-HELD_OUT:]


def task(name: str, make: Make, opposite: str, *texts: str) -> Task:
    """A task whose phrasings are each there once."""
    return Task(name, tuple(dict.fromkeys(texts)), make, opposite)


# -- draws --------------------------------------------------------------------------------------


def rand(like: Tensor, g: Generator, *shape: int) -> Tensor:
    """Uniform in 0..1, where `like` is."""
    return torch.rand(shape, generator=g, device=g.device).to(like)


def randn(like: Tensor, g: Generator, *shape: int) -> Tensor:
    """Standard normal, where `like` is."""
    return torch.randn(shape, generator=g, device=g.device).to(like)


def uniform(x: Tensor, low: float, high: float, generator: Generator) -> Tensor:
    """One draw an item, ``[B, 1, 1, 1]``."""
    return low + (high - low) * rand(x, generator, x.shape[0], 1, 1, 1)


def number(g: Generator, low: float, high: float) -> float:
    """One draw in low..high."""
    return low + (high - low) * float(torch.rand((), generator=g, device=g.device))


def whole_number(g: Generator, low: int, high: int) -> int:
    """One draw in low..high - 1."""
    return int(torch.randint(low, high, (), generator=g, device=g.device))


# -- makers of makers -----------------------------------------------------------------------------


def fixed(change: Callable[[Tensor], Tensor]) -> Make:
    """An edit of the clean photograph without anything random."""
    return lambda x, g: (x, change(x).clamp(0, 1))


def undo(damage: Callable[[Tensor, Generator], Tensor]) -> Make:
    """From a damaged photograph, item by item damaged in its own way, back to the clean one."""

    def make(x: Tensor, g: Generator) -> tuple[Tensor, Tensor]:
        return torch.cat([damage(x[i : i + 1], g) for i in range(len(x))]).clamp(0, 1), x

    return make


# -- colours and tones ------------------------------------------------------------------------------


def luminance(x: Tensor) -> Tensor:
    """Rec. 601 luma ``[B, 1, H, W]``."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def tint(x: Tensor, red: float, green: float, blue: float) -> Tensor:
    return (x * x.new_tensor([red, green, blue]).view(1, 3, 1, 1)).clamp(0, 1)


def saturation(x: Tensor, factor: float) -> Tensor:
    return torch.lerp(luminance(x), x, factor)


def contrast(x: Tensor, factor: float) -> Tensor:
    return (x - 0.5) * factor + 0.5


def rotate_hue(x: Tensor, degrees: float) -> Tensor:
    """Turn the colours around the gray axis (Rodrigues' rotation)."""
    angle, third = math.radians(degrees), 1 / math.sqrt(3)
    cross = third * x.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    turn = math.cos(angle) * torch.eye(3).to(x) + math.sin(angle) * cross
    return torch.einsum("ij,bjhw->bihw", turn + (1 - math.cos(angle)) / 3, x)


def posterized(x: Tensor, levels: float) -> Tensor:
    return (x * levels).round() / levels


def cast(x: Tensor, g: Generator) -> Tensor:
    return x * (0.6 + 0.4 * rand(x, g, 1, 3, 1, 1))


def banded(x: Tensor, g: Generator) -> Tensor:
    return posterized(x, whole_number(g, 4, 10))


# -- filters ----------------------------------------------------------------------------------------


def padded(x: Tensor, by: int) -> Tensor:
    return F.pad(x, (by,) * 4, mode="replicate")


def blur(x: Tensor, sigma: Tensor | float) -> Tensor:
    """Gaussian blur, one sigma in pixels per item ``[B, 1, 1, 1]`` or one for all; edges by replication."""
    radius = 9
    if not isinstance(sigma, Tensor):
        sigma = x.new_full((x.shape[0], 1, 1, 1), sigma)
    at = torch.arange(-radius, radius + 1, dtype=torch.float32, device=x.device)
    kernel = torch.exp(-0.5 * (at / sigma.flatten()[:, None].clamp_min(0.05)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)
    rows = padded(x, radius).flatten(0, 1)[None]
    rows = F.conv2d(rows, kernel[:, None, :, None], groups=kernel.shape[0])
    rows = F.conv2d(rows, kernel[:, None, None, :], groups=kernel.shape[0])
    return rows[0].unflatten(0, x.shape[:2])


@functools.lru_cache(maxsize=256)
def motion_kernel(length: float, angle: float) -> Tensor:
    """A line of `length` pixels at `angle`, ``[15, 15]``, its points spread over their four neighbours."""
    radius, points = 7, int(8 * length)
    along = (torch.arange(points + 1) / points - 0.5) * (length - 1)
    y, x = radius + along * math.sin(angle), radius + along * math.cos(angle)
    kernel = torch.zeros(2 * radius + 1, 2 * radius + 1)
    for down in (0, 1):
        for right in (0, 1):
            row, column = y.floor().long() + down, x.floor().long() + right
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
            kernel.index_put_((row, column), weight, accumulate=True)
    return kernel / kernel.sum()


def motion(x: Tensor, length: float, angle: float) -> Tensor:
    """Smear along a line; length up to 13 pixels, angle in radians."""
    kernel = motion_kernel(length, angle).to(x)
    weight = kernel.expand(x.shape[1], 1, -1, -1)
    return F.conv2d(padded(x, kernel.shape[0] // 2), weight, groups=x.shape[1])


def shaken(x: Tensor, g: Generator) -> Tensor:
    return motion(x, number(g, 3, 9), number(g, 0, math.pi))


def shaken_sideways(x: Tensor, g: Generator) -> Tensor:
    return motion(x, number(g, 3, 9), 0.0)


def median(x: Tensor, radius: int) -> Tensor:
    side = 2 * radius + 1
    windows = F.unfold(padded(x, radius), side).unflatten(1, (x.shape[1], -1))
    return windows.median(2)[0].view_as(x)


def dilated(x: Tensor, radius: int) -> Tensor:
    return F.max_pool2d(padded(x, radius), 2 * radius + 1, 1)


def eroded(x: Tensor, radius: int) -> Tensor:
    return -dilated(-x, radius)


def moved(x: Tensor, down: int, right: int) -> Tensor:
    """By up to 5 pixels."""
    height, width = x.shape[2:]
    return padded(x, 5)[..., 5 - down : 5 - down + height, 5 - right : 5 - right + width]


def unsharp_mask(x: Tensor, sigma: float, amount: float) -> Tensor:
    return x + amount * (x - blur(x, sigma))


def emboss(x: Tensor) -> Tensor:
    y = padded(luminance(x), 1)
    return (0.5 + y[..., 2:, 2:] - y[..., :-2, :-2]).expand_as(x)


def edges(x: Tensor) -> Tensor:
    y = padded(luminance(x), 1)
    dx, dy = y[..., 1:-1, 2:] - y[..., 1:-1, :-2], y[..., 2:, 1:-1] - y[..., :-2, 1:-1]
    return (1 - 2 * (dx.square() + dy.square() + 1e-8).sqrt()).expand_as(x)


def laplacian(x: Tensor) -> Tensor:
    y = padded(x, 1)
    around = y[..., 1:-1, 2:] + y[..., 1:-1, :-2] + y[..., 2:, 1:-1] + y[..., :-2, 1:-1]
    return 0.5 + 4 * x - around


def band_pass(x: Tensor) -> Tensor:
    y = luminance(x)
    return (0.5 + 4 * (blur(y, 1.0) - blur(y, 2.0))).expand_as(x)


def glow(x: Tensor) -> Tensor:
    return 1 - (1 - x) * (1 - 0.5 * blur(x, 3.0))


# -- resolution and compression -----------------------------------------------------------------------


def pixelated(x: Tensor, side: int) -> Tensor:
    height, width = x.shape[2:]
    y = F.avg_pool2d(x, side, ceil_mode=True, count_include_pad=False)
    return y.repeat_interleave(side, 2).repeat_interleave(side, 3)[..., :height, :width]


def reduced(x: Tensor, factor: float) -> Tensor:
    """Reduced by a factor and enlarged again."""
    small = [max(1, round(side / factor)) for side in x.shape[2:]]
    y = F.interpolate(x, small, mode="bilinear", antialias=True)
    return F.interpolate(y, x.shape[2:], mode="bicubic").clamp(0, 1)


def jpeg(x: Tensor, quality: int) -> Tensor:
    """Written as JPEG and read again, through Pillow."""
    files = (io.BytesIO(encode_image(to_pillow(image), "JPEG", quality)) for image in x)
    return torch.stack([to_tensor(load_image(file)) for file in files]).to(x) / 255


# -- damage -------------------------------------------------------------------------------------------


def noisy(x: Tensor, g: Generator) -> Tensor:
    return x + number(g, 0.03, 0.15) * randn(x, g, *x.shape)


def gray_noise(x: Tensor, g: Generator) -> Tensor:
    return x + number(g, 0.03, 0.13) * randn(x, g, len(x), 1, *x.shape[2:])


def speckled(x: Tensor, g: Generator) -> Tensor:
    return x * (1 + number(g, 0.1, 0.35) * randn(x, g, *x.shape))


def coarse_noise(x: Tensor, g: Generator) -> Tensor:
    small = (-(-side // 2) for side in x.shape[2:])
    noise = F.interpolate(randn(x, g, len(x), 3, *small), x.shape[2:], mode="bilinear")
    return x + number(g, 0.04, 0.14) * noise


def striped(x: Tensor, g: Generator) -> Tensor:
    height, width = x.shape[2:]
    shape = (1, width) if number(g, 0, 1) < 0.5 else (height, 1)
    return x + number(g, 0.03, 0.11) * randn(x, g, len(x), 1, *shape)


def salted(x: Tensor, g: Generator) -> Tensor:
    """Some pixels black, some white."""
    share, at = number(g, 0.01, 0.13), rand(x, g, len(x), 1, *x.shape[2:])
    black, white = at < share / 2, at > 1 - share / 2
    return x.masked_fill(black, 0.0).masked_fill(white, 1.0)


def ghosted(x: Tensor, g: Generator) -> Tensor:
    down, right = whole_number(g, -4, 5), whole_number(g, -4, 5)
    return torch.lerp(x, moved(x, down, right), number(g, 0.2, 0.45))


def lined(x: Tensor, g: Generator) -> Tensor:
    """One to six straight strokes of any direction, width and colour, more or less opaque."""
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device)[:, None]
    columns = torch.arange(width, device=x.device)
    for _ in range(whole_number(g, 1, 7)):
        angle = 0.0 if number(g, 0, 1) < 0.3 else number(g, 0, math.pi)
        across = (columns - number(g, 0, width)) * math.cos(angle)
        distance = across + (rows - number(g, 0, height)) * math.sin(angle)
        drawn = distance.abs() < 0.4 + 1.2 * number(g, 0, 1) ** 2
        painted = torch.lerp(x, _paint(x, g, 0.3), number(g, 0.4, 1))
        x = torch.where(drawn, painted, x)
    return x


def boxed(x: Tensor, g: Generator) -> Tensor:
    """Two to eight rectangles painted over."""
    x = x.clone()
    height, width = x.shape[2:]
    for _ in range(whole_number(g, 2, 9)):
        tall, wide = whole_number(g, 2, min(9, height)), whole_number(g, 2, min(9, width))
        top, left = whole_number(g, 0, height - tall), whole_number(g, 0, width - wide)
        x[..., top : top + tall, left : left + wide] = _paint(x, g, 0.5)
    return x


def _paint(x: Tensor, g: Generator, black: float) -> Tensor:
    """A colour ``[1, 3, 1, 1]``: half of the time any, else black or white."""
    if number(g, 0, 1) < 0.5:
        return rand(x, g, 1, 3, 1, 1)
    return x.new_full((1, 3, 1, 1), float(number(g, 0, 1) > black))


def badly_stored(x: Tensor, g: Generator) -> Tensor:
    """Noise under JPEG."""
    return jpeg((x + 0.05 * randn(x, g, *x.shape)).clamp(0, 1), whole_number(g, 25, 70))


# -- what the conflict pairs are made of ----------------------------------------------------------------


def aged(x: Tensor, degree: Tensor, g: Generator) -> Tensor:
    """Sepia, fading, grain and vertical scratches; degree 0..1 per item."""
    old = torch.lerp(x, sepia(x), degree)
    old = torch.lerp(old, torch.full_like(x, 0.62), 0.4 * degree)
    old = old + 0.06 * degree * randn(x, g, len(x), 1, *x.shape[2:])
    columns = rand(x, g, len(x), 1, 1, x.shape[3]) < 0.05 * degree
    return torch.where(columns, old + 0.25 * degree, old).clamp(0, 1)


def sepia(x: Tensor) -> Tensor:
    return luminance(x) * x.new_tensor([1.07, 0.88, 0.66]).view(1, 3, 1, 1)


def foggy(x: Tensor, degree: Tensor | float) -> Tensor:
    """Towards a bright gray; the usual model of haze (Koschmieder) at one depth."""
    return x + degree * (0.85 - x)
