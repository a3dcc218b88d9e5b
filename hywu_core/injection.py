"""Applying a LoRA to any torch module: unmerged (hooks, one LoRA per batch item) or merged.

Unmerged, a target's output becomes ``y + s·B(A x)`` with ``s = scale·strength``, folded into the
rank-wide intermediate. Merged, ``s·B·A`` is added to the base weight (Hu et al. 2021; PEFT's words).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import (
    ConvAdapter,
    GroupedAdapter,
    LinearAdapter,
    attach,
    expert_hooks,
    moved,
)
from .discovery import find_experts, is_conv1d, is_pointwise_conv, submodule
from .errors import HYWUError
from .grouped import reads_ends
from .lora import GeneratedLoRA

#: One number for all targets, or shell patterns over target paths; the last match counts.
Strength = float | Mapping[str, float]
#: A larger strength overflows in half precision: merged, that is a bad image without a word.
STRONGEST = 10_000.0


@contextlib.contextmanager
def inject(
    model: nn.Module,
    lora: GeneratedLoRA,
    strength: Strength = 1.0,
    index: Sequence[int] | Tensor | None = None,
    skip_missing: bool = False,
) -> Iterator[nn.Module]:
    """Run `model` with the LoRA inside the block, unmerged; always undone. Injections nest.

    strength: a number, or {pattern: number} over target paths ("*" matches dots too); the last match
        counts, a target that no pattern matches gets 1.
    index: which LoRA each item of the model's batch uses. Without it, a single LoRA serves every
        item, and a batch of LoRAs needs a model batch of the same size. Inputs whose first
        dimension is a multiple of the index (windows of an image, say) repeat it item by item.
    skip_missing: leave targets out that the model lacks, and say so in the log.
    Gradients flow into the LoRA and so to a generator. Raises HYWUError, before anything is changed,
    when a target is missing or has another shape, or a pattern matches nothing.
    """
    strengths = _strengths(model, lora, strength, skip_missing)
    hooks = _hooks(model, lora, strengths, _as_index(lora, index))
    handles = []
    try:
        for module, hook in hooks:
            handles += attach(module, hook)
        yield model
    finally:
        for handle in reversed(handles):
            handle.remove()


@dataclass
class Merged:
    """What `merge` changed: the original weights, for `unmerge`."""

    originals: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)


@torch.no_grad()
def merge(
    model: nn.Module, lora: GeneratedLoRA, strength: Strength = 1.0, skip_missing: bool = False
) -> Merged:
    """Add ``s·B·A`` to the base weights. Returns what `unmerge` needs to restore them bit by bit.

    The LoRA must be a single one.
    skip_missing: see `inject`.
    Raises HYWUError, before anything is changed, on a batch, a missing or misshapen target, or a weight that
    isn't floating point (quantized). The originals rest in host memory.
    """
    if lora.batch_size != 1:
        raise HYWUError(
            f"{lora.batch_size} LoRAs can't be merged into one base model; pick one with select(i), "
            "or inject() them, which gives each image of a batch its own."
        )
    strengths = _strengths(model, lora, strength, skip_missing)
    plan = [(path, s, _weights_of(model, lora, path)) for path, s in strengths.items() if s]
    merged = Merged()
    seen: set[int] = set()
    try:
        for path, s, parameters in plan:
            a, b = (factor[0].float() for factor in lora[path])
            delta = (b @ a).mul_(s * lora.scale)
            delta = delta.mT if is_conv1d(submodule(model, path)) else delta
            for (parameter, rows), piece in zip(
                parameters, _pieces(delta, parameters), strict=True
            ):
                if id(parameter) not in seen:
                    merged.originals.append((parameter, _set_aside(parameter)))
                    seen.add(id(parameter))
                part = parameter[rows]
                part.copy_(part.float() + piece.reshape(part.shape).to(part.device))
    except BaseException:
        unmerge(merged)
        raise
    return merged


@torch.no_grad()
def unmerge(merged: Merged) -> None:
    """Restore the weights that `merge` changed, exactly. A second call does nothing.

    Of several merges into one model the last is undone first: each restores what it found.
    """
    while merged.originals:
        parameter, original = merged.originals.pop()
        parameter.copy_(original, non_blocking=True)


def target_strengths(lora: GeneratedLoRA, strength: Strength) -> dict[str, float]:
    """Strength of every target. Raises HYWUError on a number beyond `STRONGEST` or an idle pattern."""
    patterns = strength if isinstance(strength, Mapping) else {"*": strength}
    for pattern, value in patterns.items():
        if not abs(value) <= STRONGEST:
            raise HYWUError(
                f"The strength for '{pattern}' is {value}; it must be a finite number from "
                f"{-STRONGEST:g} to {STRONGEST:g}."
            )
        if not any(fnmatchcase(path, pattern) for path in lora):
            raise HYWUError(
                f"The strength pattern '{pattern}' matches none of the LoRA's {len(lora)} targets, "
                f"such as {next(iter(lora))}."
            )
    result = dict.fromkeys(lora, 1.0)
    for pattern, value in patterns.items():
        result.update({path: float(value) for path in lora if fnmatchcase(path, pattern)})
    return result


def _strengths(
    model: nn.Module, lora: GeneratedLoRA, strength: Strength, skip_missing: bool
) -> dict[str, float]:
    """Strength of every target that the model has. Raises HYWUError, also where it lacks some."""
    strengths = target_strengths(lora, strength)
    for path in lora.layout.missing(model, skip_missing):
        del strengths[path]
    return strengths


# -- unmerged -----------------------------------------------------------------------------------


def _hooks(
    model: nn.Module, lora: GeneratedLoRA, strengths: Mapping[str, float], index: Tensor | None
) -> list[tuple[nn.Module, Callable]]:
    """(module, forward hook) for every target with a strength."""
    hooks: list[tuple[nn.Module, Callable]] = []
    for path, strength in strengths.items():
        if strength == 0:
            continue
        pair, s = lora[path], strength * lora.scale
        module = submodule(model, path)
        if lora.target(path).module.num_experts:
            if module is not None and reads_ends(module):
                hooks.append((module, GroupedAdapter(path, pair, s, index)))
            else:
                hooks += expert_hooks(model, path, pair, s)
        elif is_pointwise_conv(module):
            hooks.append((module, ConvAdapter(path, pair, s, index)))
        else:
            hooks.append((module, LinearAdapter(path, pair, s, index)))
    return hooks


def _as_index(lora: GeneratedLoRA, index: Sequence[int] | Tensor | None) -> Tensor | None:
    if index is None:
        return None
    if isinstance(index, Tensor):
        # the values of a tensor are not looked at: that would wait for the device
        return index.to(torch.int64)
    bad = [i for i in index if not 0 <= i < lora.batch_size]
    if bad or not len(index):
        raise HYWUError(
            f"index names the LoRAs {bad or 'of no item'}; there are {lora.batch_size}, counted from 0."
        )
    return moved(torch.tensor(list(index), dtype=torch.int64), lora.device)


# -- merged -------------------------------------------------------------------------------------


def _weights_of(model: nn.Module, lora: GeneratedLoRA, path: str) -> list[tuple[nn.Parameter, Any]]:
    """(base weight, index of the part that is meant) of a target: one, or one per expert."""
    module = submodule(model, path)
    if module is not None:
        weights = [(module.weight, ...)]
    else:
        place = find_experts(model, path)
        weights = []
        for i in range(len(place.modules)):
            value = place.value(i)
            rows = place.rows(value.shape[-2])
            weights.append((value, (slice(None), rows) if place.bank else rows))
    for weight, _ in weights:
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise HYWUError(
                f"{path}: the base weight is {getattr(weight, 'dtype', type(weight).__name__)}, into "
                "which nothing can be merged exactly; use inject() instead."
            )
    return weights


def _set_aside(parameter: nn.Parameter) -> Tensor:
    """A copy of a weight in host memory: an accelerator has no room for a second model."""
    if parameter.device.type != "cuda":
        return parameter.detach().to("cpu", copy=True)
    host = torch.empty_like(parameter, device="cpu", pin_memory=True)
    return host.copy_(parameter, non_blocking=True)  # ordered before what changes the weight


def _pieces(delta: Tensor, parameters: list[Any]) -> Sequence[Tensor]:
    return [delta] if len(parameters) == 1 else delta.unbind(0)
