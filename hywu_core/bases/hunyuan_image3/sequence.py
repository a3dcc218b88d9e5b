"""The token sequence of one item: text, source images, and what is asked for at its end.

``bos`` system prompt, ``User:`` with images and instruction, ``Assistant:`` with chain of thought, then a
tail: a tag to write on, a size to predict the ratio of, or an image to generate. Every piece is tokenized
by itself. The unconditional branch replaces each token of instruction and chain of thought by ``<cfg>``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import HYWUError
from .attention import Rows, Segment
from .images import Size
from .rope import Grid, positions
from .tokens import Tokens

#: Tags of a chain of thought: name of the opening token -> of the closing one.
TAGS = {"think": "end_think", "recaption": "end_recaption"}


class SourceSpan(NamedTuple):
    """A source image in a sequence: index of its ``<timestep>``, its VAE tokens, its vision tokens.

    vision: the grid; after it, up to `stop`, come padded tokens.
    """

    timestep: int
    vae: Grid
    vision: Grid
    stop: int


class SourceShape(NamedTuple):
    """A source image in tokens: its ratio's index, VAE and vision grid (height, width), vision tokens
    with padding.
    """

    ratio: int
    vae: tuple[int, int]
    vision: tuple[int, int]
    vision_tokens: int


@dataclass(frozen=True)
class Target:
    """The image to generate in a sequence: index of ``<timestep>`` and of the tokens beside it."""

    timestep: int
    grid: Grid
    guidance: int | None
    timestep_r: int | None


@dataclass(frozen=True)
class TokenSequence:
    """ids int64 ``[L]``; source images in it; the image to generate, if one is."""

    ids: Tensor
    sources: tuple[SourceSpan, ...] = ()
    target: Target | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def positions(self) -> Tensor:
        """int64 ``[L, 2]``."""
        grids = [g for source in self.sources for g in (source.vae, source.vision)]
        if self.target is not None:
            grids.append(self.target.grid)
        return positions(len(self), grids)

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """What tokens [start, stop) see. Neither end may lie inside an image."""
        spans = [(source.vae.start, source.stop) for source in self.sources]
        if self.target is not None:
            spans.append((self.target.grid.start, self.target.grid.stop))
        stop = len(self) if stop is None else stop
        segments, at = [], start
        for first, last in spans:
            if last <= start or first >= stop:
                continue
            if at < first:
                segments.append(Segment(at, first, False))
            segments.append(Segment(first, last, True))
            at = last
        if at < stop:
            segments.append(Segment(at, stop, False))
        return Rows(tuple(segments))


@dataclass(frozen=True)
class Prompt:
    """Everything of an item but the tail.

    cot: the chain of thought, with its tags, or "".
    """

    instruction: str
    system: str = ""
    sources: tuple[SourceShape, ...] = ()
    cot: str = ""
    drop_think: bool = False

    def writing(self, tokens: Tokens, tag: str | None) -> TokenSequence:
        """To write on from ``<think>`` or ``<recaption>``; None leaves the choice to the model."""
        build = self._head(tokens, False)
        if tag is not None:
            build.ids.append(tokens.ids[tag])
        return build.done()

    def ratio(self, tokens: Tokens) -> TokenSequence:
        """To predict the ratio of the image; its hidden states are HY-WU's condition."""
        build = self._head(tokens, False)
        build.ids += [tokens.answer, tokens.boi, tokens.size]
        return build.done()

    def image(
        self, tokens: Tokens, size: Size, factor: int, unconditional: bool = False,
        guidance: bool = False, timestep_r: bool = False,
    ) -> TokenSequence:  # fmt: skip
        """The tokens after which an image is generated.

        guidance, timestep_r: whether the checkpoint reads these tokens.
        """
        build = self._head(tokens, unconditional)
        build.ids += [tokens.answer, tokens.boi, tokens.size, tokens.ratios[size.ratio]]
        timestep = build.add(tokens.timestep)
        target = Target(
            timestep,
            guidance=build.add(tokens.guidance) if guidance else None,
            timestep_r=build.add(tokens.timestep_r) if timestep_r else None,
            grid=build.grid(tokens, size.height // factor, size.width // factor),
        )
        build.ids += [tokens.eoi, tokens.end_answer, *tokens.encode("\n\n")]
        return replace(build.done(), target=target)

    def _head(self, tokens: Tokens, unconditional: bool) -> _Builder:
        build = _Builder([tokens.bos])

        def text(piece: str, said: bool = False) -> None:
            ids = tokens.encode(piece)
            build.ids += [tokens.unconditional] * len(ids) if said and unconditional else ids

        if system := self.system.strip():
            text(system)
            text("\n\n")
        text("User: ")
        for source in self.sources:
            build.source(tokens, source)
        text(self.instruction, said=True)
        text("\n\n")
        text("Assistant: ")
        for piece, said in cot_pieces(self.cot, self.drop_think):
            text(piece, said)
        return build


@dataclass
class _Builder:
    ids: list[int]
    sources: list[SourceSpan] = field(default_factory=list)

    def add(self, token: int) -> int:
        """Append a token; returns its index."""
        self.ids.append(token)
        return len(self.ids) - 1

    def grid(self, tokens: Tokens, height: int, width: int) -> Grid:
        grid = Grid(len(self.ids), height, width)
        self.ids += [tokens.image] * (height * width)
        return grid

    def source(self, tokens: Tokens, source: SourceShape) -> None:
        self.ids += [tokens.boi, tokens.size, tokens.ratios[source.ratio]]
        timestep = self.add(tokens.timestep)
        vae = self.grid(tokens, *source.vae)
        self.ids.append(tokens.joint)
        vision = Grid(len(self.ids), *source.vision)
        self.ids += [tokens.image] * source.vision_tokens
        self.sources.append(SourceSpan(timestep, vae, vision, len(self.ids)))
        self.ids.append(tokens.eoi)

    def done(self) -> TokenSequence:
        return TokenSequence(torch.tensor(self.ids, dtype=torch.int64), tuple(self.sources))


def cot_pieces(cot: str, drop_think: bool = False) -> list[tuple[str, bool]]:
    """(piece, whether ``<cfg>`` replaces it in the unconditional branch) of a chain of thought.

    Text without tags becomes an answer, which is replaced with its tags. Raises HYWUError on a tag that
    isn't closed.
    """
    pieces: list[tuple[str, bool]] = []
    for tag in TAGS:
        _, opened, rest = cot.partition(f"<{tag}>")
        content, closed, _ = rest.partition(f"</{tag}>")
        if opened and not closed:
            raise HYWUError(
                f"The chain of thought opens <{tag}> and never closes it; write </{tag}> at its end."
            )
        if opened and not (tag == "think" and drop_think):
            pieces += [(opened, False), (content, True), (closed, False)]
    if pieces or not cot or "<think>" in cot:
        return pieces
    return [(f"<answer>{cot}</answer>", True)]


def check_length(sequence: TokenSequence, limit: int) -> None:
    """Raise HYWUError where a sequence is longer than the checkpoint reads."""
    if len(sequence) > limit:
        raise HYWUError(
            f"The sequence has {len(sequence):,} tokens, the checkpoint reads {limit:,}; use fewer source "
            "images, a shorter instruction or chain of thought, or a smaller size."
        )
