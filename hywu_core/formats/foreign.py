"""Single matrices of any program -> one GeneratedLoRA: names, experts, ranks and alphas made one."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..discovery import is_expert_list
from ..errors import HYWUError, get_logger
from ..files import HEADER
from ..layout import LoRALayout, Module
from ..lora import GeneratedLoRA
from ..precision import FLOATS, widened
from .matrices import expert_path
from .names import Names
from .native import layout_of
from .scales import Scales

logger = get_logger(__name__)

_KEY = re.compile(
    r"(?P<name>.+?)(?:\.lora_linear_layer|[._]lora)?"
    r"(?:[._](?P<down>lora_down|lora_A)|[._](?P<up>lora_up|lora_B)|\.(?P<d>down)|\.(?P<u>up))"
    r"(?:\.default)?\.weight|(?P<bare>.+)\.lora_(?P<side>A|B)|(?P<of>.+)\.alpha"
)
#: A file of mixed ranks is padded to the largest; larger than this and so many times its size is no LoRA.
MOST_BYTES, MOST_TIMES = 1 << 28, 64


def from_state_dict(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    base: LoRALayout | nn.Module | None,
    metadata: Mapping[str, str] | None = None,
    skip_missing: bool = False,
) -> GeneratedLoRA:
    """header: ours or {}.

    config: PEFT's or None.
    metadata: the file's.

    skip_missing: leave out keys that are no plain LoRA, and modules that `base` lacks: the log counts and names
        them, and the provenance under ``left_out``.
    Raises HYWUError on them otherwise, and on what contradicts itself.
    """
    told = Scales(config, metadata or {})
    pairs, scales, left_out = read_pairs(tensors, told, Names(base))
    if not pairs and set(left_out.values()) <= {NOT_PLAIN}:
        shown = f"keys such as {next(iter(left_out))}" if left_out else "an empty file"
        raise HYWUError(f"not a plain LoRA: {shown} can't be read; {READABLE}.")
    if "layout" in header:
        return _in_layout(layout_of(header), pairs, scales, header.get("provenance") or {})
    if left_out and not (skip_missing and pairs):
        raise HYWUError(_complaint(left_out, len(pairs), base))
    for warning in told.warnings:
        logger.warning("%s", warning)
    provenance = {}
    if left_out:
        provenance = {"left_out": {"count": len(left_out), "names": list(left_out)[:20]}}
        logger.warning("%s", _complaint(left_out, len(pairs), base, LEFT_OUT))
    return of_pairs(pairs, scales, provenance)


def of_pairs(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    provenance: Mapping[str, Any] | None = None,
) -> GeneratedLoRA:
    """One LoRA of single matrices: module -> lora_A ``[r, in, …]`` and lora_B ``[out, r, …]``, and its scale.

    Raises HYWUError on convolutions larger than 1x1 and on experts that are missing.
    """
    flat, conv = {}, set()
    for name, (a, b) in pairs.items():
        if a.ndim > 2:
            if math.prod(a.shape[2:]) != 1 or math.prod(b.shape[2:]) != 1:
                raise HYWUError(f"{name} is a convolution larger than 1x1, which is not supported.")
            conv.add(name)
        flat[name] = a.flatten(1), b.flatten(1)
    even, alpha = equalize(flat, scales)
    even = {name: (a[None], b[None]) for name, (a, b) in even.items()}
    grouped = _group_experts(even)
    return GeneratedLoRA.from_pairs(grouped, alpha, conv=conv, provenance=dict(provenance or {}))


def equalize(
    pairs: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float]
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """One rank (zero padding) and one alpha for all; every ``scale·B·A`` is kept.

    Where the scales differ they are folded into B: in its dtype where that changes no digit (a power of
    two that leaves no value too small for the dtype), else in float32, exact up to float32 rounding.
    Returns (pairs, alpha).
    """
    rank = max(a.shape[0] for a, _ in pairs.values())
    _check_size(pairs, rank)
    one = len(set(scales.values())) == 1
    result = {}
    for name, (a, b) in pairs.items():
        if not one:
            b = _folded(b, scales[name])
        missing = rank - a.shape[0]
        a = torch.nn.functional.pad(a, (0, 0, 0, missing))
        result[name] = a, torch.nn.functional.pad(b, (0, missing))
    return result, rank * (next(iter(scales.values())) if one else 1.0)


def _folded(b: Tensor, scale: float) -> Tensor:
    """``scale·B``, in B's dtype where every value of it is exact."""
    exact = b.float() * scale
    if math.frexp(scale)[0] in (0.5, -0.5):
        small = exact.to(b.dtype)
        if torch.equal(small.float(), exact):
            return small
    return exact


