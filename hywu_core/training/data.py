"""A user's own pairs: rows of a JSONL file, and batches of crops of their images.

A source of batches is a function of the step (`BatchSource`), so that a resumed run sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HYWUError
from ..files import read_json_lines
from ..images import image_size, read_image
from .base import Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """One example of a user: files and what was asked. references: pictures for the condition only."""

    source: Path
    target: Path
    instruction: str
    task: str
    references: tuple[Path, ...] = ()


#: Pictures of a row besides source and target.
MAX_REFERENCES = 2


def read_pairs(path: str | Path) -> tuple[list[Pair], list[str]]:
    """Rows ``{source, target, instruction, task, references}`` of a JSONL file (or of a folder's ``*.jsonl``).

    references, which may be absent: a list of up to `MAX_REFERENCES` pictures of any size. Paths count from the file's folder. Returns the good rows and a line for each bad one, which names
    file and row and says what is wrong. Raises HYWUError when no row is good.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise HYWUError(f"{path}: no .jsonl file with rows of source, target, instruction, task.")
    pairs, bad = [], []
    for file in files:
        for number, row in read_json_lines(file):
            try:
                if isinstance(row, HYWUError):
                    raise row
                pairs.append(_pair(row, file.parent))
            except HYWUError as error:
                said = str(error).removeprefix(f"{file}, line {number}: ")
                bad.append(f"{file}, row {number}: {said}")
    for text in bad:
        logger.warning("skipped: %s", text)
    if not pairs:
        raise HYWUError(f"{path}: none of {len(bad)} rows can be used. First: {(bad or ['-'])[0]}")
    return pairs, bad


def _pair(row: Any, folder: Path) -> Pair:
    if not isinstance(row, Mapping):
        raise HYWUError("not a JSON object")
    for key in ("source", "target", "instruction"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise HYWUError(f"'{key}' is missing or empty")
    source, target = folder / row["source"], folder / row["target"]
    references = tuple(folder / name for name in _references(row))
    for file in references:
        image_size(file)
    sizes = image_size(source), image_size(target)
    if sizes[0] != sizes[1]:
        raise HYWUError(f"{row['source']} is {sizes[0]} and {row['target']} is {sizes[1]}")
    task = str(row.get("task") or "custom")
    return Pair(source, target, row["instruction"], task, references)


def _references(row: Mapping[str, Any]) -> list[str]:
    names = row.get("references") or []
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise HYWUError("'references' is not a list of names of pictures")
    if len(names) > MAX_REFERENCES:
        raise HYWUError(f"'references' names {len(names)} pictures; {MAX_REFERENCES} are the most")
    return names


def number_of_references(pairs: Sequence[Pair]) -> int:
    """As many as every pair has. Raises HYWUError naming two pairs that differ."""
    first = pairs[0]
    for pair in pairs:
        if len(pair.references) != len(first.references):
            raise HYWUError(
                f"training: {first.source} has {len(first.references)} references and {pair.source} has "
                f"{len(pair.references)}; give every row the same number."
            )
    return len(first.references)


def whole(image: Tensor, size: int) -> Tensor:
    """uint8 ``[3, H, W]`` -> float32 in 0..1 with about ``size x size`` pixels and the same proportions."""
    sides = image.shape[1:]
    zoom = size / math.sqrt(math.prod(sides))
    wanted = [max(1, round(side * zoom)) for side in sides]
    pixels = image[None].float() / 255
    if list(sides) != wanted:
        pixels = F.interpolate(pixels, wanted, mode="bilinear", antialias=True)
    return pixels[0].clamp(0, 1)


class PairBatches:
    """Batches from a user's own pairs: random crops, the same place in source and target, mirrored
    by chance. Pictures smaller than a crop are enlarged. An epoch shows each pair once. References are
    seen whole. Raises HYWUError unless every pair has as many.
    """

    def __init__(self, pairs: Sequence[Pair], batch_size: int, size: int, seed: int = 0) -> None:
        if not pairs:
            raise HYWUError("training: there are no pairs to train on.")
        self.pairs, self.batch_size, self.size, self.seed = list(pairs), batch_size, size, seed
        self.references = number_of_references(self.pairs)

    def __call__(self, step: int) -> Batch:
        chosen = [self._pick(step * self.batch_size + i) for i in range(self.batch_size)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        crops = [self._crop(pair, generator) for pair in chosen]
        return Batch(
            torch.stack([source for source, _ in crops]),
            torch.stack([target for _, target in crops]),
            tuple(pair.instruction for pair in chosen),
            tuple(pair.task for pair in chosen),
            tuple(map(self._seen_whole, chosen)) if self.references else (),
        )

    def _seen_whole(self, pair: Pair) -> tuple[Tensor, ...]:
        return tuple(whole(read_image(path), self.size) for path in pair.references)

    def _pick(self, index: int) -> Pair:
        """The index-th pair of an endless row of shuffled epochs."""
        epoch, place = divmod(index, len(self.pairs))
        generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
        order = torch.randperm(len(self.pairs), generator=generator)
        return self.pairs[int(order[place])]

    def _crop(self, pair: Pair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        both = torch.stack([read_image(pair.source), read_image(pair.target)]).float() / 255
        smallest = min(both.shape[2:])
        if smallest < self.size:
            factor = self.size / smallest
            shape = [max(self.size, round(side * factor)) for side in both.shape[2:]]
            both = F.interpolate(both, shape, mode="bilinear", antialias=True).clamp(0, 1)
        y, x, mirror = torch.rand(3, generator=generator).tolist()
        top, left = (
            int(at * (side - self.size + 1))
            for at, side in zip((y, x), both.shape[2:], strict=True)
        )
        both = both[:, :, top : top + self.size, left : left + self.size]
        source, target = both.flip(3) if mirror < 0.5 else both
        return source, target
