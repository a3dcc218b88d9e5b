"""Conditions from the bundled editor's own hidden states of (source image, instruction).

Two parts: the image tokens of its last layer, which have read the instruction too, and the words as they
enter its text encoder. The words that leave it say less of sentences that the editor was not trained
on: from 14 sentences per task, with carriers, a probe (attention over the words, then a linear layer) told
the conflict tasks' held-out sentences apart in 93 of 100 cases before the text encoder and in 62 after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import fingerprint
from ..condition import Condition
from ..errors import HYWUError
from .base import Images

#: Name in a checkpoint's encoder.
TYPE = "bundled_editor"
#: Parts of the condition, in order.
IMAGE, WORDS = "image", "words"

#: Most windows along one side of an image larger than what the editor reads at once.
MAX_WINDOWS = 4

ONE_IMAGE = (
    "The bundled editor reads one image per item, here are {count}; give it the source image alone, or train a "
    "generator for another model on pairs with references."
)


class Config(Protocol):
    """What the encoder asks of an editor's config.

    pool: at most ``pool x pool`` tokens per image.
    """

    pool: int

    @property
    def condition_parts(self) -> Mapping[str, int]: ...

    def tile(self, height: int, width: int) -> tuple[int, int]: ...


class HiddenStateModel(Protocol):
    """What the encoder asks of an editor: texts -> tokens and mask, source in -1..1 -> image tokens."""

    config: Any

    def encode_text(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]: ...

    def embed_words(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]: ...

    def hidden_states(self, source: Tensor, text: Tensor, mask: Tensor) -> Tensor: ...


class EditorEncoder:
    """(images, instructions) -> Condition: ``image`` ``[B, L, C]``, ``words`` ``[B, T, C]``.

    An image larger than the editor reads at once is looked at through up to 4 x 4 windows, of each of which a
    share of the tokens is taken: as many tokens as in training, each of detail at the scale of training,
    spread over the whole image.
    identity: which editor it is.
    rows: images that go through the editor at once.
    on_window: called as (done, total) before each of them and at the end, for progress and interruption.
    fingerprints: False leaves conditions without; a fingerprint waits for the device.
    """

    def __init__(
        self,
        editor: HiddenStateModel,
        identity: str,
        rows: int | None = None,
        on_window: Callable[[int, int], None] | None = None,
        fingerprints: bool = True,
    ) -> None:
        self.editor, self.rows, self.fingerprints = editor, rows, fingerprints
        self.identity = {"type": TYPE, "editor": identity}
        self.on_window = on_window or (lambda done, total: None)

    @property
    def parts(self) -> Mapping[str, int]:
        return dict(self.editor.config.condition_parts)

    @torch.no_grad()
    def __call__(self, images: Images, instructions: Sequence[str], *further: Images) -> Condition:
        """images: ``[B, 3, H, W]`` in 0..1; one instruction per item. Raises HYWUError on a misfit."""
        if further:
            raise HYWUError(ONE_IMAGE.format(count=1 + len(further)))
        source = images if isinstance(images, Tensor) else torch.stack(list(images))
        if source.ndim != 4 or source.shape[1] != 3 or source.shape[0] != len(instructions):
            raise HYWUError(
                f"The editor's encoder got images {tuple(source.shape)} and {len(instructions)} "
                "instructions; it takes [batch, 3, height, width] and one instruction per image."
            )
        text, mask = self.editor.encode_text(instructions)
        image = torch.cat(list(self._by_rows(source, text, mask)))
        words, counted = self.editor.embed_words(instructions)
        return Condition(
            {IMAGE: image, WORDS: words},
            {WORDS: counted},
            self._fingerprint(source, instructions) if self.fingerprints else "",
            {"instruction": list(instructions), "encoder": TYPE},
        )

    def _by_rows(self, source: Tensor, text: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """Image tokens ``[rows, L, C]`` of some images at once."""
        rows = self.rows or len(source)
        windows = len(self._windows(source))
        total = windows * -(-len(source) // rows)
        for i, part in enumerate(
            zip(source.split(rows), text.split(rows), mask.split(rows), strict=True)
        ):
            yield self._look(*part, i * windows, total)
        self.on_window(total, total)

    def _look(self, source: Tensor, text: Tensor, mask: Tensor, done: int, total: int) -> Tensor:
        """Image tokens ``[B, L, C]`` of all windows, in the order of the image."""
        tall, wide = self.editor.config.tile(*source.shape[2:])
        starts = self._windows(source)
        down, right = (len({start[axis] for start in starts}) for axis in (0, 1))
        grids = []
        for top, left in starts:
            self.on_window(done, total)
            window = source[..., top : top + tall, left : left + wide] * 2 - 1
            tokens = self.editor.hidden_states(window, text, mask)
            grid = tokens.mT.unflatten(2, self._grid(window))
            grids.append(grid[..., ::down, ::right])
            done += 1
        lines = [torch.cat(grids[i : i + right], dim=3) for i in range(0, len(grids), right)]
        return torch.cat(lines, dim=2).flatten(2).mT

    def _windows(self, source: Tensor) -> list[tuple[int, int]]:
        """Where the windows of an image start."""
        sides = source.shape[2:]
        tops, lefts = map(self._starts, sides, self.editor.config.tile(*sides))
        return [(top, left) for top in tops for left in lefts]

    def _starts(self, side: int, size: int) -> list[int]:
        """Where windows start along a side: 1, 2 or 4 of them, evenly spread."""
        count = 1
        while (
            count < MAX_WINDOWS
            and count * size < side
            and self.editor.config.pool % (2 * count) == 0
        ):
            count *= 2
        if count == 1:
            return [0]
        return [round(i * (side - size) / (count - 1)) for i in range(count)]

    def _grid(self, window: Tensor) -> tuple[int, int]:
        """(rows, columns) of the tokens of a window."""
        config = self.editor.config
        fields = (-(-side // config.multiple) for side in window.shape[2:])
        height, width = (min(side, config.pool) for side in fields)
        return height, width

    def _fingerprint(self, source: Tensor, instructions: Sequence[str]) -> str:
        """Hash of pixels (as float32), texts and the encoder; waits for the device."""
        said = (sorted(self.identity.items()), tuple(source.shape))
        return fingerprint.digest([repr(said), repr(list(instructions)), source.float()])
