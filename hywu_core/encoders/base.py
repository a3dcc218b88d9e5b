"""What every encoder shares: what a generator reads, one signature, several images per item, padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..condition import Condition
from ..errors import HYWUError

#: What a checkpoint's encoder says of the number of images; absent where it is one.
IMAGES = "images"

Image = TypeVar("Image")
#: ``[B, 3, H, W]``, or B of ``[3, H, W]`` of any sizes.
Images = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Reads:
    """What a generator reads, as its checkpoint says it.

    parts: name -> width, in order.
    identity: of the encoder, with its "type".
    """

    parts: Mapping[str, int]
    identity: Mapping[str, Any]

    @classmethod
    def of(cls, config: Any) -> Reads:
        """config: a GeneratorConfig."""
        return cls(config.condition, config.encoder)

    @property
    def images(self) -> int:
        """Images per item that the generator was trained with."""
        return self.identity.get(IMAGES, 1)


class Encoder(Protocol):
    """(images, instructions, further images) -> Condition.

    parts: name -> width of what it makes, in order. identity: what a checkpoint records of it.
    """

    @property
    def parts(self) -> Mapping[str, int]: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __call__(self, images: Images, instructions: Sequence[str], *further: Images) -> Condition:
        """images: in 0..1, one instruction per image. further: the items' second images, third ones and so
        on, each like `images`, or a single one for all items. Raises HYWUError on a misfit.
        """
        ...


def number_of_images(count: int) -> dict[str, int]:
    """What an encoder's identity says of the number of images per item."""
    return {IMAGES: count} if count > 1 else {}


def number_warnings(reads: Reads, count: int) -> list[str]:
    """A sentence where items have another number of images than the generator was trained with."""
    trained = reads.images
    if count == trained:
        return []
    return [
        f"The generator was trained with {trained} image{'' if trained == 1 else 's'} per item, here "
        f"{'is' if count == 1 else 'are'} {count}; give as many as in the training."
    ]


def by_item(rows: Sequence[Sequence[Image]], count: int) -> list[tuple[Image, ...]]:
    """First images, second ones and so on -> those of each of `count` items.

    Each row holds one image for all items, or one per item. Raises HYWUError on another number.
    """
    for place, row in enumerate(rows, 1):
        check_number(f"image{place if place > 1 else ''}", len(row), count)
    return [tuple(row[i if len(row) > 1 else 0] for row in rows) for i in range(count)]


def check_number(name: str, found: int, count: int) -> None:
    """HYWUError unless there is one image for all items, or one per item."""
    if found not in (1, count):
        raise HYWUError(
            f"{name} has {found} image{'' if found == 1 else 's'} for {count} "
            f"image{'' if count == 1 else 's'}; give one for all images, or one per image."
        )


def padded(rows: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Rows ``[1, T, C]`` of any lengths -> ``[B, T, C]`` and the mask bool ``[B, T]`` of what counts.

    masks: bool ``[1, T]`` of each row, where not all of its tokens count.
    """
    longest = max(row.shape[1] for row in rows)
    if masks is None:
        masks = [torch.ones(1, row.shape[1], dtype=torch.bool, device=row.device) for row in rows]
    tokens = torch.cat([F.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])
    return tokens, torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks])
