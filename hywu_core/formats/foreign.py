"""Single matrices of any program -> one GeneratedLoRA: names, experts, ranks and alphas made one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..discovery import is_expert_list
from ..errors import HYWUError
from ..layout import LoRALayout
from ..lora import GeneratedLoRA
from .matrices import expert_path
from .native import layout_of

_KEY = re.compile(
    r"(?P<name>.+?)\.(?:(?P<down>lora_down|lora_A)|(?P<up>lora_up|lora_B))"
    r"(?:\.default)?\.weight|(?P<of>.+)\.alpha"
)
_PREFIXES = ("base_model.model.", "diffusion_model.")
_FLAT = "lora_unet_"


def from_state_dict(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    base: LoRALayout | nn.Module | None,
) -> GeneratedLoRA:
    """header: ours or {}; config: PEFT's or None. Raises HYWUError on keys that are no plain LoRA."""
    pairs, scales = _read(tensors, config, base)
    if "layout" in header:
        return _in_layout(layout_of(header), pairs, header.get("provenance", {}))
    flat, conv = {}, set()
    for name, (a, b) in pairs.items():
        if a.ndim > 2:
            if math.prod(a.shape[2:]) != 1 or math.prod(b.shape[2:]) != 1:
                raise HYWUError(f"{name} is a convolution larger than 1x1, which is not supported.")
            conv.add(name)
            a, b = a.flatten(1), b.flatten(1)
        flat[name] = a, b
    even, alpha = equalize(flat, scales)
    even = {name: (a[None], b[None]) for name, (a, b) in even.items()}
    return GeneratedLoRA.from_pairs(_group_experts(even), alpha, conv=conv)


def equalize(
    pairs: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float]
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """One rank (zero padding) and one alpha for all; every ``scale·B·A`` is kept.

    Where the scales differ they are folded into B: in its dtype when the scale is a power of two,
    which changes no digit, else in float32, exact up to float32 rounding. Returns (pairs, alpha).
    """
    rank = max(a.shape[0] for a, _ in pairs.values())
    one = len(set(scales.values())) == 1
    result = {}
    for name, (a, b) in pairs.items():
        if not one:
            exact = math.frexp(scales[name])[0] in (0.5, -0.5)
            b = (b if exact else b.float()) * scales[name]
        missing = rank - a.shape[0]
        a = torch.nn.functional.pad(a, (0, 0, 0, missing))
        result[name] = a, torch.nn.functional.pad(b, (0, missing))
    return result, rank * (next(iter(scales.values())) if one else 1.0)


def _read(tensors, config, base) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    parts: dict[str, dict[str, Tensor]] = {}
    odd = []
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            odd.append(key)
            continue
        side = "A" if match["down"] else "B" if match["up"] else "alpha"
        parts.setdefault(match["name"] or match["of"], {})[side] = value
    if odd or not parts:
        shown = f"keys such as {odd[0]}" if odd else "an empty file"
        raise HYWUError(
            f"not a plain LoRA: {shown} can't be read; only lora_A/lora_B or "
            "lora_down/lora_up pairs with alpha can."
        )
    names = _flat_names(base)
    pairs, scales = {}, {}
    for key, part in parts.items():
        if "A" not in part or "B" not in part:
            raise HYWUError(f"{key} has only one of its two matrices; the file is incomplete.")
        a, b = part["A"], part["B"]
        if min(a.ndim, b.ndim) < 2 or a.shape[0] != b.shape[1]:
            raise HYWUError(
                f"{key}: A is {tuple(a.shape)} and B {tuple(b.shape)}; the ranks differ."
            )
        name = _resolve(key, names)
        pairs[name] = a, b
        alpha = part.get("alpha")
        scales[name] = _scale(name, a.shape[0], None if alpha is None else float(alpha), config)
    return pairs, scales


def _scale(name: str, rank: int, alpha: float | None, config: Mapping[str, Any] | None) -> float:
    """alpha / rank; 1 where a file has no alpha, as in ComfyUI. PEFT's alphas are in its config."""
    if config is None:
        return 1.0 if alpha is None else alpha / rank
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _flat_names(base: LoRALayout | nn.Module | None) -> dict[str, str]:
    if base is None:
        return {}
    if isinstance(base, LoRALayout):
        names = [target.path for target in base.targets()]
    else:
        names = [name for name, _ in base.named_modules()]
    return {name.removeprefix("diffusion_model.").replace(".", "_"): name for name in names}


def _resolve(key: str, names: Mapping[str, str]) -> str:
    if key.startswith(_FLAT):
        name = names.get(key[len(_FLAT) :])
        if name is None:
            raise HYWUError(
                f"{key} does not say where its dots were"
                + (
                    "; it fits no module of the base."
                    if names
                    else "; give the base model or layout."
                )
            )
        return name
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _in_layout(layout, pairs, provenance) -> GeneratedLoRA:
    """Our own files: back into the layout they came from, bit for bit."""

    def one(path: str, side: int) -> Tensor:
        for name in (path, path.removeprefix("diffusion_model.")):
            if name in pairs:
                return pairs[name][side]
        raise HYWUError(f"the LoRA file lacks {path}; save it again.")

    factors = {}
    for s, stack in enumerate(layout.stacks):
        for m, module in enumerate(stack.modules):
            for i, side in enumerate("AB"):
                rows = []
                for n in range(len(stack.layers)):
                    path = stack.target(n, m)
                    if module.num_experts:
                        each = [
                            one(expert_path(path, str(e)), i) for e in range(module.num_experts)
                        ]
                        rows.append(torch.stack(each))
                    else:
                        matrix = one(path, i)
                        rows.append(matrix.flatten(1) if module.conv else matrix)
                factors[s, m, side] = torch.stack(rows)[None]
    return GeneratedLoRA(layout, factors, provenance)


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
