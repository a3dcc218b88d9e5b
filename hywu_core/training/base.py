"""What the training loop needs of a base model: the one seam between the loop and any model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..condition import Condition
from ..fingerprint import of_values, of_weights
from .sharding import is_sharded, local


@dataclass(frozen=True)
class Batch:
    """Examples of one step: what to edit, how, and what it should become.

    source, target: float32 ``[B, 3, H, W]`` in 0..1.
    instruction, task: one string per item.
    references: each item's further images, float32 ``[3, h, w]`` in 0..1 of any sizes, on the CPU, which only
        the condition sees; empty where items have none.
    """

    source: Tensor
    target: Tensor
    instruction: tuple[str, ...]
    task: tuple[str, ...]
    references: tuple[tuple[Tensor, ...], ...] = ()

    def __len__(self) -> int:
        return self.source.shape[0]

    def select(self, items: Sequence[int]) -> Batch:
        """Some of the examples, in the order given."""
        index = list(items)
        return Batch(
            self.source[index],
            self.target[index],
            tuple(self.instruction[i] for i in index),
            tuple(self.task[i] for i in index),
            tuple(self.references[i] for i in index) if self.references else (),
        )

    def to(self, device: torch.device | str, memory_format: Any = torch.preserve_format) -> Batch:
        """Source and target on a device; references stay where they are."""
        source, target = (
            images.to(device, memory_format=memory_format) for images in (self.source, self.target)
        )
        return replace(self, source=source, target=target)

    @property
    def asked(self) -> tuple[Any, ...]:
        """The arguments of a base model's `encode`."""
        further = (self.references,) if self.references else ()
        return (self.source, self.instruction, *further)


#: step -> the whole batch of that step, the same on every process. A function of the step alone, so
#: that an interrupted run goes on with the examples that it would have seen.
BatchSource = Callable[[int], Batch]

#: Random draws of a batch (noise, times), each tensor with the batch as its first dimension.
Draws = Mapping[str, Tensor]


class BaseModel(Protocol):
    """A frozen base model as the loop sees it. `name` is stored as the checkpoint's base."""

    name: str
    module: nn.Module

    @property
    def encoder(self) -> Mapping[str, Any]:
        """JSON-safe identity of what makes the conditions; stored in the checkpoint."""

    @property
    def condition_parts(self) -> Mapping[str, int]:
        """Part name -> width of the conditions."""

    def encode(
        self,
        source: Tensor,
        instruction: Sequence[str],
        references: Sequence[Sequence[Tensor]] = (),
    ) -> Condition:
        """Condition of every item, without gradients. A base whose data has no `references` (see `Batch`)
        need not take them: it is called without.
        """

    def draw(self, batch: Batch, seed: int) -> Draws:
        """Random draws for a batch, on the CPU: the same for the same seed on every machine."""

    def loss(self, module: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Loss of every item ``[B]`` with `module` (the frozen one, or an adapted copy of it)."""

    def edit(self, module: nn.Module, batch: Batch, seed: int) -> Tensor:
        """Sampled edits ``[B, 3, H, W]`` in 0..1; the batch's target is not looked at."""


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are; the CPU for one without any."""
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def frozen_digest(module: nn.Module) -> str:
    """Hash of all parameters and buffers of a module, bit by bit; of what is sharded, of this process's part."""
    state = module.state_dict()
    if any(map(is_sharded, state.values())):
        return of_values({name: local(value) for name, value in state.items()}, 64)
    return of_weights(module)
