"""LoRALayout: which matrices a LoRA has. The contract between a generator and a base model.

A layout is an ordered list of *stacks*. A stack is a list of layers that hold the same modules with
the same shapes: the transformer blocks of one type. One stack is the official HY-WU layout; Flux has
two (double and single blocks); a UNet has one per block type and width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import HYWUError, get_logger
from .fingerprint import of_json

if TYPE_CHECKING:
    from torch import nn

logger = get_logger(__name__)

#: More are no base model's: the largest have some thousands.
MOST_TARGETS = 200_000
#: Of a matrix' side and of a number of experts.
LARGEST = 1 << 31


@dataclass(frozen=True)
class Module:
    """One target module of a layer.

    name: path inside the layer, for example ``self_attn.qkv_proj``.
    in_features, out_features: the base weight is ``[out_features, in_features]``.
    num_experts: 0, or the number of experts of a grouped module, whose base weight is
        ``[num_experts, out_features, in_features]`` (or a list of that many modules).
    conv: the base module is a convolution with a kernel of size 1.
    """

    name: str
    in_features: int
    out_features: int
    num_experts: int = 0
    conv: bool = False

    def __post_init__(self) -> None:
        sizes = (self.in_features, self.out_features, self.num_experts)
        whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
        if not whole or min(*sizes[:2], sizes[2] + 1) < 1 or max(sizes) > LARGEST:
            raise HYWUError(
                f"LoRA layout: module {self.name!r} has in_features {sizes[0]!r}, out_features "
                f"{sizes[1]!r} and num_experts {sizes[2]!r}; they must be whole numbers up to 2^31, "
                "the first two 1 or more."
            )

    def shape(self, side: str, rank: int) -> tuple[int, ...]:
        """Shape of ``lora_A`` (side "A") or ``lora_B`` (side "B") at `rank`, without the batch."""
        matrix = (rank, self.in_features) if side == "A" else (self.out_features, rank)
        return (self.num_experts, *matrix) if self.num_experts else matrix


@dataclass(frozen=True)
class Stack:
    """Layers that share one set of modules. `layers` are their full paths in the base model."""

    layers: tuple[str, ...]
    modules: tuple[Module, ...]

    @property
    def prefix(self) -> str:
        """What the layers' paths have in common, for example ``model.layers.``."""
        heads = {layer.rpartition(".")[0] for layer in self.layers}
        head = heads.pop() if len(heads) == 1 else ""
        return f"{head}." if head else ""

    def target(self, layer: int, module: int) -> str:
        """Full path of one target module in the base model."""
        return ".".join(filter(None, (self.layers[layer], self.modules[module].name)))


@dataclass(frozen=True)
class Target:
    """One target module of one layer, with its place in the layout."""

    path: str
    stack: int
    layer: int
    module: Module
    module_index: int


