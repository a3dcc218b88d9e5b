"""Finding target modules in any torch model: repeated blocks, Linear and 1x1-conv modules, experts.

A *layer* is an entry of a numbered container (``nn.ModuleList``, ``nn.Sequential``) whose entries
are of one class and hold target modules; of nested ones the innermost counts, so the layers of a
UNet are its transformer blocks and the rest of each level forms stacks of its own. Lists of experts
are no layers: they become grouped modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from .errors import HYWUError, get_logger
from .layout import Module, Stack

logger = get_logger(__name__)

#: Expert matrices that some models keep in one: name -> (fused name, first or second half) by w1 (gate), w2
#: (down), w3 (up). Names tell the order: HunyuanImage-3's stacks up on gate, transformers' gate on up.
FUSED_EXPERTS: dict[str, tuple[tuple[str, int | None], ...]] = {
    "w1": (("gate_and_up_proj", 1), ("gate_up_proj", 0)),
    "w2": (("down_proj", None),),
    "w3": (("gate_and_up_proj", 0), ("gate_up_proj", 1)),
}


@dataclass(frozen=True)
class ExpertPlace:
    """Where a model keeps the matrices of a grouped target.

    modules: one per expert, or one for all.
    parameter: its name there, ``[out, in]`` of one expert or ``[experts, out, in]`` of all.
    half: which half of its rows is meant, or None for all of them.
    """

    modules: tuple[nn.Module, ...]
    parameter: str = "weight"
    half: int | None = None

    @property
    def bank(self) -> bool:
        """Whether one parameter holds all experts."""
        return len(self.modules) == 1 and self.value(0).ndim == 3

    def value(self, module: int) -> Tensor:
        return getattr(self.modules[module], self.parameter)

    def rows(self, out: int) -> slice:
        """The rows that are meant, of `out` that are there."""
        return (
            slice(None)
            if self.half is None
            else slice(out // 2 * self.half, out // 2 * (self.half + 1))
        )

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(experts, out, in), or None where the experts differ."""
        if self.bank:
            experts, out, in_ = self.value(0).shape
        else:
            shapes = {linear_shape(module) for module in self.modules}
            if len(shapes) != 1 or (found := shapes.pop()) is None:
                return None
            experts, (_, out, in_) = len(self.modules), found
        return (experts, out if self.half is None else out // 2, in_)


def find_experts(model: nn.Module, path: str) -> ExpertPlace | None:
    """The matrices of ``<experts>.<name>``: a list of modules that have `name`, a bank of that name, or
    either under a fused name (`FUSED_EXPERTS`). None when there is nothing of the kind.
    """
    owner, _, name = path.rpartition(".")
    for fused, half in ((name, None), *FUSED_EXPERTS.get(name, ())):
        if modules := expert_modules(model, f"{owner}.{fused}"):
            return ExpertPlace(tuple(modules), "weight", half)
        holder = submodule(model, owner)
        value = getattr(holder, fused, None)
        if isinstance(value, nn.Module) and getattr(getattr(value, "weight", None), "ndim", 0) == 3:
            return ExpertPlace((value,), "weight", half)
        if isinstance(holder, nn.Module) and isinstance(value, Tensor) and value.ndim == 3:
            return ExpertPlace((holder,), fused, half)
    return None


class _Found(NamedTuple):
    layer: str
    module: Module


def linear_shape(module: nn.Module) -> tuple[int, int, int] | None:
    """(experts, out, in) of a module that a LoRA can adapt, or None.

    Duck-typed, since quantized layers rarely inherit from nn.Linear: anything with integer
    ``in_features`` and ``out_features``, a convolution with kernel 1 and one group, a grouped module
    whose weight is ``[experts, out, in]``, or a Conv1D of GPT-2 and the models after it.
    """
    out, in_ = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(out, int) and isinstance(in_, int):
        experts = getattr(module, "num_experts", 0)
        return (experts if isinstance(experts, int) else 0, out, in_)
    if is_pointwise_conv(module):
        return (0, module.out_channels, module.in_channels)
    if is_conv1d(module):
        in_, out = module.weight.shape
        return (0, out, in_)
    return None


def is_conv1d(module: nn.Module | None) -> bool:
    """Whether it is transformers' Conv1D: a Linear whose weight is ``[in, out]``."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and getattr(weight, "ndim", 0) == 2


def is_pointwise_conv(module: nn.Module) -> bool:
    kernel = getattr(module, "kernel_size", None)
    return (
        isinstance(kernel, tuple)
        and all(k == 1 for k in kernel)
        and all(s == 1 for s in getattr(module, "stride", (1,)))
        and getattr(module, "groups", 0) == 1
        and not getattr(module, "transposed", False)
    )


def target_shape(model: nn.Module, path: str, num_experts: int) -> tuple[int, int, int] | None:
    """(experts, out, in) of the target at `path`; None when there is no such module.

    A grouped target is one module with a three-dimensional weight, or what `find_experts` finds.
    """
    module = submodule(model, path)
    if module is not None and (shape := linear_shape(module)) is not None:
        return shape
    place = find_experts(model, path) if num_experts else None
    return None if place is None else place.shape


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The module at `path`, or None."""
    for name in path.split(".") if path else ():
        model = getattr(model, name, None)  # type: ignore[assignment]
        if not isinstance(model, nn.Module):
            return None
    return model


def expert_modules(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules of ``<list>.<name>``, one per expert; empty when there is no such list."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        experts = submodule(model, ".".join(parts[:cut]))
        if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
            children = experts.values() if isinstance(experts, nn.ModuleDict) else experts
            found = [submodule(expert, ".".join(parts[cut:])) for expert in children]
            return [module for module in found if module is not None]
    return []


def find_stacks(
    model: nn.Module,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> tuple[Stack, ...]:
    """The stacks of `model`. Layers with equal modules share a stack, wherever they stand."""
    include, exclude = _patterns(include), _patterns(exclude)
    levels = _layer_paths(model)
    layers: dict[str, dict[str, Module]] = {}
    for path, module in model.named_modules():
        shape = linear_shape(module)
        if shape is None or _matches(path, exclude):
            continue
        found = _place(path, shape, is_pointwise_conv(module), levels, model)
        if include:
            if not _matches(path, include):
                continue
        elif not found.layer:
            continue
        _add(layers.setdefault(found.layer, {}), found.module)
    groups: dict[tuple[Module, ...], list[str]] = {}
    for layer, modules in layers.items():
        groups.setdefault(tuple(modules.values()), []).append(layer)
    if not groups:
        raise HYWUError(_nothing_found(model, include, exclude))
    for pattern in exclude:
        if not any(fnmatchcase(path, pattern) for path, _ in model.named_modules()):
            logger.warning("exclude='%s' matches no module of %s", pattern, type(model).__name__)
    return tuple(Stack(tuple(paths), modules) for modules, paths in groups.items())


def _nothing_found(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> str:
    """Why a model has no stacks, with names that are in it."""
    name = type(model).__name__
    all_ = [path for path, module in model.named_modules() if linear_shape(module) and path]
    kept = [path for path in all_ if not _matches(path, exclude)]
    if not all_:
        kinds = sorted({type(m).__name__ for m in model.modules() if list(m.parameters(False))})
        return (
            f"{name}: has no Linear, Conv1D or 1x1-convolution module, which are what a LoRA can adapt; "
            f"its weights lie in {', '.join(kinds[:6]) or 'no module'}."
        )
    if not kept:
        return f"{name}: exclude leaves none of its {len(all_)} modules, such as {all_[0]}; exclude less."
    there = f"It has {len(kept)} modules, such as {_shown(kept)}"
    if include:
        leaf = kept[0].rpartition(".")[2]
        return (
            f"{name}: no repeated blocks or other modules match include={', '.join(map(repr, include))}. "
            f"{there}; include='*{leaf}' takes those called so, include='*' all."
        )
    return f"{name}: no repeated blocks were found. {there}; include='*' takes all of them."


def _shown(paths: Sequence[str]) -> str:
    return ", ".join([*paths[:2], *paths[-1:]] if len(paths) > 3 else paths)


def _patterns(patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns or ())


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _holds_target(module: nn.Module) -> bool:
    return any(linear_shape(m) is not None for m in module.modules())


def _layer_paths(model: nn.Module) -> set[str]:
    """Paths of all entries of numbered containers that qualify as layers."""
    paths: set[str] = set()
    for path, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or is_expert_list(path):
            continue
        entries = [(n, m) for n, m in container.named_children() if _holds_target(m)]
        direct = any(linear_shape(m) is not None for _, m in entries)
        if entries and not direct and len({type(m) for _, m in entries}) == 1:
            paths |= {f"{path}.{name}" if path else name for name, _ in entries}
    return paths


def is_expert_list(path: str) -> bool:
    return "expert" in path.rpartition(".")[2].lower()


def _place(
    path: str, shape: tuple[int, int, int], conv: bool, levels: set[str], model: nn.Module
) -> _Found:
    """The layer that holds `path`, and the module as the layout names it inside that layer."""
    parts = path.split(".")
    experts, out, in_ = shape
    for cut in range(1, len(parts) - 1):
        if is_expert_list(".".join(parts[:cut])) and parts[cut].isdigit():
            # experts.<e>.name, one module per expert, becomes the grouped module experts.name
            experts = len(submodule(model, ".".join(parts[:cut])) or ())  # type: ignore[arg-type]
            parts = parts[:cut] + parts[cut + 1 :]
            break
    cuts = [cut for cut in range(1, len(parts)) if ".".join(parts[:cut]) in levels]
    cut = max(cuts, default=0)
    return _Found(".".join(parts[:cut]), Module(".".join(parts[cut:]), in_, out, experts, conv))


def _add(modules: dict[str, Module], module: Module) -> None:
    """Add a layer's module; of a list of experts the first stands for all, which must be like it."""
    known = modules.setdefault(module.name, module)
    if known != module:
        raise HYWUError(
            f"experts of {module.name} differ in shape: {known.out_features} x "
            f"{known.in_features} and {module.out_features} x {module.in_features}; leave them out "
            f"with exclude='*{module.name.rpartition('.')[0]}*'."
        )
