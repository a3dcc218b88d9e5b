"""Instructions of a batch: one line per image, or one line for all of them."""

from __future__ import annotations

import re

from ...hywu_core.errors import HYWUError


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not blank, without spaces around them."""
    # an API client can send half a surrogate pair, which is no character
    whole = text.encode("utf-8", "replace").decode()
    return [line.strip() for line in re.split(r"\r?\n", whole) if line.strip()]


def nonempty(text: str) -> list[str]:
    """`lines_of` a text. Raises HYWUError when there are none."""
    lines = lines_of(text)
    if not lines:
        raise HYWUError("The instruction is empty; say in a few words what to change.")
    return lines


def for_images(text: str, count: int) -> list[str]:
    """One instruction for each of `count` images. Raises HYWUError on none, or another number."""
    lines = nonempty(text)
    if len(lines) not in (1, count):
        raise HYWUError(
            f"There are {len(lines)} lines of instruction for {count} image"
            f"{'' if count == 1 else 's'}; write one line for all images, or one per image."
        )
    return lines if len(lines) == count else lines * count
