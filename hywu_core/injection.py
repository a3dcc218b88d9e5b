"""Applying a LoRA to any torch module: unmerged (hooks, one LoRA per batch item) or merged.

Unmerged, a target's output becomes ``y + s·B(A x)`` with ``s = scale·strength``, folded into the
rank-wide intermediate. Merged, ``s·B·A`` is added to the base weight (Hu et al. 2021; PEFT's words).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .discovery import ExpertPlace, find_experts, is_conv1d, is_pointwise_conv, submodule
from .errors import HYWUError
from .grouped import grouped_delta, reads_ends
from .lora import GeneratedLoRA

#: One number for all targets, or shell patterns over target paths; the last match counts.
Strength = float | Mapping[str, float]


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


def attach(module: nn.Module, hook: Callable) -> list[Any]:
    """Register a hook of `inject`; returns handles with ``remove()``."""
    if isinstance(hook, BankSwap):
        before = module.register_forward_pre_hook(hook.swap)
        # also after an error in the module: what is swapped in never stays
        after = module.register_forward_hook(hook.restore, always_call=True)
        return [before, after]
    return [module.register_forward_hook(hook, with_kwargs=True)]


@dataclass
class Merged:
    """What `merge` changed: the original weights, for `unmerge`."""

    originals: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)


@torch.no_grad()
def merge(
    model: nn.Module, lora: GeneratedLoRA, strength: Strength = 1.0, skip_missing: bool = False
) -> Merged:
    """Add ``s·B·A`` to the base weights. Returns what `unmerge` needs to restore them bit by bit.

    The LoRA must be a single one. skip_missing: see `inject`. Raises HYWUError, before anything is changed, on a batch, a
    missing or misshapen target, or a weight that isn't floating point (quantized). The originals rest in
    host memory.
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
    """Strength of every target. Raises HYWUError on a non-finite number or an idle pattern."""
    patterns = strength if isinstance(strength, Mapping) else {"*": strength}
    for pattern, value in patterns.items():
        if not math.isfinite(value):
            raise HYWUError(f"The strength for '{pattern}' is {value}; it must be a finite number.")
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


def linear_delta(x: Tensor, a: Tensor, b: Tensor, s: float, index: Tensor | None = None) -> Tensor:
    """``s·B(A x)`` for the input of a Linear.

    x: ``[n, ..., in]``; a: ``[K, r, in]``, b: ``[K, out, r]``; one LoRA (K = 1) serves all items, else
    `index` (int64 ``[n]``) names each item's, and without it K must be n. Returns ``[n, ..., out]``.
    """
    if a.shape[0] == 1:
        return F.linear(F.linear(x, a[0]) * s, b[0])
    if index is not None:
        a, b = a[index], b[index]
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    delta = torch.bmm(torch.bmm(rows, a.mT) * s, b.mT)
    return delta.view(*x.shape[:-1], b.shape[-2])


def conv_delta(x: Tensor, a: Tensor, b: Tensor, s: float, index: Tensor | None = None) -> Tensor:
    """`linear_delta` for a 1x1 convolution: x ``[n, in, ...]`` -> ``[n, out, ...]``."""
    if index is not None and a.shape[0] > 1:
        a, b = a[index], b[index]
    columns = x.flatten(2)
    delta = torch.matmul(b, torch.matmul(a, columns) * s)
    return delta.view(x.shape[0], b.shape[-2], *x.shape[2:])


def add_linear_(output: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """``output += s·B(A x)`` in place, in two products: output ``[n, ..., out]`` dense, a and b as in
    `linear_delta` without an index. Returns output.
    """
    if a.shape[0] == 1:
        low = F.linear(x, a[0]).view(-1, a.shape[1])
        output.view(-1, output.shape[-1]).addmm_(low, b[0].t(), alpha=s)
        return output
    low = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), a.mT)
    output.view(x.shape[0], -1, output.shape[-1]).baddbmm_(low, b.mT, alpha=s)
    return output


