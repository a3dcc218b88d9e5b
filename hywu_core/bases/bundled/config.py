"""Hyperparameters of the bundled editor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import HYWUError


@dataclass(frozen=True)
class EditorConfig:
    """Hyperparameters. width must be divisible by heads, and a head by 4 (two rotary axes of pairs).

    patch: side of a patch in pixels. text_words: longest instruction, in words. buckets: embeddings
    that the words' pieces are hashed to. train_size: side of the training crops; larger images are
    edited in tiles of that size. pool: the condition has at most ``pool x pool`` image tokens.
    channels: of the pixel head.
    """

    width: int = 192
    depth: int = 8
    heads: int = 6
    text_depth: int = 2
    patch: int = 8
    text_words: int = 24
    buckets: int = 4096
    train_size: int = 64
    pool: int = 4
    channels: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise HYWUError(f"editor config: {name} is {value}; it must be 1 or more.")
        if self.width % self.heads or self.width // self.heads % 4:
            raise HYWUError(
                f"editor config: width {self.width} over {self.heads} heads must give heads whose "
                "size is divisible by 4."
            )
        if self.train_size % self.patch:
            raise HYWUError(
                f"editor config: train_size {self.train_size} must be divisible by patch {self.patch}."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EditorConfig:
        """Raises HYWUError on unknown or missing fields."""
        names = {f.name for f in fields(cls)}
        if odd := names.symmetric_difference(data):
            raise HYWUError(f"editor config: unknown or missing fields: {', '.join(sorted(odd))}.")
        return cls(**{name: int(value) for name, value in data.items()})
