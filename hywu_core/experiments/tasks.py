"""Edits made by arithmetic: what the editor is pretrained on, and the conflict pairs kept out of it.

A task turns clean photographs into (source, target) pairs, batched in torch, and has phrasings. The
two directions of a pair draw their sources from one function, so that only the instruction tells them
apart; the degree of the source varies and is not told. The last two phrasings of a task are held out
of every training and share no template with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HYWUError
from ..training.base import Batch
from . import phrasings
from .images import ImagePool

#: clean ``[B, 3, H, W]`` in 0..1, random generator -> (source, target), the same shape and range
Make = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]

HELD_OUT = 2


@dataclass(frozen=True)
class Task:
    """name; phrasings (the last `HELD_OUT` never trained on); make; opposite: the pair's other task."""

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


# -- arithmetic ---------------------------------------------------------------------------------


def uniform(x: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """One draw an item, ``[B, 1, 1, 1]``."""
    return low + (high - low) * torch.rand(x.shape[0], 1, 1, 1, generator=generator)


def luminance(x: Tensor) -> Tensor:
    """Rec. 601 luma ``[B, 1, H, W]``."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, one sigma in pixels an item ``[B, 1, 1, 1]``; edges by replication."""
    radius = 9
    at = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (at / sigma.flatten()[:, None].clamp_min(0.05)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)
    rows = F.pad(x, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    rows = F.conv2d(rows, kernel[:, None, :, None], groups=kernel.shape[0])
    rows = F.conv2d(rows, kernel[:, None, None, :], groups=kernel.shape[0])
    return rows[0].unflatten(0, x.shape[:2])


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator)


def _tint(x: Tensor, red: float, green: float, blue: float) -> Tensor:
    return (x * x.new_tensor([red, green, blue]).view(1, 3, 1, 1)).clamp(0, 1)


def _age(x: Tensor, degree: Tensor, generator: torch.Generator) -> Tensor:
    """Sepia, fading, grain and vertical scratches; degree 0..1 an item."""
    sepia = luminance(x) * x.new_tensor([1.07, 0.88, 0.66]).view(1, 3, 1, 1)
    aged = torch.lerp(x, sepia, degree)
    aged = torch.lerp(aged, torch.full_like(x, 0.62), 0.4 * degree)
    aged = aged + 0.06 * degree * torch.randn(x[:, :1].shape, generator=generator)
    columns = torch.rand(x.shape[0], 1, 1, x.shape[3], generator=generator) < 0.05 * degree
    return torch.where(columns, aged + 0.25 * degree, aged).clamp(0, 1)


def _fog(x: Tensor, degree: Tensor | float) -> Tensor:
    """Towards a bright gray; the usual model of haze (Koschmieder) at one depth."""
    return x + degree * (0.85 - x)


# -- conflict pairs: one distribution of sources for both directions ------------------------------


def _blurred(x: Tensor, g: torch.Generator) -> Tensor:
    return blur(x, uniform(x, 0.3, 1.4, g))


def _aged(x: Tensor, g: torch.Generator) -> Tensor:
    return _age(x, uniform(x, 0.2, 0.6, g), g)


def _exposed(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    exposure = uniform(x, 0.6, 0.85, g)
    return x * exposure, exposure


def _hazy(x: Tensor, g: torch.Generator) -> Tensor:
    return _fog(x, uniform(x, 0.2, 0.5, g))


def _make_blur(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    source = _blurred(x, g)
    return source, blur(source, torch.full((x.shape[0], 1, 1, 1), 3.0))


def _make_deblur(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return _blurred(x, g), x


def _make_age(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    source = _aged(x, g)
    # without fresh grain or scratches, which no model could foretell
    sepia = luminance(source) * x.new_tensor([1.07, 0.88, 0.66]).view(1, 3, 1, 1)
    return source, torch.lerp(sepia, torch.full_like(x, 0.62), 0.35).clamp(0, 1)


def _make_restore(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return _aged(x, g), x


def _make_darken(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    # to an absolute exposure: how much to darken must be read off the picture
    return _exposed(x, g)[0], 0.45 * x


def _make_brighten(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return _exposed(x, g)[0], x


def _make_fog(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    # as thick whatever the source: how much to add must be read off the picture
    return _hazy(x, g), _fog(x, 0.75)


def _make_dehaze(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return _hazy(x, g), x


# -- pretraining ----------------------------------------------------------------------------------


def _fixed(change: Callable[[Tensor], Tensor]) -> Make:
    """An edit of the clean photograph without anything random."""
    return lambda x, g: (x, change(x).clamp(0, 1))


def _make_denoise(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return (x + uniform(x, 0.03, 0.15, g) * _noise(x, g)).clamp(0, 1), x


def _sharpen(x: Tensor) -> Tensor:
    return x + 0.8 * (x - blur(x, torch.ones(x.shape[0], 1, 1, 1)))


def _structure(x: Tensor) -> Tensor:
    return x + 0.6 * (x - blur(x, torch.full((x.shape[0], 1, 1, 1), 3.0)))


def _emboss(x: Tensor) -> Tensor:
    y = F.pad(luminance(x), (1, 1, 1, 1), mode="replicate")
    return (0.5 + y[..., 2:, 2:] - y[..., :-2, :-2]).expand_as(x)


def _detail(x: Tensor) -> Tensor:
    return 0.5 + 1.5 * (x - blur(x, torch.full((x.shape[0], 1, 1, 1), 2.0)))


def _glow(x: Tensor) -> Tensor:
    return 1 - (1 - x) * (1 - 0.5 * blur(x, torch.full((x.shape[0], 1, 1, 1), 3.0)))


def _edges(x: Tensor) -> Tensor:
    y = F.pad(luminance(x), (1, 1, 1, 1), mode="replicate")
    dx, dy = y[..., 1:-1, 2:] - y[..., 1:-1, :-2], y[..., 2:, 1:-1] - y[..., :-2, 1:-1]
    return (1 - 2 * (dx.square() + dy.square() + 1e-8).sqrt()).expand_as(x)


def _warm(x: Tensor) -> Tensor:
    return _tint(x, 1.18, 1.02, 0.8)


def _cool(x: Tensor) -> Tensor:
    return _tint(x, 0.8, 0.98, 1.2)


def _saturation(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.lerp(luminance(x), x, factor)


def _contrast(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (x - 0.5) * factor + 0.5


def _task(name: str, make: Make, opposite: str, *texts: str) -> Task:
    return Task(name, tuple(dict.fromkeys(texts)), make, opposite)


CONFLICT: dict[str, Task] = {
    task.name: task
    for task in (
        _task("blur", _make_blur, "deblur", *phrasings.BLUR),
        _task("deblur", _make_deblur, "blur", *phrasings.DEBLUR),
        _task("age", _make_age, "restore", *phrasings.AGE),
        _task("restore", _make_restore, "age", *phrasings.RESTORE),
        _task("darken", _make_darken, "brighten", *phrasings.DARKEN),
        _task("brighten", _make_brighten, "darken", *phrasings.BRIGHTEN),
        _task("fog", _make_fog, "dehaze", *phrasings.FOG),
        _task("dehaze", _make_dehaze, "fog", *phrasings.DEHAZE),
    )
}

PRETRAINING: dict[str, Task] = {
    task.name: task
    for task in (
        _task("identity", _fixed(lambda x: x), "",
              "keep the image", "do nothing", "leave the picture as it is", "no change",
              "return the same photo", "copy this image", "hands off", "preserve everything"),
        _task("grayscale", _fixed(lambda x: luminance(x).expand_as(x)), "",
              "make it black and white", "convert to grayscale", "remove the colour",
              "a monochrome version", "turn the picture gray", "desaturate completely",
              "only shades of gray", "colourless please"),
        _task("warm", _fixed(_warm), "",
              "make it warmer", "add a warm tint", "warm up the colours", "shift towards orange",
              "warmer white balance", "a warm look", "golden hour tones", "cosy orange mood"),
        _task("cool", _fixed(_cool), "",
              "make it cooler", "add a cool tint", "cool down the colours", "shift towards blue",
              "cooler white balance", "a cold look", "icy tones", "wintry blue mood"),
        _task("invert", _fixed(lambda x: 1 - x), "",
              "invert the colours", "make a negative", "photographic negative", "invert this image",
              "swap light and dark", "negate the picture", "like a film negative", "reverse all values"),
        _task("denoise", _make_denoise, "",
              "remove the noise", "denoise the image", "clean the grain", "reduce the noise",
              "a noise-free version", "get rid of the speckles", "grainless please", "quiet the static"),
        _task("saturate", _fixed(_saturation(1.7)), "",
              "more saturation", "make the colours vivid", "boost the colours", "saturate the image",
              "stronger colours", "a more colourful picture", "punchy hues", "let it pop"),
        _task("desaturate", _fixed(_saturation(0.5)), "",
              "less saturation", "mute the colours", "make the colours paler", "soften the colours",
              "weaker colours", "a less colourful picture", "subdued hues", "washed palette"),
        _task("more_contrast", _fixed(_contrast(1.5)), "",
              "more contrast", "increase the contrast", "stronger contrast", "make it contrasty",
              "boost the contrast", "a high contrast look", "deeper blacks, whiter whites", "bold tones"),
        _task("less_contrast", _fixed(_contrast(0.6)), "",
              "less contrast", "reduce the contrast", "weaker contrast", "flatten the tones",
              "lower the contrast", "a low contrast look", "gentle matte finish", "even it out"),
        _task("sharpen", _fixed(_sharpen), "",
              "sharpen the image", "apply an unsharp mask", "sharpen the edges", "add sharpening",
              "increase the sharpness", "make it a bit sharper", "edgier outlines", "accentuate texture"),
        _task("posterize", _fixed(lambda x: (x * 3).round() / 3), "",
              "posterize the image", "use four levels a channel", "make it a poster",
              "reduce the number of colours", "posterize this", "flat colour bands",
              "screen print style", "limited palette"),
        _task("sketch", _fixed(_edges), "",
              "draw the edges", "turn it into a sketch", "a pencil drawing", "outline the picture",
              "edges only", "make a line drawing", "graphite on paper", "trace contours"),
        _task("emboss", _fixed(_emboss), "",
              "emboss the image", "make it a relief", "a gray relief", "stamp it into metal",
              "an embossed look", "give it an emboss effect", "hammered like a coin", "raised plaster"),
        _task("detail", _fixed(_detail), "",
              "show only the texture", "a high pass filter", "keep nothing but the details",
              "extract the fine structure", "only the details on gray", "apply a high pass",
              "isolate tiny features", "strip away every large tone"),
        _task("structure", _fixed(_structure), "",
              "add local contrast", "bring out the structure", "more local contrast", "an hdr look",
              "make it gritty", "give it punchy structure", "tone mapped drama", "rugged and gritty"),
        _task("glow", _fixed(_glow), "",
              "add a glow", "make it glow", "a dreamy bloom", "add bloom", "a glowing look",
              "let the lights bloom", "ethereal shine", "halo around bright spots"),
        _task("swap", _fixed(lambda x: x.flip(1)), "",
              "swap red and blue", "exchange the red and blue channels", "bgr instead of rgb",
              "reverse the channel order", "red becomes blue", "swap the colour channels",
              "blue skies turn orange", "permute rgb"),
    )
}  # fmt: skip

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

    held_out: phrasings from those kept out of training, instead of the seen ones. carriers: put words
    around most of the seen ones that say nothing of the edit ("please …, thanks"). composed: the share
    of items whose phrasing is drawn from all seen ones; the others' is from a task's first few.
    """
    if len(tasks) != clean.shape[0]:
        raise HYWUError(f"{len(tasks)} tasks for {clean.shape[0]} images; give one for each.")
    source, target = torch.empty_like(clean), torch.empty_like(clean)
    instructions = [""] * len(tasks)
    for name in dict.fromkeys(tasks):
        task = get_task(name)
        items = [i for i, other in enumerate(tasks) if other == name]
        source[items], target[items] = task.make(clean[items], generator)
        choices = task.held_out if held_out else task.seen
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
