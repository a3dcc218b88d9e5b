"""The interface of an editor that a benchmark can call, and what it is given and gives back.

An editor takes an image, an instruction and a seed and gives an image back; `describe` says what it
is, for the results' manifest: a change there means other results.
"""

from __future__ import annotations

from typing import Any, Protocol

from PIL import Image

from ..items import Item
from ..options import Option

#: Options that several editors have.
WORKERS = Option("workers", "edits at once (%(default)s)", 1, int)
ITEM_TIMEOUT = Option("item_timeout", "seconds per item (%(default)s)", 600, float)


class EditFailed(Exception):
    """This item got no image; the text says why. Other items may succeed."""


class Editor(Protocol):
    """parallel: how many edits it takes at once."""

    parallel: int

    def describe(self) -> dict[str, Any]:
        """JSON-safe: what decides which image comes out, beside source, instruction and seed."""
        ...

    def edit(self, source: Image.Image, item: Item, seed: int) -> Image.Image:
        """The edited image. Raises EditFailed (this item) or HYWUError."""
        ...
