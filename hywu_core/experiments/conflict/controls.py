"""Controls that tell what a generator's conditions are good for.

Shuffled conditions: each item gets the LoRA of another. Mean LoRA: the average change of the weights,
for all items or for those of one task; if the latter does as well, the generator only switches tasks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ...discovery import submodule
from ...errors import HYWUError
from ...lora import GeneratedLoRA


def derangement(count: int, seed: int = 0) -> list[int]:
    """A random order in which no item keeps its place (one cycle through all; Sattolo 1986)."""
    if count < 2:
        raise HYWUError(f"Conditions can't be shuffled among {count} items; give 2 or more.")
    generator = torch.Generator().manual_seed(seed)
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = int(torch.randint(i, (), generator=generator))
        order[i], order[j] = order[j], order[i]
    return order


class MeanChange:
    """Running mean of ``scale·B·A`` over LoRAs, exact: the mean of products, not of factors.

    Targets with experts are not supported (HYWUError).
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, lora: GeneratedLoRA) -> None:
        """Take in every item of a batch of LoRAs."""
        for path, (a, b) in lora.items():
            if a.ndim != 3:
                raise HYWUError(f"{path}: the mean change of expert modules is not supported.")
            # the sum of products over items is one product of stacked factors
            total = torch.einsum("bor,bri->oi", b.float(), a.float()) * lora.scale
            self._sums[path] = self._sums[path] + total if path in self._sums else total
        self.count += lora.batch_size

    def mean(self) -> dict[str, Tensor]:
        """Target path -> float32 ``[out, in]``."""
        if not self.count:
            raise HYWUError("The mean of no LoRAs does not exist; add some first.")
        return {path: total / self.count for path, total in self._sums.items()}


@contextlib.contextmanager
@torch.no_grad()
def changed(module: nn.Module, change: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """`module` with `change` added to its weights inside the block; restored bit by bit after it."""
    weights: dict[str, nn.Parameter] = {}
    for path, delta in change.items():
        target = submodule(module, path)
        if target is None or target.weight.numel() != delta.numel():
            raise HYWUError(f"{path}: the module has no such weight of {delta.numel()} values.")
        weights[path] = target.weight
    kept = {path: weight.detach().clone() for path, weight in weights.items()}
    try:
        for path, weight in weights.items():
            weight.add_(change[path].reshape(weight.shape).to(weight))
        yield module
    finally:
        for path, weight in weights.items():
            weight.copy_(kept[path])
