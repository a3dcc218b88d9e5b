"""Several pictures for one item of a condition: how many a generator was trained with, which belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..errors import HYWUError

#: What a checkpoint's encoder says of it; absent where it is one.
FACT = "images"

Picture = TypeVar("Picture")


def facts(count: int) -> dict[str, int]:
    """What an encoder says of the number of pictures that an item has."""
    return {FACT: count} if count > 1 else {}


def number_warnings(encoder: Mapping[str, Any], count: int) -> list[str]:
    """A sentence where items have another number of pictures than the generator was trained with."""
    trained = encoder.get(FACT, 1)
    if count == trained:
        return []
    return [
        f"The generator was trained with {trained} picture{'' if trained == 1 else 's'} an item, here "
        f"{'is' if count == 1 else 'are'} {count}; give as many as in the training."
    ]


def by_item(pictures: Sequence[Sequence[Picture]], count: int) -> list[tuple[Picture, ...]]:
    """First pictures, second ones and so on -> those of each of `count` items.

    Each row holds one picture for all items, or one for each. Raises HYWUError on another number.
    """
    for place, row in enumerate(pictures, 1):
        check_number(f"image{place if place > 1 else ''}", len(row), count)
    return [tuple(row[i if len(row) > 1 else 0] for row in pictures) for i in range(count)]


def check_number(name: str, found: int, count: int) -> None:
    """HYWUError unless there is one picture for all items, or one for each."""
    if found not in (1, count):
        raise HYWUError(
            f"{name} has {found} picture{'' if found == 1 else 's'} for {count} "
            f"image{'' if count == 1 else 's'}; give one for all images, or one for each."
        )
