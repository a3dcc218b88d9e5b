"""What a training takes: estimated before anything is made, then measured on one example."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import comfy.model_management as mm
import torch
from torch import Tensor, nn

from ....hywu_core.discovery import submodule
from ....hywu_core.errors import HYWUError
from ....hywu_core.generator.config import GeneratorConfig
from ....hywu_core.generator.model import ParameterGenerator
from ....hywu_core.layout import LoRALayout
from ....hywu_core.training import muon, recompute
from ....hywu_core.training.base import Batch
from ....hywu_core.training.strategies import HyperNetwork
from .base import HostBase

#: float32 weight, gradient, first moment and moving average.
BYTES_PER_WEIGHT = 16
#: AdamW's second moment, and the square roots of all of them at once in the update.
BYTES_OF_ADAMW, BYTES_OF_UPDATE = 4, 4
#: Hidden states that one item's backward pass keeps for each block of the generator, at the least.
STATES_PER_BLOCK = 4


def recomputed(module: nn.Module, layout: LoRALayout) -> AbstractContextManager[None]:
    """Inside the block the layout's layers keep only their inputs for the backward pass."""
    paths = [path for stack in layout.stacks for path in stack.layers if path]
    return recompute.recomputed([submodule(module, path) for path in paths])


def check_weights(config: GeneratorConfig, optimizer: str, device: torch.device, items: int) -> int:
    """Bytes that training the generator's weights takes; HYWUError when they can't fit at all."""
    with torch.device("meta"):
        generator = ParameterGenerator(config)
    states = 4 * items * config.num_positions * config.d_model
    least = _bytes(generator, optimizer, config.num_blocks * STATES_PER_BLOCK * states)
    total = mm.get_total_memory(device)
    if least > total:
        count = sum(p.numel() for p in generator.parameters())
        raise HYWUError(_too_much("at least", least, total, device, f"{count:,} weights"))
    return _bytes(generator, optimizer, 0)


def _bytes(generator: nn.Module, optimizer: str, activations: int) -> int:
    """The most of a step: at the end of the backward pass, or in the update after it."""
    by_muon = [p.numel() for p in muon.matrices(generator)] if optimizer == "muon" else []
    count = sum(p.numel() for p in generator.parameters())
    by_adamw = count - sum(by_muon)
    matrices = muon.BYTES_AT_ONCE * min(sum(by_muon), max(muon.AT_ONCE, *by_muon, 0))
    held = BYTES_PER_WEIGHT * count + BYTES_OF_ADAMW * by_adamw
    # nothing of the backward pass is kept any more in the update
    return held + max(activations, BYTES_OF_UPDATE * by_adamw, matrices)


def check_step(
    strategy: HyperNetwork, optimizer: str, batch: Batch, items: int, recompute: bool
) -> int:
    """Bytes of a step, from what one example of `batch` keeps; HYWUError when they don't fit.

    items: examples that are in memory at once.
    """
    base: HostBase = strategy.base
    try:
        kept = _kept_bytes(strategy, batch.select([0]).to(base.device))
    except mm.OOM_EXCEPTION as error:
        free = mm.get_free_memory(base.device)
        raise HYWUError(_too_much("for one example more than", free, free, base.device)) from error
    config = strategy.trained.config
    latent = base.latent(batch.source[:1].cpu())
    # a forward's own working memory, as ComfyUI estimates it for sampling
    working = int(base.model.memory_required([items, *latent.shape[1:]])) if recompute else 0
    weights = sum(p.numel() for p in strategy.trained.parameters())
    loras = 2 * 4 * items * config.layout.num_values
    need = _bytes(strategy.trained, optimizer, items * kept + working + loras)
    # the weights themselves are there already
    free = mm.get_free_memory(base.device) + 4 * weights
    if need > free:
        raise HYWUError(_too_much("about", need, free, base.device, f"{items} examples at once"))
    return need


def _kept_bytes(strategy: HyperNetwork, one: Batch) -> int:
    """Bytes that autograd keeps between forward and backward of one example, weights left out."""
    weights = {
        t.untyped_storage().data_ptr()
        for module in (strategy.base.module, strategy.trained)
        for t in (*module.parameters(), *module.buffers())
    }
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        # without its history: an output that the graph keeps would keep the graph, for good
        return tensor.detach()

    draws = {k: v.to(one.source.device) for k, v in strategy.base.draw(one, 0).items()}
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, strategy.adapted(one) as module:
        loss = strategy.base.loss(module, one, draws).mean()
    strategy.release()
    # kept alive until here: a freed tensor's address may be another one's next
    del loss
    return sum(seen.values())


def _too_much(how: str, need: int, free: int, device: torch.device, what: str = "") -> str:
    detail = f" ({what})" if what else ""
    return (
        f"This training takes {how} {need / 2**30:,.2f} GiB on {device}{detail}, where "
        f"{free / 2**30:,.2f} GiB are to be had; choose a smaller generator_size, rank or image_size, "
        "raise accumulation, or turn checkpointing on."
    )


@contextlib.contextmanager
def autograd_through_host() -> Iterator[None]:
    """Inside a node, which ComfyUI runs in inference mode: gradients work, fused shortcuts are off."""
    known = hasattr(mm, "in_training")
    before = getattr(mm, "in_training", False)
    with torch.inference_mode(False), torch.enable_grad():
        try:
            if known:
                mm.in_training = True
            yield
        finally:
            if known:
                mm.in_training = before


def plain_patcher(model: Any) -> Any:
    """A clone whose weights can rest on the device as they are."""
    dynamic = getattr(model, "is_dynamic", None)
    if dynamic is not None and dynamic():
        return model.clone(disable_dynamic=True)
    return model.clone()
