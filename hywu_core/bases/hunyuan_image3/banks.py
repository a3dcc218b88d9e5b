"""Expert banks that hold no plain weights: quantized ones, and those that go through slots.

Called as `GroupedLinear`, which adapters hook alike: a LoRA is added to the product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .chunks import in_chunks
from .matrices import Source
from .staging import Slots, Workspace, staged_product


class CodedBank(nn.Module):
    """A quantized bank in a parameter; decoded in chunks where it is used."""

    def __init__(
        self,
        bank: nn.Module,
        stored: Source,
        device: torch.device,
        chunk: int,
        workspace: Workspace,
    ) -> None:
        super().__init__()
        self.num_experts = bank.num_experts
        self.in_features, self.out_features = bank.in_features, bank.out_features
        self.source, self.chunk, self.workspace, self._device = stored, chunk, workspace, device
        self.read()

    def read(self, device: torch.device | None = None) -> None:
        """Take the weights from where they are stored.

        device: another one than before.
        """
        self._device = self._device if device is None else device
        shape = (self.num_experts, self.source.matrix_bytes)
        coded = torch.empty(shape, dtype=torch.uint8, device=self._device)
        if self._device.type != "meta":
            self.source.read(range(self.num_experts), coded)
        self.coded = nn.Parameter(coded, requires_grad=False)

    def forward(self, x: Tensor, ends: Tensor, items: Tensor | None = None) -> Tensor:
        """See `GroupedLinear`. Waits for the device to learn which experts have rows (see `routed`)."""

        def weights(experts: Sequence[int]) -> Tensor:
            return self.workspace.decode(self.source, [self.coded[e] for e in experts], x.dtype)

        return in_chunks(x, ends, self.out_features, self.chunk, weights)


class OffloadedBank(nn.Module):
    """An expert bank without weights of its own."""

    def __init__(
        self, bank: nn.Module, source: Source, slots: Slots, chunk: int, workspace: Workspace
    ) -> None:
        super().__init__()
        self.num_experts = bank.num_experts
        self.in_features, self.out_features = bank.in_features, bank.out_features
        self.source, self.slots, self.chunk = source, slots, chunk
        self.workspace = workspace

    def forward(self, x: Tensor, ends: Tensor, items: Tensor | None = None) -> Tensor:
        """See `GroupedLinear` and `staged_product`."""
        return staged_product(
            x, ends, self.out_features, self.source, self.slots, self.chunk, self.workspace
        )
