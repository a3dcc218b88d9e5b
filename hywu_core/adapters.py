"""What a LoRA adds to a module's output, as forward hooks: Linear, 1x1 convolution, experts of any form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .discovery import ExpertPlace, find_experts
from .errors import HYWUError
from .grouped import grouped_delta


def linear_delta(x: Tensor, a: Tensor, b: Tensor, s: float, index: Tensor | None = None) -> Tensor:
    """``s·B(A x)`` for the input of a Linear.

    x: ``[n, ..., in]``.
    a: ``[K, r, in]``, b: ``[K, out, r]``; one LoRA (K = 1) serves all items, else `index` (int64 ``[n]``)
        names each item's, and without it K must be n.
    Returns ``[n, ..., out]``.
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
    """``output += s·B(A x)`` in place, in two products: output ``[n, ..., out]`` dense but for the last
    dimension, which may be a part of a wider one; a and b as in `linear_delta` without an index. Returns output.
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


class Adapter:
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
        self.index = index = moved(self.index, x.device)
        return index if repeats == 1 else index.repeat_interleave(repeats)


class LinearAdapter(Adapter):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if _takes_more(output, x, self._pair):
            x = x.to(output.dtype)
            return add_linear_(output, x, *self.items_for(x), self.s)
        delta = linear_delta(x, *self.pair_for(x), self.s, self.index_for(x))
        return output + delta.to(output.dtype)


class ConvAdapter(Adapter):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if _takes_more(output, x, self._pair):
            x = x.to(output.dtype)
            return add_conv_(output, x, *self.items_for(x), self.s)
        delta = conv_delta(x, *self.pair_for(x), self.s, self.index_for(x))
        return output + delta.to(output.dtype)


def _takes_more(output: Tensor, x: Tensor, pair: tuple[Tensor, Tensor]) -> bool:
    """Whether a product may add to a module's output where it lies: as `joins`, and no gradient asks for it."""
    differentiable = output.requires_grad or any(factor.requires_grad for factor in pair)
    return not (torch.is_grad_enabled() and differentiable) and joins(output, x)


def joins(output: Tensor, x: Tensor) -> bool:
    """Whether a product of a module's input may add to its output in place: dense, and in the dtype in which
    the module has multiplied, x's or autocast's, so that ``x.to(output.dtype)`` is what it has seen.
    """
    kind = x.device.type
    seen = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return output.dtype == seen and output.is_contiguous() and output is not x


class PartAdapter(LinearAdapter):
    """For one expert, where a LoRA adapts a half of the module's outputs."""

    def __init__(self, place: ExpertPlace, *args: Any) -> None:
        super().__init__(*args)
        self.place = place

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        rows = slice(None) if self.place.half is None else self.place.rows(output.shape[-1])
        if _takes_more(output, x, self._pair):
            # two launches for each expert that has rows, of which a model may have thousands
            x = x.to(output.dtype)
            add_linear_(output[..., rows], x, *self.pair_for(x), self.s)
            return output
        delta = linear_delta(x, *self.pair_for(x), self.s, self.index_for(x)).to(output.dtype)
        if self.place.half is not None:
            delta = F.pad(delta, (rows.start, output.shape[-1] - rows.stop))
        return output + delta


class BankSwap(Adapter):
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


class GroupedAdapter(Adapter):
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
                self.index = moved(self.index, which.device)
                which = self.index[which]
        return output + grouped_delta(x, ends, a, b, self.s, which).to(output.dtype)


def expert_hooks(
    model: nn.Module, path: str, pair: tuple[Tensor, Tensor], s: float
) -> list[tuple[nn.Module, Callable]]:
    """Hooks for experts that aren't called as `GroupedLinear`: a list of modules, or a bank.

    pair: one LoRA's ``[1, E, r, in]`` and ``[1, E, out, r]``.
    Raises HYWUError on several.
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
        (expert, PartAdapter(place, f"{path}[{e}]", (a[:, e], b[:, e]), s, None))
        for e, expert in enumerate(place.modules)
    ]


def attach(module: nn.Module, hook: Callable) -> list[Any]:
    """Register a hook of `inject`; returns handles with ``remove()``."""
    if isinstance(hook, BankSwap):
        before = module.register_forward_pre_hook(hook.swap)
        # also after an error in the module: what is swapped in never stays
        after = module.register_forward_hook(hook.restore, always_call=True)
        return [before, after]
    return [module.register_forward_hook(hook, with_kwargs=True)]


def moved(index: Tensor, device: torch.device) -> Tensor:
    """On a device; the host doesn't wait for a copy to a GPU."""
    return index.to(device, non_blocking=device.type == "cuda")