def _check_size(pairs: Mapping[str, tuple[Tensor, Tensor]], rank: int) -> None:
    """Raises HYWUError where padding to one rank would take memory that the file doesn't account for."""
    held = sum(t.nbytes for pair in pairs.values() for t in pair)
    wide = sum((a[:1].numel() + b[:, :1].numel()) * a.element_size() for a, b in pairs.values())
    if rank * wide > max(MOST_BYTES, MOST_TIMES * held):
        largest = max(pairs, key=lambda name: pairs[name][0].shape[0])
        raise HYWUError(
            f"{largest} has rank {rank}; with all modules padded to it the LoRA would take "
            f"{rank * wide / 2**30:.1f} GiB, {rank * wide // max(held, 1)} times what the file holds."
        )


class Resolver(Protocol):
    """Whose names count: `of` gives the base's name of a file's name, or None; see `names.Names`."""

    @property
    def known(self) -> Collection[str] | None:
        """The names that the base has; None where there is no base."""
        ...

    def of(self, name: str) -> str | None: ...


def read_pairs(
    tensors: Mapping[str, Tensor], scales: Scales, names: Resolver
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float], dict[str, str]]:
    """(base's name -> pair, base's name -> scale, file's name -> why it is left out).

    Raises HYWUError on half a pair, on shapes, values and dtypes that are no LoRA's, and on a module of the base
    that the file holds twice.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    left_out: dict[str, str] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            left_out[key] = NOT_PLAIN
            continue
        below = match["down"] or match["d"] or match["side"] == "A"
        side = "A" if below else "alpha" if match["of"] else "B"
        part = parts.setdefault(match["name"] or match["bare"] or match["of"], {})
        if side in part:
            raise HYWUError(f"{key}: the file holds this matrix twice, under two names.")
        part[side] = value
    pairs, found = {}, {}
    for key, part in parts.items():
        if part.keys() == {"alpha"}:  # of something else than a pair: LoHa and others
            left_out[f"{key}.alpha"] = NOT_PLAIN
            continue
        if "A" not in part or "B" not in part:
            raise HYWUError(f"{key} has only one of its two matrices; the file is incomplete.")
        a, b = widened(part["A"]), widened(part["B"])
        _check_pair(key, a, b)
        name = names.of(key)
        if name is None:
            left_out[key] = "not in the base" if names.known is not None else "without its dots"
            continue
        if name in pairs:
            raise HYWUError(f"{key}: the file holds {name} twice, under two names.")
        pairs[name] = a, b
        found[name] = scales.of(key, name, a.shape[0], part.get("alpha"))
    return pairs, found, left_out


LEFT_OUT, NOT_PLAIN = "are left out", "no plain LoRA"
READABLE = "only lora_A/lora_B or lora_down/lora_up pairs with alpha can"


def _check_pair(key: str, a: Tensor, b: Tensor) -> None:
    if min(a.ndim, b.ndim) < 2 or a.shape[0] != b.shape[1]:
        raise HYWUError(f"{key}: A is {tuple(a.shape)} and B {tuple(b.shape)}; the ranks differ.")
    if 0 in a.shape or 0 in b.shape or not {a.dtype, b.dtype} <= FLOATS:
        raise HYWUError(
            f"{key}: A is {a.dtype} {tuple(a.shape)} and B {b.dtype} {tuple(b.shape)}; both must be "
            "floating point, without a zero in their shapes."
        )


def _complaint(
    left_out: Mapping[str, str], kept: int, base: Any, done: str = "can't be read"
) -> str:
    """How many of a file's entries aren't taken, some of them by name, why, and the way out."""
    names = list(left_out)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    reasons, ways = set(left_out.values()), []
    if "not in the base" in reasons:
        ways.append(
            f"{type(base).__name__} has no such modules; use the base this LoRA was made for"
        )
    if "without its dots" in reasons:
        ways.append(
            "some names lost their dots, which only the base model knows; give the base model or layout "
            "(load_lora(path, base=…), in ComfyUI the MODEL of Load Generated LoRA)"
        )
    if NOT_PLAIN in reasons:
        ways.append(READABLE)
    if done != LEFT_OUT and kept:
        ways.append("or skip what can't be read (skip_missing)")
    return f"{len(names)} of {len(names) + kept} entries {done}: {shown}; {'; '.join(ways)}."


def _in_layout(
    layout: LoRALayout,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    provenance: Mapping[str, Any],
) -> GeneratedLoRA:
    """Our own files: back into the layout they came from, bit for bit, unless another program changed it."""
    used: set[str] = set()

    def one(path: str, side: int) -> Tensor:
        for name in (path, path.removeprefix("diffusion_model.")):
            if name in pairs:
                used.add(name)
                return pairs[name][side]
        raise HYWUError(f"the LoRA file lacks {path}, which its header lists; {CHANGED}")

    def matrix(path: str, side: int, module: Module) -> Tensor:
        shape = module.shape("AB"[side], layout.rank)
        if module.num_experts:
            each = [one(expert_path(path, str(e)), side) for e in range(module.num_experts)]
            value = torch.stack(each) if len({m.shape for m in each}) == 1 else each[0]
        else:
            value = one(path, side).flatten(1) if module.conv else one(path, side)
        if value.shape != shape:
            raise HYWUError(
                f"{path}: its matrix is {tuple(value.shape)} in the file and {shape} in its header; {CHANGED}"
            )
        return value

    factors = {}
    for s, stack in enumerate(layout.stacks):
        for m, module in enumerate(stack.modules):
            for side in range(2):
                paths = (stack.target(n, m) for n in range(len(stack.layers)))
                rows = [matrix(path, side, module) for path in paths]
                factors[s, m, "AB"[side]] = torch.stack(rows)[None]
    if more := [name for name in pairs if name not in used]:
        raise HYWUError(
            f"the LoRA file holds {len(more)} modules that its header doesn't list, such as {more[0]}; "
            f"{CHANGED}"
        )
    for name, scale in scales.items():
        if not math.isclose(scale, layout.scale, rel_tol=1e-5):
            raise HYWUError(
                f"{name} has the scale {scale:g} (alpha / rank) in the file and {layout.scale:g} in its "
                f"header; {CHANGED}"
            )
    return GeneratedLoRA(layout, factors, provenance)


CHANGED = (
    f"another program changed the one and not the other. Take the file as it was, or remove the '{HEADER}' "
    "entry of its metadata, and the tensors count."
)


def _group_experts(pairs) -> dict[str, tuple[Tensor, Tensor]]:
    """``experts.<e>.w1`` for e = 0, 1, … of equal shapes become the grouped ``experts.w1``."""
    groups: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for path, pair in pairs.items():
        parts = path.split(".")
        for cut in range(1, len(parts) - 1):
            if is_expert_list(parts[cut - 1]) and parts[cut].isdigit():
                grouped = ".".join(parts[:cut] + parts[cut + 1 :])
                groups.setdefault(grouped, {})[int(parts[cut])] = pair
                break
        else:
            groups[path] = {-1: pair}
    result = {}
    for path, found in groups.items():
        if -1 in found:
            result[path] = found[-1]
            continue
        if sorted(found) != list(range(len(found))):
            raise HYWUError(f"{path}: some experts are missing; only whole lists can be read.")
        ordered = [found[e] for e in range(len(found))]
        result[path] = (
            torch.stack([a for a, _ in ordered], 1),
            torch.stack([b for _, b in ordered], 1),
        )
    return result
