"""Choosing items of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import HYWUError

#: One item, or several.
Items = int | slice | Sequence[int] | Tensor


def batch_index(items: Items, size: int, what: str) -> tuple[Any, list[int]]:
    """What to index a tensor's batch dimension with, which it keeps, and the numbers of the items.

    what: whose batch it is, for the error.
    Raises HYWUError when an item isn't there, or none is chosen.
    """
    index = slice(items, items + 1 or None) if isinstance(items, int) else items
    try:
        here = index.cpu() if isinstance(index, Tensor) else index
        chosen = torch.arange(size)[here].tolist()
    except IndexError:
        chosen = []
    if not chosen:
        named = f"Item {items} is" if isinstance(items, int) else f"Items {items} are"
        raise HYWUError(f"{named} out of range: {what} has {size} items.")
    return index, chosen
