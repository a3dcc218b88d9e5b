"""Gradient checkpointing of a base model: its blocks run once more in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..generator.config import GeneratorConfig
from ..injection import inject
from .base import BaseModel, Batch
from .strategies import HyperNetwork


class HeldNetwork(HyperNetwork):
    """HyperNetwork whose LoRAs stay on the base until the next batch, or `release`.

    Blocks that are recomputed in the backward pass, after the loss, must find them there.
    """

    def __init__(
        self, base: BaseModel, config: GeneratorConfig, checkpointing: bool = False
    ) -> None:
        super().__init__(base, config, checkpointing)
        self._held = contextlib.ExitStack()

    @contextlib.contextmanager
    def adapted(self, batch: Batch) -> Iterator[nn.Module]:
        self.release()  # before the base makes its conditions
        lora = self.loras(batch)
        # an index, so that inputs with several rows per item (windows, tiles) repeat it
        index = list(range(lora.batch_size))
        self._held.enter_context(inject(self.base.module, lora, index=index))
        yield self.base.module

    def release(self) -> None:
        """Take the LoRAs off the base."""
        self._held.close()

    close = release


@contextlib.contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block these modules keep only their inputs for the backward pass.

    It goes with `HeldNetwork`. What they compute, and the gradients, stay the same.
    """
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(_recomputing, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _recomputing(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    def run(*inputs: Any) -> Any:
        # some blocks add to their input in place, which would be added twice
        own = [x.clone() if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
        count = len(args)
        return forward(*own[:count], **dict(zip(kwargs, own[count:], strict=True)))

    return checkpoint(run, *args, *kwargs.values(), use_reentrant=False)
