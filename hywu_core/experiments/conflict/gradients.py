"""Cosines between the gradients of tasks with respect to the same trained parameters.

Below zero, a step that helps one task hurts the other: what a shared adapter has to compromise on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...training.base import BaseModel, Batch
from ...training.strategies import Strategy


def task_gradients(
    base: BaseModel, strategy: Strategy, batches: Mapping[str, Batch], seed: int = 0
) -> dict[str, Tensor]:
    """task -> gradient of its mean loss, flat float32 ``[parameters]``. Changes no weight.

    All tasks get the draws of the same seed. The parameters' own ``.grad`` stays as it is.
    """
    parameters = [p for p in strategy.trained.parameters() if p.requires_grad]
    device = parameters[0].device
    gradients = {}
    for task, batch in batches.items():
        draws = {k: v.to(device) for k, v in base.draw(batch, seed).items()}
        moved = batch.to(device)
        with torch.enable_grad(), strategy.adapted(moved) as module:
            loss = base.loss(module, moved, draws).mean()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pieces = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]
        gradients[task] = torch.cat([piece.detach().float().flatten() for piece in pieces]).cpu()
    return gradients


def cosine_matrix(gradients: Mapping[str, Tensor]) -> Tensor:
    """Cosines ``[tasks, tasks]`` in the mapping's order; 0 beside a gradient of zero."""
    stacked = torch.nn.functional.normalize(torch.stack(list(gradients.values())), dim=1)
    return stacked @ stacked.mT
