"""GeneratedLoRA: the value that comes out of a generator. Views of its buffers, never changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Items, batch_index
from .errors import HYWUError
from .layout import LoRALayout, Module, Stack, Target
from .tokens import token_grid

#: (stack index, module index, "A" or "B")
FactorKey = tuple[int, int, str]


class LoRAPair(NamedTuple):
    """Both factors of one target: A ``[B, (E,) rank, in]``, B ``[B, (E,) out, rank]``."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True, eq=False)
class GeneratedLoRA:
    """A batch of LoRAs of one layout; item i adapts the base model for item i of a batch.

    factors: (stack, module, side) -> ``[B, layers, *shape]``: one tensor for all layers of a stack,
        a view of the generator's output buffer where a generator made it.
    grids: the output buffers themselves, ``[B, layers, tokens, rank, token_dim]`` a stack, or ().
    provenance: JSON-safe origin: instruction, condition fingerprint, generator, base.
    """

    layout: LoRALayout
    factors: Mapping[FactorKey, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    grids: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        batches = set()
        for s, stack in enumerate(self.layout.stacks):
            for m, module in enumerate(stack.modules):
                for side in "AB":
                    value = self.factors[s, m, side]
                    wanted = (len(stack.layers), *module.shape(side, self.layout.rank))
                    if tuple(value.shape[1:]) != wanted:
                        raise HYWUError(
                            f"{stack.prefix}*.{module.name}.lora_{side} is "
                            f"{tuple(value.shape)}; the layout says [batch, "
                            f"{', '.join(map(str, wanted))}]."
                        )
                    batches.add(value.shape[0])
        if len(batches) != 1:
            raise HYWUError(f"The LoRA's matrices differ in batch size: {sorted(batches)}.")
        object.__setattr__(self, "factors", MappingProxyType(dict(self.factors)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    # -- makers ----------------------------------------------------------------------------------

    @classmethod
    def from_grids(
        cls,
        layout: LoRALayout,
        grids: Sequence[Tensor],
        provenance: Mapping[str, Any] | None = None,
    ) -> GeneratedLoRA:
        """Views of token grids ``[B, layers, tokens, rank, token_dim]``, one per stack."""
        factors: dict[FactorKey, Tensor] = {}
        for s, (stack, grid) in enumerate(zip(layout.stacks, grids, strict=True)):
            pieces = token_grid(stack, layout.rank, grid.shape[-1]).detokenize(grid)
            factors |= {(s, m, side): value for (m, side), value in pieces.items()}
        return cls(layout, factors, provenance or {}, tuple(grids))

    @classmethod
    def from_pairs(
        cls,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        alpha: float,
        *,
        conv: frozenset[str] | set[str] = frozenset(),
        layers: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> GeneratedLoRA:
        """A LoRA from single matrices: target path -> (A ``[B, (E,) r, in]``, B ``[B, (E,) out, r]``).

        conv: paths whose base module is a 1x1 convolution.
        layers: path -> the path of its layer; without it a path is split behind its first number.
        Layers with equal modules share a stack.
        """
        ranks = {a.shape[-2] for a, _ in pairs.values()} | {b.shape[-1] for _, b in pairs.values()}
        if len(ranks) != 1:
            raise HYWUError(f"The LoRA's matrices differ in rank: {sorted(ranks)}.")
        stacks = _group(pairs, conv, layers or {})
        layout = LoRALayout(stacks, ranks.pop(), alpha)
        factors: dict[FactorKey, Tensor] = {}
        for s, stack in enumerate(stacks):
            for m in range(len(stack.modules)):
                paths = [stack.target(n, m) for n in range(len(stack.layers))]
                factors[s, m, "A"] = torch.stack([pairs[path][0] for path in paths], dim=1)
                factors[s, m, "B"] = torch.stack([pairs[path][1] for path in paths], dim=1)
        return cls(layout, factors, provenance or {})

    # -- reading ---------------------------------------------------------------------------------

    @cached_property
    def _targets(self) -> dict[str, Target]:
        return {target.path: target for target in self.layout.targets()}

    def __getitem__(self, path: str) -> LoRAPair:
        target = self._targets.get(path)
        if target is None:
            raise KeyError(f"{path} is no target of this LoRA (it has {len(self)})")
        a, b = (self.factors[target.stack, target.module_index, side] for side in "AB")
        return LoRAPair(a[:, target.layer], b[:, target.layer])

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def __contains__(self, path: object) -> bool:
        return path in self._targets

    def items(self) -> Iterator[tuple[str, LoRAPair]]:
        """(target path, pair) in the order of the layout."""
        return ((path, self[path]) for path in self)

    def target(self, path: str) -> Target:
        """Where a target stands in the layout."""
        return self._targets[path]

    @property
    def rank(self) -> int:
        return self.layout.rank

    @property
    def scale(self) -> float:
        """alpha / rank, the factor of B·A."""
        return self.layout.scale

    @property
    def batch_size(self) -> int:
        return self._any.shape[0]

    @property
    def device(self) -> torch.device:
        return self._any.device

    @property
    def dtype(self) -> torch.dtype:
        return self._any.dtype

    @property
    def _any(self) -> Tensor:
        return next(iter(self.factors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the LoRA holds on its device."""
        held = self.grids or tuple(self.factors.values())
        return sum(value.numel() * value.element_size() for value in held)

    # -- making others ---------------------------------------------------------------------------

    def select(self, items: Items) -> GeneratedLoRA:
        """One item (the batch dimension stays) or several, as views where indexing gives views.

        Raises HYWUError on items that aren't there.
        """
        index, chosen = batch_index(items, self.batch_size, "the LoRA")
        provenance = dict(self.provenance)
        for key, value in provenance.items():
            if isinstance(value, list) and len(value) == self.batch_size:
                provenance[key] = [value[i] for i in chosen]
        return self._map(lambda value: value[index], provenance)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> GeneratedLoRA:
        """The same LoRA elsewhere or in another dtype; one copy per buffer, not one per matrix."""
        return self._map(
            lambda value: value.to(device=device, dtype=dtype, non_blocking=non_blocking)
        )

    def detach(self) -> GeneratedLoRA:
        """The same values, cut from the autograd graph."""
        return self._map(Tensor.detach)

    def _map(self, change, provenance: Mapping[str, Any] | None = None) -> GeneratedLoRA:
        provenance = self.provenance if provenance is None else provenance
        if self.grids:
            return self.from_grids(self.layout, [change(grid) for grid in self.grids], provenance)
        factors = {key: change(value) for key, value in self.factors.items()}
        return replace(self, factors=factors, provenance=provenance)

    def blend(self, other: GeneratedLoRA, weight: float) -> GeneratedLoRA:
        """``(1 - weight)·self + weight·other`` in weight space: the ranks are concatenated.

        The result has rank ``self.rank + other.rank`` and adds to every base weight the mixture of
        what the two add, exact up to the rounding of B times its weight in the wider of the two dtypes.
        Raises HYWUError when the targets or batch sizes disagree.
        """
        self._check_mixable(other, weight)
        rank = self.rank + other.rank
        # B carries the ratio of the scales, so that one scale serves both halves
        first, second = (1 - weight), weight * other.scale / self.scale
        factors = {}
        for key, value in self.factors.items():
            value, theirs = _alike(value, other.factors[key])
            if key[2] == "A":
                factors[key] = torch.cat([value, theirs], dim=-2)
            else:
                factors[key] = torch.cat([value * first, theirs * second], dim=-1)
        layout = self.layout.with_rank(rank)
        return GeneratedLoRA(layout, factors, _mixture("blend", self, other, weight))

    def _check_mixable(self, other: GeneratedLoRA, weight: float) -> None:
        if not weight == weight or abs(weight) == float("inf"):
            raise HYWUError(f"The weight of a mixture is {weight}; it must be a finite number.")
        if self.scale == 0:
            raise HYWUError("The first LoRA of a mixture has scale 0: exchange the two.")
        if self.layout.stacks != other.layout.stacks:
            ours, theirs = set(self), set(other)
            unlike = sorted(ours ^ theirs)[:4] or ["their shapes differ"]
            raise HYWUError(
                f"The two LoRAs target different modules (for example {', '.join(unlike)}); only LoRAs "
                "for the same base model and layout can be mixed."
            )
        if self.batch_size != other.batch_size and 1 not in (self.batch_size, other.batch_size):
            raise HYWUError(
                f"The two LoRAs have {self.batch_size} and {other.batch_size} items; mix equal "
                "batches, or one item with many."
            )

    # -- measuring -------------------------------------------------------------------------------

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """Frobenius norm of ``scale·B·A`` for every target: path -> float32 ``[B]``.

        Through QR of the factors (``|B·A| = |R_B·R_A^T|``), never forming the product. Experts count
        together. Stays on the device, but for those that have no QR (MPS).
        """
        result = {}
        for s, stack in enumerate(self.layout.stacks):
            for m in range(len(stack.modules)):
                values = _product_norm(self.factors[s, m, "A"], self.factors[s, m, "B"])
                for n in range(len(stack.layers)):
                    result[stack.target(n, m)] = values[:, n] * abs(self.scale)
        return {path: result[path] for path in self}

    @torch.no_grad()
    def is_finite(self) -> Tensor:
        """Scalar bool tensor on the LoRA's device; reading it is what waits for the device."""
        held = self.grids or tuple(self.factors.values())
        # both ends pass NaN on; isfinite of all values would make copies of them
        ends = [end for value in held for end in torch.aminmax(value.detach())]
        return torch.isfinite(torch.stack(ends)).all()

    def check_finite(self, what: str = "The generated LoRA") -> None:
        """Raise HYWUError, naming targets, when a value is NaN or infinite. Waits for the device."""
        if bool(self.is_finite()):
            return
        bad = [
            p for p, pair in self.items() if not all(bool(torch.isfinite(v).all()) for v in pair)
        ]
        names = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise HYWUError(
            f"{what} has values that are not finite, in {names}; generate again in a wider precision "
            "(bfloat16 or float32) and check the condition."
        )

    def save(self, path: str | Path, format: str = "native", overwrite: bool = False) -> Path:
        """Write it as "native" (everything), "peft" (a folder) or "comfyui" (one file)."""
        from .formats import save_lora

        return save_lora(self, path, format, overwrite)


def _alike(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the first's device in the wider dtype, a single item repeated where the other has more."""
    dtype, batch = torch.promote_types(one.dtype, two.dtype), max(one.shape[0], two.shape[0])
    two = two.to(one.device, dtype)
    one = one.to(dtype)
    return one.expand(batch, *one.shape[1:]), two.expand(batch, *two.shape[1:])


def _product_norm(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius norm of B·A over the last two dimensions, experts summed: ``[B, layers]``."""
    r_a, r_b = _triangle(a.mT), _triangle(b)
    squared = (r_b @ r_a.mT).square().sum(dim=(-2, -1))
    return (squared.flatten(2).sum(-1) if squared.ndim > 2 else squared).sqrt()


def _triangle(matrix: Tensor) -> Tensor:
    """R of the QR decomposition, in float32: QR has no half precision, MPS no float64."""
    try:
        return torch.linalg.qr(matrix.float(), mode="r").R
    except NotImplementedError:
        return torch.linalg.qr(matrix.float().cpu(), mode="r").R.to(matrix.device)


def _group(
    pairs: Mapping[str, tuple[Tensor, Tensor]], conv: frozenset[str] | set[str], given: Mapping
) -> tuple[Stack, ...]:
    layers: dict[str, dict[str, Module]] = {}
    for path, (a, b) in pairs.items():
        layer = given.get(path, _layer_of(path))
        name = path[len(layer) + 1 :] if layer else path
        experts = a.shape[1] if a.ndim == 4 else 0
        module = Module(name, a.shape[-1], b.shape[-2], experts, path in conv)
        layers.setdefault(layer, {})[name] = module
    groups: dict[tuple[Module, ...], list[str]] = {}
    for layer, modules in layers.items():
        groups.setdefault(tuple(modules.values()), []).append(layer)
    return tuple(Stack(tuple(paths), modules) for modules, paths in groups.items())


def _layer_of(path: str) -> str:
    """``model.layers.3.self_attn.qkv`` -> ``model.layers.3``; "" when no number is inside."""
    parts = path.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit() and i:
            return ".".join(parts[: i + 1])
    return ""


def _mixture(kind: str, one: GeneratedLoRA, two: GeneratedLoRA, weight: float) -> dict[str, Any]:
    return {kind: {"weight": weight, "of": [dict(one.provenance), dict(two.provenance)]}}
