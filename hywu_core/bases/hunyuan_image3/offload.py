"""Experts that rest in host memory or in the mapped files, copied in chunks where they are used.

The experts are 97 % of the weights, and a pass needs them one layer at a time. A budget of device bytes is
met with the most layers whose experts stay there; those of the others go through two slots in turn: a
chunk is copied while the other computes. Only experts that a token was routed to are copied, so that a
step of the text pass copies top-k of each layer. Every expert's product is the same, so are the results.
Quantized experts are copied as they are stored, and decoded a chunk at a time in memory that is shared by
all and part of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from .banks import CodedBank, OffloadedBank
from .checkpoint import Folder
from .codecs import Plain
from .matrices import in_files, in_memory
from .model import HunyuanImage3
from .placement import CHUNK, Matrix, Placement, place
from .staging import Slots, Traffic, Workspace

#: Where offloaded experts rest: "ram", or "file" for the mapped safetensors.
Rest = Literal["ram", "file"]


class Offloaded:
    """A model whose experts go through slots: what of it is where, and what was copied."""

    def __init__(self, placement: Placement, slots: Slots | None, workspace: Workspace) -> None:
        self.placement, self.slots, self.workspace = placement, slots, workspace
        self.traffic = Traffic() if slots is None else slots.traffic

    @property
    def nbytes(self) -> int:
        """Device bytes that the slots and decoding take."""
        slots = 0 if self.slots is None else self.slots.nbytes
        return slots + (self.placement.decode_bytes if self.workspace.nbytes else 0)

    def allocate(self, free: bool = False) -> None:
        """Take the memory of slots and decoding, or give it back."""
        self.workspace.allocate(free)
        if self.slots is not None:
            self.slots.allocate(free)

    def free(self) -> None:
        self.allocate(free=True)


def offload(
    folder: Folder, model: HunyuanImage3, fixed_bytes: int, budget: int | None,
    device: torch.device, dtype: torch.dtype, rest: Rest, coded_bank: type[CodedBank] = CodedBank,
    dense: Sequence[int] = (),
) -> Offloaded:  # fmt: skip
    """Exchange banks of a model on "meta" for offloaded and quantized ones; `Folder.fill` reads the others.

    fixed_bytes: of the weights that always stay.
    dense: see `place`.
    budget: None keeps all on the device.
    coded_bank: the class of quantized banks that stay; another one than CodedBank is a host's, whose memory
        manager counts what a pass takes.
    Raises HYWUError on a budget too small, before anything is allocated.
    """
    all_sources = [
        in_files(folder, i, layer.mlp.experts, dtype) for i, layer in enumerate(model.model.layers)
    ]
    count = model.config.num_experts
    layers = [count * sum(s.matrix_bytes for s in sources.values()) for sources in all_sources]
    largest = Matrix.largest(
        Matrix.of(s.codec, *s.shape, dtype) for sources in all_sources for s in sources.values()
    )
    placement = place(fixed_bytes, layers, count, budget, largest, dense)
    slots = Slots(placement.chunk_bytes, device) if placement.chunk_bytes else None
    held = placement.chunk * largest.decoded if coded_bank is CodedBank else 0
    workspace = Workspace(held, device)
    for i, (layer, sources) in enumerate(zip(model.model.layers, all_sources, strict=True)):
        experts, stays = layer.mlp.experts, i in placement.resident
        for name, source in sources.items():
            bank = getattr(experts, name)
            if stays and isinstance(source.codec, Plain):
                continue
            if stays:
                made = coded_bank(bank, source, device, placement.chunk, workspace)
                setattr(experts, name, made)
                continue
            assert slots is not None
            if rest == "ram":
                source = in_memory(source, count, device.type == "cuda")
            made = OffloadedBank(bank, source, slots, placement.chunk, workspace)
            setattr(experts, name, made)
    return Offloaded(placement, slots, workspace)


def coded_banks(
    folder: Folder, model: HunyuanImage3, dtype: torch.dtype
) -> list[dict[str, CodedBank]]:
    """Exchange a quantized folder's banks for coded ones on "meta"; returns those of each layer, to be read.

    Each decodes in memory of its own time, so that layers can be on several devices.
    """
    meta, made = torch.device("meta"), []
    for i, layer in enumerate(model.model.layers):
        experts, banks = layer.mlp.experts, {}
        for name, source in in_files(folder, i, experts, dtype).items():
            if isinstance(source.codec, Plain):
                continue
            chunk = min(CHUNK, model.config.num_experts)
            banks[name] = CodedBank(getattr(experts, name), source, meta, chunk, Workspace(0, meta))
            setattr(experts, name, banks[name])
        made.append(banks)
    return made
