"""The heat map of a LoRA's norms as an image tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..hywu_core.lora import GeneratedLoRA

CELL = 16


def norm_map(lora: GeneratedLoRA, norms: dict[str, Tensor]) -> Tensor:
    """``[B, H, W, 3]`` in 0..1: layers left to right, modules top to bottom, stacks under another."""
    stacks = lora.layout.stacks
    width = max(len(stack.layers) for stack in stacks)
    grid = torch.zeros(lora.batch_size, sum(len(s.modules) for s in stacks), width)
    row = 0
    for stack in stacks:
        for m in range(len(stack.modules)):
            for n in range(len(stack.layers)):
                grid[:, row, n] = norms[stack.target(n, m)].cpu()
            row += 1
    grid = grid / grid.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    # black, violet, orange, yellow: light grows with the value
    colours = torch.tensor([[0.0, 0.0, 0.02], [0.5, 0.07, 0.5], [0.98, 0.5, 0.2], [1.0, 1.0, 0.7]])
    place = grid * (len(colours) - 1)
    low = place.long().clamp(max=len(colours) - 2)
    image = torch.lerp(colours[low], colours[low + 1], (place - low)[..., None])
    return image.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