def add_conv_(output: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """`add_linear_` for a 1x1 convolution: output ``[n, out, ...]`` dense."""
    low = torch.matmul(a, x.flatten(2))
    output.view(*output.shape[:2], -1).baddbmm_(b.expand(x.shape[0], -1, -1), low, alpha=s)
    return output


class _Adapter:
    """The forward hook of one target: adds the LoRA's branch to the module's output."""

    def __init__(self, path: str, pair: tuple[Tensor, Tensor], s: float, index: Tensor | None):
        self.path, self.s, self.index = path, s, index
        self._pair = pair
        self._cast: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._items: dict[tuple, tuple[Tensor, Tensor]] = {}

    def pair_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors on x's device in x's dtype; kept, unless a gradient must flow through."""
        a, b = self._pair
        if a.device == x.device and a.dtype == x.dtype:
            return a, b
        if a.requires_grad or b.requires_grad:
            return a.to(x), b.to(x)
        key = (x.device, x.dtype)
        if key not in self._cast:
            self._cast[key] = (a.to(x), b.to(x))
        return self._cast[key]

    def items_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`pair_for` with one LoRA for each row of x's first dimension, or one that serves all; kept."""
        key = (x.device, x.dtype, x.shape[0])
        found = self._items.get(key)
        if found is None:
            index = self.index_for(x)
            found = self.pair_for(x)
            if index is not None:
                found = found[0][index], found[1][index]
            self._items[key] = found
        return found

    def index_for(self, x: Tensor) -> Tensor | None:
        """The LoRA of each row of x's first dimension; None where one serves all."""
        count = self._pair[0].shape[0]
        if count == 1:
            return None
        if self.index is None:
            if x.shape[0] != count:
                raise HYWUError(
                    f"{self.path} gets a batch of {x.shape[0]}, but there are {count} LoRAs; give "
                    "index= to say which LoRA each item uses."
                )
            return None
        repeats, rest = divmod(x.shape[0], len(self.index))
        if rest:
            raise HYWUError(
                f"{self.path} gets a batch of {x.shape[0]}, which the index of "
                f"{len(self.index)} items does not divide."
            )
        self.index = index = _moved(self.index, x.device)
        return index if repeats == 1 else index.repeat_interleave(repeats)


class _LinearAdapter(_Adapter):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if _takes_more(output, x, self._pair):
            return add_linear_(output, x, *self.items_for(x), self.s)
        delta = linear_delta(x, *self.pair_for(x), self.s, self.index_for(x))
        return output + delta.to(output.dtype)


class _ConvAdapter(_Adapter):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if _takes_more(output, x, self._pair):
            return add_conv_(output, x, *self.items_for(x), self.s)
        delta = conv_delta(x, *self.pair_for(x), self.s, self.index_for(x))
        return output + delta.to(output.dtype)


def _takes_more(output: Tensor, x: Tensor, pair: tuple[Tensor, Tensor]) -> bool:
    """Whether a product may add to a module's output where it lies: dense, and no gradient asks for it."""
    differentiable = output.requires_grad or any(factor.requires_grad for factor in pair)
    return (
        not (torch.is_grad_enabled() and differentiable)
        and output.dtype == x.dtype
        and output.is_contiguous()
        and output is not x
        and not torch.is_autocast_enabled(x.device.type)
    )


class _PartAdapter(_LinearAdapter):
    """For one expert, where a LoRA adapts a half of the module's outputs."""

    def __init__(self, place: ExpertPlace, *args: Any) -> None:
        super().__init__(*args)
        self.place = place

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        delta = linear_delta(x, *self.pair_for(x), self.s, self.index_for(x)).to(output.dtype)
        if self.place.half is not None:
            rows = self.place.rows(output.shape[-1])
            delta = F.pad(delta, (rows.start, output.shape[-1] - rows.stop))
        return output + delta


class BankSwap(_Adapter):
    """For banks ``[E, out, in]`` of modules that are called in their own way: while the module runs, its
    attribute is the bank with ``s·B·A`` added; the parameter itself is never written.
    """

    def __init__(self, place: ExpertPlace, *args: Any) -> None:
        super().__init__(*args)
        self.place = place

    def swap(self, module: nn.Module, *_: Any) -> None:
        name = self.place.parameter
        bank = getattr(module, name)
        if not bank.is_floating_point():
            raise HYWUError(
                f"{self.path}: the experts are {bank.dtype}, and this model reads them in its own way; a "
                "LoRA needs them as floating point. Load the model in bf16."
            )
        a, b = self.pair_for(bank)
        rows = self.place.rows(bank.shape[1])
        whole = bank.clone()
        whole[:, rows] = bank[:, rows] + torch.bmm(b[0], a[0]) * self.s
        # an instance's dict comes before its parameters
        module.__dict__.setdefault("_hywu_swapped", []).append((name, module.__dict__.get(name)))
        module.__dict__[name] = whole

    def restore(self, module: nn.Module, *_: Any) -> None:
        swapped = module.__dict__.get("_hywu_swapped")
        if not swapped:
            return
        name, former = swapped.pop()
        if former is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = former
        if not swapped:
            del module.__dict__["_hywu_swapped"]


class _GroupedAdapter(_Adapter):
    """For modules called as ``module(x [T, in], ends [E])`` with rows sorted by expert."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x, ends = args[0], args[1] if len(args) > 1 else kwargs["ends"]
        a, b = self.pair_for(x)
        which = None
        if a.shape[0] > 1:
            which = kwargs.get("items")
            if which is None:
                raise HYWUError(
                    f"{self.path}: {a.shape[0]} LoRAs, but the rows of an expert module don't tell which "
                    "image they belong to; pass items=, or use one LoRA at a time."
                )
            if self.index is not None:
                self.index = _moved(self.index, which.device)
                which = self.index[which]
        return output + grouped_delta(x, ends, a, b, self.s, which).to(output.dtype)


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
                hooks.append((module, _GroupedAdapter(path, pair, s, index)))
            else:
                hooks += expert_hooks(model, path, pair, s)
        elif is_pointwise_conv(module):
            hooks.append((module, _ConvAdapter(path, pair, s, index)))
        else:
            hooks.append((module, _LinearAdapter(path, pair, s, index)))
    return hooks


def expert_hooks(
    model: nn.Module, path: str, pair: tuple[Tensor, Tensor], s: float
) -> list[tuple[nn.Module, Callable]]:
    """Hooks for experts that aren't called as `GroupedLinear`: a list of modules, or a bank.

    pair: one LoRA's ``[1, E, r, in]`` and ``[1, E, out, r]``. Raises HYWUError on several.
    """
    place, (a, b) = find_experts(model, path), pair
    if place is None:
        raise HYWUError(
            f"{path}: the model has no such experts; use the one the LoRA was made for."
        )
    if a.shape[0] != 1:
        raise HYWUError(
            f"{path}: the experts of this model see rows of all images mixed, so they can take one "
            f"LoRA at a time, not {a.shape[0]}; use select(i)."
        )
    if place.bank:
        return [(place.modules[0], BankSwap(place, path, pair, s, None))]
    return [
        (expert, _PartAdapter(place, f"{path}[{e}]", (a[:, e], b[:, e]), s, None))
        for e, expert in enumerate(place.modules)
    ]


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
    return _moved(torch.tensor(list(index), dtype=torch.int64), lora.device)


def _moved(index: Tensor, device: torch.device) -> Tensor:
    """On a device; the host doesn't wait for a copy to a GPU."""
    return index.to(device, non_blocking=device.type == "cuda")


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
