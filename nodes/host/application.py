"""Applying a generated LoRA to a MODEL: merged as patches, or unmerged around each model call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from comfy.weight_adapter import LoRAAdapter
from torch import nn

from ...hywu_core.discovery import target_shape
from ...hywu_core.errors import HYWUError, get_logger
from ...hywu_core.lora import GeneratedLoRA
from . import unmerged
from .experts import expert_paths
from .scope import Scope, check_strength

log = get_logger(__name__)

ROOT = "diffusion_model."


@dataclass(frozen=True)
class Match:
    """Targets of the LoRA that the model has (path in the LoRA -> path in the model), and others."""

    found: dict[str, str]
    skipped: tuple[str, ...]

    @property
    def warnings(self) -> list[str]:
        """A sentence where something was left out."""
        if not self.skipped:
            return []
        return [
            f"{len(self.skipped)} of the LoRA's {len(self.skipped) + len(self.found)} modules aren't in the "
            f"model and were left out, such as {self.skipped[0]}."
        ]

    def report(self, **more: Any) -> str:
        """JSON with the numbers of modules and, of the first 20 left out, the names."""
        for warning in self.warnings:
            log.warning("HY-WU: %s", warning)
        counted = {"matched": len(self.found), **more, "skipped": len(self.skipped)}
        return json.dumps({**counted, "skipped_modules": list(self.skipped[:20])})


def match(model: nn.Module, lora: GeneratedLoRA, skip_missing: bool = False) -> Match:
    """Find every target and check its shape; one HYWUError for all that disagree.

    skip_missing: targets that the model lacks are left out, as long as it has others.
    """
    found, skipped, wrong = {}, [], []
    for path in lora:
        module = lora.target(path).module
        shape = target_shape(model, ROOT + path, module.num_experts)
        wanted = (module.num_experts, module.out_features, module.in_features)
        if shape is None:
            skipped.append(path)
        elif shape != wanted:
            wrong.append(
                f"{path} is {shape[1]} x {shape[2]}, the LoRA says {wanted[1]} x {wanted[2]}"
            )
        else:
            found[path] = ROOT + path
    name = type(getattr(model, "diffusion_model", model)).__name__
    base = lora.provenance.get("base") or "another base model"
    if wrong or not found:
        what = (
            "; ".join(wrong[:3]) or f"none of its {len(lora)} modules, such as {skipped[0]}, exist"
        )
        raise HYWUError(
            f"This LoRA was made for {base} and does not fit {name}: {what}. Connect the base model "
            "that the generator was trained for."
        )
    if skipped and not skip_missing:
        raise HYWUError(
            f"{len(skipped)} of the LoRA's {len(lora)} modules aren't in {name}, such as {skipped[0]}; "
            f"connect the model it was made for ({base}), connect MODEL to Load Generated LoRA where the "
            "file has other names for its modules, or turn skip_missing on to apply the others."
        )
    return Match(found, tuple(skipped))


def apply(
    model: Any,
    lora: GeneratedLoRA,
    strength: float,
    mode: str,
    scope: Scope,
    skip_missing: bool = False,
) -> tuple[Any, str, list[str]]:
    """(patched clone, report as JSON, warnings). Nothing is touched before everything is checked."""
    check_strength(strength)
    matched = match(model.model, lora, skip_missing)
    strengths = scope.strengths(lora)
    for value in strengths.values():
        check_strength(value * strength)
    if mode == "auto":
        single = lora.batch_size == 1 and not scope.needs_unmerged
        experts = bool(expert_paths(lora))
        mode = "merge" if _compiled(model) and single and not experts else "unmerged"
    if mode == "merge" and lora.batch_size != 1:
        raise HYWUError(
            f"{lora.batch_size} LoRAs can't be merged into one model; use mode 'unmerged', which gives "
            "each image its own, or pick one with HY-WU Select LoRA."
        )
    if mode == "merge" and (experts := expert_paths(lora)):
        raise HYWUError(
            f"{experts[0]}: LoRAs on experts aren't merged into a MODEL: every expert's weights would be "
            "read and written again with every prompt, and small changes be lost in their rounding; use "
            "mode 'unmerged', which gives the same image."
        )
    if mode == "merge" and scope.needs_unmerged:
        raise HYWUError(scope.needs_unmerged)
    patched = model.clone()
    active = {
        path: (matched.found[path], value * strength)
        for path, value in strengths.items()
        if path in matched.found and value * strength
    }
    if mode == "merge":
        _merge(patched, lora, active)
    elif active:
        unmerged.attach(patched, lora, active, scope)
    report = matched.report(mode=mode, strength=strength, loras=lora.batch_size, active=len(active))
    return patched, report, matched.warnings


def _compiled(model: Any) -> bool:
    wrappers = model.model_options["transformer_options"].get("wrappers", {})
    everything = [wrappers, model.wrappers]
    return any("torch.compile" in by_key for w in everything for by_key in w.values())


def _merge(patched: Any, lora: GeneratedLoRA, active: dict[str, tuple[str, float]]) -> None:
    groups: dict[float, dict[str, LoRAAdapter]] = {}
    for path, (target, strength) in active.items():
        a, b = (factor[0] for factor in lora[path])
        weights = (b, a, lora.layout.alpha, None, None, None)
        groups.setdefault(strength, {})[f"{target}.weight"] = LoRAAdapter(set(), weights)
    for strength, patches in groups.items():
        missed = set(patches) - set(patched.add_patches(patches, strength))
        if missed:
            raise HYWUError(f"ComfyUI can't patch {sorted(missed)[0]}; use mode 'unmerged'.")