@dataclass(frozen=True)
class LoRALayout:
    """Stacks, rank and alpha. ``scale = alpha / rank``; alpha defaults to the rank."""

    stacks: tuple[Stack, ...]
    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise HYWUError(f"LoRA layout: the rank is {self.rank}; it must be 1 or more.")
        if not math.isfinite(self.alpha):
            raise HYWUError(f"LoRA layout: alpha is {self.alpha}; it must be a finite number.")
        if not self.stacks or not all(s.layers and s.modules for s in self.stacks):
            raise HYWUError("LoRA layout: a stack without layers or modules has nothing to adapt.")
        check_count(sum(len(stack.layers) * len(stack.modules) for stack in self.stacks))
        counts = Counter(target.path for target in self.targets())
        if twice := sorted(path for path, count in counts.items() if count > 1):
            raise HYWUError(f"LoRA layout: listed more than once: {_some(twice)}.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def targets(self) -> Iterator[Target]:
        """All target modules, stack by stack, layer by layer, in the order of the layout."""
        for s, stack in enumerate(self.stacks):
            for n in range(len(stack.layers)):
                for m, module in enumerate(stack.modules):
                    yield Target(stack.target(n, m), s, n, module, m)

    def with_rank(self, rank: int, alpha: float | None = None) -> LoRALayout:
        """The same targets at another rank; alpha keeps the scale unless given."""
        return replace(self, rank=rank, alpha=self.scale * rank if alpha is None else alpha)

    @property
    def num_values(self) -> int:
        """Number of values in one LoRA of this layout."""
        return sum(
            len(stack.layers)
            * sum(math.prod(m.shape(side, self.rank)) for m in stack.modules for side in "AB")
            for stack in self.stacks
        )

    # -- JSON ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON-safe description; `from_json` restores an equal layout."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "stacks": [
                {
                    "layers": list(stack.layers),
                    "modules": [_module_to_json(module) for module in stack.modules],
                }
                for stack in self.stacks
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoRALayout:
        """Raises HYWUError when a field is missing or of the wrong type."""
        try:
            stacks = tuple(
                Stack(
                    tuple(str(layer) for layer in stack["layers"]),
                    tuple(Module(**module) for module in stack["modules"]),
                )
                for stack in data["stacks"]
            )
            return cls(stacks, int(data["rank"]), float(data["alpha"]))
        except HYWUError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise HYWUError(f"LoRA layout: the description is damaged ({error!r}).") from error

    @property
    def digest(self) -> str:
        """Hash of everything that gives a token its meaning: the order of modules included."""
        return of_json(self.to_json(), 16, separators=(",", ":"))

    # -- makers ----------------------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        model: nn.Module,
        rank: int,
        *,
        alpha: float | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> LoRALayout:
        """Find the repeated blocks of any torch model and the Linear and 1x1-conv modules in them.

        include, exclude: shell patterns over full module paths (``"*.attn.*"``). A module outside every
            repeated block takes part only when a pattern of `include` matches it.
        Raises HYWUError when nothing is found.
        """
        from .discovery import find_stacks

        stacks = find_stacks(model, include, exclude)
        return cls(stacks, rank, float(rank if alpha is None else alpha))

    # -- checks ----------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        """Raise one HYWUError that lists every target `model` lacks or has in another shape."""
        self.missing(model)

    def missing(self, model: nn.Module, skip_missing: bool = False) -> list[str]:
        """Targets that `model` lacks; without `skip_missing` they are an error.

        Raises one HYWUError that counts and names every target that is missing or has another shape (which
        is never skipped), and where nothing of the layout is in the model. A log line says what is skipped.
        """
        from .discovery import target_shape

        missing, wrong, name = [], [], type(model).__name__
        for target in self.targets():
            found = target_shape(model, target.path, target.module.num_experts)
            m = target.module
            wanted = (m.num_experts, m.out_features, m.in_features)
            if found is None:
                missing.append(target.path)
            elif found != wanted:
                wrong.append(f"{target.path} is {_shape(found)}, the layout says {_shape(wanted)}")
        whole = sum(1 for _ in self.targets())
        parts = []
        if missing and not (skip_missing and len(missing) < whole):
            parts.append(f"{len(missing)} target modules are missing: {', '.join(missing)}")
        if wrong:
            parts.append(f"{len(wrong)} have another shape: {'; '.join(wrong)}")
        if parts:
            skip = (
                "" if wrong or len(missing) == whole else " or skip the missing ones (skip_missing)"
            )
            way = model.misfit(missing) if hasattr(model, "misfit") else ""
            raise HYWUError(
                f"{name} does not fit this LoRA layout: {'. '.join(parts)}. "
                + (way or f"Use the base model that the generator or LoRA was made for{skip}.")
            )
        if missing:
            logger.warning(
                "%d of the LoRA's %d modules aren't in %s and are left out: %s",
                len(missing), whole, name, _some(missing),
            )  # fmt: skip
        return missing

    def describe(self) -> list[tuple[str, int, str, str, int]]:
        """Rows (layers, how many, module, out x in, values per LoRA) for a table."""
        rows = []
        for stack in self.stacks:
            for module in stack.modules:
                values = sum(math.prod(module.shape(side, self.rank)) for side in "AB")
                shape = _shape((module.num_experts, module.out_features, module.in_features))
                name = f"{stack.prefix}*" if len(stack.layers) > 1 else stack.layers[0]
                count = len(stack.layers)
                rows.append((name, count, module.name, shape, values * count))
        return rows


def check_count(targets: int) -> None:
    """Raises HYWUError where a description lists more modules than any model has, before it is built."""
    if targets > MOST_TARGETS:
        raise HYWUError(
            f"LoRA layout: it lists {targets:,} modules; more than {MOST_TARGETS:,} are no model's. The "
            "description is damaged."
        )


def _module_to_json(module: Module) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": module.name,
        "in_features": module.in_features,
        "out_features": module.out_features,
    }
    if module.num_experts:
        data["num_experts"] = module.num_experts
    if module.conv:
        data["conv"] = True
    return data


def _shape(shape: tuple[int, int, int]) -> str:
    experts, out, in_ = shape
    return f"{experts} x {out} x {in_}" if experts else f"{out} x {in_}"


def _some(names: Sequence[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(names[:limit])
    return f"{text} and {len(names) - limit} more" if len(names) > limit else text
