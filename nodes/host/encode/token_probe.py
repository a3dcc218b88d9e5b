"""Which of a MODEL's tokens are the image's: watched at a block, and found out by what its output needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ....hywu_core.discovery import submodule
from ....hywu_core.errors import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Place:
    """Tokens ``start:stop`` of one of a block's outputs; `grid` is their (frames, rows, columns)."""

    member: int
    start: int
    stop: int
    grid: tuple[int, int, int]


class Watch:
    """Inside the block: which of the layers was the last to end, and what it gave.

    kept: everything else that the layer gives is NaN for what comes after it.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], kept: Place | None = None):
        self.network, self.layers, self.kept = network, layers, kept
        self.path, self.output = "", None
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for path in self.layers:
            layer = submodule(self.network, path)
            self._handles.append(layer.register_forward_hook(self._hook(path)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, path: str) -> Callable[..., Any]:
        def seen(module: nn.Module, args: Any, output: Any) -> Any:
            # a copy: the model may go on in place
            self.path, self.output = path, _mapped(output, lambda _, value: value.clone())
            return output if self.kept is None else _mapped(output, self._blank)

        return seen

    def _blank(self, member: int, value: Tensor) -> Tensor:
        blank, kept = torch.full_like(value, float("nan")), self.kept
        if member == kept.member:
            blank[:, kept.start : kept.stop] = value[:, kept.start : kept.stop]
        return blank


def _mapped(output: Any, change: Callable[[int, Tensor], Tensor]) -> Any:
    """A layer's output with its tensors of tokens or features changed; others stay."""
    numbers = itertools.count()

    def one(value: Any) -> Any:
        tokens = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2
        return change(next(numbers), value) if tokens else value

    if isinstance(output, dict):
        return {key: one(value) for key, value in output.items()}
    return type(output)(map(one, output)) if isinstance(output, (tuple, list)) else one(output)


def tensors_of(output: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(output, lambda _, value: found.append(value) or value)
    return found


#: Network -> what was found for a layer, its outputs' lengths and a latent's shape.
_places: WeakKeyDictionary[nn.Module, dict[Any, Place | None]] = WeakKeyDictionary()


def image_tokens(
    network: nn.Module, layer: str, sequences: Sequence[Tensor], latent: Tensor,
    alone: Callable[[Place], bool],
) -> Place | None:  # fmt: skip
    """Where the image's tokens are.

    alone: whether the MODEL's output needs no others than these.
    """
    key = (layer, tuple(s.shape[1] for s in sequences), tuple(latent.shape[2:]))
    known = _places.setdefault(network, {})
    if key not in known:
        known[key] = _find(network, key[1], latent, alone)
        if known[key] is None:
            log.warning(
                "HY-WU: which of %s's tokens after %s are the image's is not clear; all are taken.",
                type(network).__name__, layer,
            )  # fmt: skip
    return known[key]


def _find(
    network: nn.Module, lengths: Sequence[int], latent: Tensor, alone: Callable[[Place], bool]
) -> Place | None:
    for grid in _grids(network, latent, lengths):
        count = math.prod(grid)
        # text comes first in most models that have one sequence, last in HunyuanVideo's kind
        places = [
            Place(member, start, start + count, grid)
            for member, length in enumerate(lengths)
            for start in dict.fromkeys((length - count, 0))
            if length >= count
        ]
        if len(places) == 1:
            return places[0]
        for place in places:
            if alone(place):
                return place
        for member, length in enumerate(lengths):
            # padded at both ends: tokens before the image can go one by one, its first one can't
            low, high = 0, length - count
            if high < 1 or not alone(Place(member, 0, length, grid)):
                continue
            while low < high:
                middle = (low + high + 1) // 2
                if alone(Place(member, middle, length, grid)):
                    low = middle
                else:
                    high = middle - 1
            if alone(place := Place(member, low, low + count, grid)):
                return place
    return None


def _grids(
    network: nn.Module, latent: Tensor, lengths: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """(frames, rows, columns) that the image's tokens may form."""
    sizes = [1] * (5 - latent.ndim) + list(latent.shape[2:])
    patch = getattr(network, "patch_size", None)
    if isinstance(patch, int):
        patch = (patch, patch)
    if isinstance(patch, Sequence) and 0 < len(patch) <= 3:
        sides = [1] * (3 - len(patch)) + list(patch)
        yield tuple(-(-size // side) for size, side in zip(sizes, sides, strict=True))
    # a UNet's level, or a transformer that doesn't say how large its patches are
    for side in (1, 2, 4, 8, 16, 32):
        grid = (sizes[0], -(-sizes[1] // side), -(-sizes[2] // side))
        if math.prod(grid) in lengths:
            yield grid
