"""Conditions from the bundled editor's own hidden states of (source image, instruction).

Two parts: the image tokens of its last layer, which have read the instruction too, and the words as they
enter its text encoder. The words that leave it say less of sentences that the editor was not trained
on: from 14 sentences a task, with carriers, a probe (attention over the words, then a linear layer) told
the conflict tasks' held-out sentences apart in 93 of 100 cases before the text encoder and in 62 after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import fingerprint
from ..condition import Condition
from ..errors import HYWUError

#: Parts of the condition, in order.
IMAGE, WORDS = "image", "words"

#: Most windows along one side of a picture larger than the editor's training size.
MAX_WINDOWS = 4


class HiddenStateModel(Protocol):
    """What the encoder asks of the editor; `config` has train_size, width and pool."""

    config: Any

    def encode_text(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]: ...

    def embed_words(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]: ...

    def hidden_states(self, source: Tensor, text: Tensor, mask: Tensor) -> Tensor: ...


class EditorEncoder:
    """(images, instructions) -> Condition: ``image`` ``[B, L, width]``, ``words`` ``[B, T, width]``.

    A picture larger than the training size is looked at through up to 4 x 4 windows of that size, of
    each of which a share of the tokens is taken: as many tokens as in training, each of detail at
    the scale of training, spread over the whole picture.
    """

    def __init__(self, editor: HiddenStateModel, identity: str) -> None:
        self.editor = editor
        self.identity = {"type": "bundled_editor", "editor": identity}

    @property
    def parts(self) -> Mapping[str, int]:
        return {IMAGE: self.editor.config.width, WORDS: self.editor.config.width}

    @torch.no_grad()
    def __call__(self, source: Tensor, instructions: Sequence[str]) -> Condition:
        """source: ``[B, 3, H, W]`` in 0..1; one instruction an item. Raises HYWUError on a misfit."""
        if source.ndim != 4 or source.shape[1] != 3 or source.shape[0] != len(instructions):
            raise HYWUError(
                f"The editor's encoder got images {tuple(source.shape)} and {len(instructions)} "
                "instructions; it takes [batch, 3, height, width] and one instruction an image."
            )
        text, mask = self.editor.encode_text(instructions)
        rows = []
        tops, lefts = (self._starts(side) for side in source.shape[2:])
        size = self.editor.config.train_size
        for top in tops:
            row = []
            for left in lefts:
                window = source[..., top : top + size, left : left + size] * 2 - 1
                tokens = self.editor.hidden_states(window, text, mask)
                grid = tokens.mT.unflatten(2, self._grid(window))
                row.append(grid[..., :: len(tops), :: len(lefts)])
            rows.append(torch.cat(row, dim=3))
        image = torch.cat(rows, dim=2).flatten(2).mT
        words, counted = self.editor.embed_words(instructions)
        return Condition(
            {IMAGE: image, WORDS: words},
            {WORDS: counted},
            self._fingerprint(source, instructions),
            {"instruction": list(instructions), "encoder": self.identity["type"]},
        )

    def _starts(self, side: int) -> list[int]:
        """Where windows start along a side: 1, 2 or 4 of them, evenly spread."""
        size, count = self.editor.config.train_size, 1
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
        config = self.editor.config
        patches = (-(-side // config.patch) for side in window.shape[2:])
        height, width = (min(side, config.pool) for side in patches)
        return height, width

    def _fingerprint(self, source: Tensor, instructions: Sequence[str]) -> str:
        """Hash of pixels (as float32), texts and the encoder; waits for the device."""
        said = (sorted(self.identity.items()), tuple(source.shape))
        return fingerprint.digest([repr(said), repr(list(instructions)), source.float()])
