"""Sizes that the model knows, and images brought to them.

A *bucket* is a height and width with an own ratio token: 33 of falling height in steps of a sixteenth of
the base size, and four that were added later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ...errors import HYWUError
from ...images import to_tensor

#: (height, width) of the buckets added behind the regular ones, of any base size.
EXTRA = ((1024, 768), (1280, 720), (768, 1024), (720, 1280))

#: Smallest side of an image, and largest ratio of its sides, that is taken as a source.
SMALLEST, LONGEST = 16, 16

#: An output is brought to its source's aspect from this difference of height/width on.
ASPECT_DIFFERENCE = 0.01


@dataclass(frozen=True)
class Size:
    """Height and width in pixels, and the index of the ratio token that goes with them."""

    height: int
    width: int
    ratio: int


def buckets(base: int) -> tuple[tuple[int, int], ...]:
    """(height, width) by index of the ratio token: of the published base size 1024, 37."""
    step, low, high = base // 16, base // 2, base * 2
    sizes = [(low, width) for width in range(high, 1536 * base // 1024, -step)]
    sizes += [(low + step * i, 1536 * base // 1024 - step * i) for i in range(17)]
    sizes += [(height, low) for height in range(1536 * base // 1024 + step, high + 1, step)]
    return (*sizes, *EXTRA)


def nearest(height: float, width: float, base: int) -> int:
    """Index of the bucket whose height/width is nearest; of equals the first."""
    wanted = height / width
    sizes = buckets(base)
    return min(range(len(sizes)), key=lambda i: abs(sizes[i][0] / sizes[i][1] - wanted))


def parse_size(text: str, base: int, factor: int) -> Size | None:
    """The size that a user named; None for "auto".

    text: "auto", "1024x768" (height x width, in steps of `factor`), "4:3" (width:height, the nearest bucket),
        or "<img_ratio_5>". A custom size takes the ratio token of the nearest bucket.
    Raises HYWUError on a size that isn't allowed.
    """
    text = text.strip().lower()
    if text == "auto":
        return None
    sizes = buckets(base)
    if match := re.fullmatch(r"<img_ratio_(\d+)>", text):
        if (index := int(match[1])) < len(sizes):
            return Size(*sizes[index], index)
        raise HYWUError(f"Size '{text}': the ratios go from 0 to {len(sizes) - 1}; choose one.")
    if match := re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", text):
        width, height = map(float, match.groups())
        if width > 0 and height > 0:
            index = nearest(height, width, base)
            return Size(*sizes[index], index)
    if match := re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)", text):
        return custom_size(int(match[1]), int(match[2]), base, factor)
    raise HYWUError(
        f"Size '{text}' is not understood; write auto, height x width such as {base}x{base}, or a ratio "
        "of width to height such as 3:2."
    )


def custom_size(height: int, width: int, base: int, factor: int) -> Size:
    """A size in pixels. Raises HYWUError where it is no multiple of `factor`, or too long or small."""
    if height % factor or width % factor or not height or not width:
        near = [max(factor, round(side / factor) * factor) for side in (height, width)]
        raise HYWUError(
            f"Size {height}x{width}: both must be multiples of {factor}; the nearest is "
            f"{near[0]}x{near[1]}."
        )
    if max(height, width) > LONGEST * min(height, width):
        raise HYWUError(
            f"Size {height}x{width}: one side is more than {LONGEST} times the other; choose a less "
            "extreme ratio."
        )
    return Size(height, width, nearest(height, width, base))


def check_source(image: Image.Image, name: str = "The source image") -> None:
    """Raise HYWUError on an image that no bucket can hold sensibly."""
    width, height = image.size
    if min(width, height) < SMALLEST or max(width, height) > LONGEST * min(width, height):
        raise HYWUError(
            f"{name} is {width} x {height} pixels; each side must be {SMALLEST} or more and no side more "
            f"than {LONGEST} times the other. Crop or enlarge it."
        )


def vae_image(image: Image.Image, base: int, crop: bool = True) -> tuple[Image.Image, Size]:
    """The image in its bucket's size: scaled to cover it and cut in the middle, or (crop False) squeezed."""
    index = nearest(image.height, image.width, base)
    height, width = buckets(base)[index]
    lanczos = Image.Resampling.LANCZOS
    if not crop:
        return image.resize((width, height), lanczos), Size(height, width, index)
    # the side that fits exactly keeps its length; the other is rounded
    if image.height / image.width < height / width:
        whole = (round(image.width * height / image.height), height)
    else:
        whole = (width, round(image.height * width / image.width))
    left, top = round((whole[0] - width) / 2), round((whole[1] - height) / 2)
    made = image.resize(whole, lanczos).crop((left, top, left + width, top + height))
    return made, Size(height, width, index)


def align(image: Image.Image, sources: Sequence[Image.Image], base: int) -> Image.Image:
    """The output in the aspect of the first source that shares its bucket, of about base² pixels.

    Where the aspects differ by less than ASPECT_DIFFERENCE, or no bucket is shared, as it is.
    """
    bucket = nearest(image.height, image.width, base)
    for source in sources:
        if nearest(source.height, source.width, base) != bucket:
            continue
        wanted = source.height / source.width
        if abs(image.height / image.width - wanted) < ASPECT_DIFFERENCE:
            return image
        height, width = base * wanted**0.5, base / wanted**0.5
        return image.resize((round(width), round(height)), Image.Resampling.LANCZOS)
    return image


def to_pixels(image: Image.Image) -> Tensor:
    """float32 ``[3, H, W]`` in -1..1."""
    return to_tensor(image).float() / 127.5 - 1
