"""The shapes that bench/probe.py tries: the official generator's, or tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .device import seconds_of

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Probe:
    """The device, and the official generator's shapes or tiny ones."""

    device: torch.device
    tiny: bool = False

    @property
    def width(self) -> int:
        return 128 if self.tiny else 4096

    @property
    def heads(self) -> int:
        return 4 if self.tiny else 32

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def layers(self) -> int:
        return 8 if self.tiny else 32

    @property
    def length(self) -> int:
        """Positions of one layer."""
        return 40 if self.tiny else 5516

    @property
    def condition(self) -> int:
        return 24 if self.tiny else 4000

    @property
    def sequences(self) -> int:
        """Sequences of the attention across layers in one chunk."""
        return 8 if self.tiny else 528

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of one chunk: two layers, even chunks, three layers, whole waves of tiles."""
        return (33, 64) if self.tiny else (11032, 16047, 16548, 16896)

    def random(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)

    def milliseconds(self, function: Callable[[], Any], calls: int = 5) -> float:
        """The median call, after two that warm up."""
        if self.tiny:
            return 1e3 * seconds_of(function, self.device)
        for _ in range(2):
            function()
        times = sorted(seconds_of(function, self.device) for _ in range(calls))
        return 1e3 * times[calls // 2]

    def gigabytes(self, function: Callable[[], Any], count: float) -> float:
        """GB/s of a call that reads and writes `count` bytes."""
        return count / self.milliseconds(function) / 1e6
