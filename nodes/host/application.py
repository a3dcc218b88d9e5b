"""Applying a generated LoRA to a MODEL: merged as patches, or unmerged around each model call.

Unmerged, hooks exist only while the model runs: a wrapper of ``apply_model`` registers them on the modules
of the model that executes and removes them, so no clone, sibling branch or later prompt ever sees them.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor, nn

from ...hywu_core.adapters import conv_delta, linear_delta
from ...hywu_core.discovery import is_pointwise_conv, submodule, target_shape
from ...hywu_core.errors import HYWUError, get_logger
from ...hywu_core.injection import target_strengths
from ...hywu_core.lora import GeneratedLoRA
from .experts import GroupedHook, attach_experts, expert_paths, grouped, row_by_row, told
from .resident import resident

log = get_logger(__name__)

ROOT = "diffusion_model."
#: Larger ones overflow in half precision, merged as a bad image without a word.
MAX_STRENGTH = 10_000.0
#: Lines of strengths that are read: each costs a look at every module.
MAX_LINES = 5_000


@dataclass(frozen=True)
class Scope:
    """Where and when a LoRA acts.

    negative: whether on the negative branch of guidance too.
    start, end: share of the sampling from which on and up to which, 0 to 1.
    modules: lines of ``pattern = strength`` over module paths, as shell patterns; the last match counts, and
        what none matches has 1.
    """

    negative: bool = True
    start: float = 0.0
    end: float = 1.0
    modules: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise HYWUError(
                f"The LoRA would act from {self.start} to {self.end} of the sampling; start_percent must "
                "be below end_percent, both between 0 and 1."
            )

    @property
    def always(self) -> bool:
        return self.start == 0 and self.end == 1

    @property
    def needs_unmerged(self) -> str:
        """What merged weights can't do here, or nothing."""
        if not self.negative:
            return "Merged weights serve both branches; use mode 'unmerged' for positive only."
        if not self.always:
            return "Merged weights serve all steps; use mode 'unmerged' for a part of the sampling."
        return ""

    def strengths(self, lora: GeneratedLoRA) -> dict[str, float]:
        """Strength of every target that isn't off. Raises HYWUError on a line that can't be read."""
        patterns = module_patterns(self.modules)
        found = target_strengths(lora, patterns) if patterns else dict.fromkeys(lora, 1.0)
        return {path: value for path, value in found.items() if value}


def module_patterns(text: str) -> dict[str, float]:
    """Lines of ``pattern = strength`` -> pattern -> strength. Raises HYWUError on any other line."""
    patterns = {}
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if len(lines) > MAX_LINES:
        raise HYWUError(
            f"module_strengths: {len(lines):,} lines, at most {MAX_LINES:,} are read; one pattern such as "
            "'*attn*' takes many modules at once."
        )
    for line in lines:
        pattern, equals, number = line.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            equals = ""
        if not equals or not pattern.strip():
            raise HYWUError(
                f"module_strengths: '{line}' is not 'pattern = number'; write for example "
                "'*attn* = 0.5'."
            )
        if not abs(value) <= MAX_STRENGTH:
            raise HYWUError(
                f"module_strengths: '{line}' is no strength; take a number from {-MAX_STRENGTH:g} to "
                f"{MAX_STRENGTH:g}."
            )
        patterns[pattern.strip()] = value
    return patterns


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


def check_strength(strength: float) -> None:
    """HYWUError on a number that no LoRA can be multiplied by."""
    if not abs(strength) <= MAX_STRENGTH:
        raise HYWUError(
            f"The strength is {strength}; it must be a finite number from {-MAX_STRENGTH:g} to "
            f"{MAX_STRENGTH:g}."
        )


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
        _unmerged(patched, lora, active, scope)
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


def _unmerged(
    patched: Any, lora: GeneratedLoRA, active: dict[str, tuple[str, float]], scope: Scope
) -> None:
    unmerged = Unmerged(lora, active, scope)
    key = f"hywu_{uuid.uuid4().hex[:8]}"
    patched.set_additional_models(key, [unmerged.resident])
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, unmerged)
    patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, key, unmerged.release)


class Unmerged:
    """The wrapper of ``apply_model``: hooks for the length of a call, one LoRA per batch item.

    active: path in the LoRA -> (path in the model, strength).
    """

    def __init__(
        self, lora: GeneratedLoRA, active: dict[str, tuple[str, float]], scope: Scope
    ) -> None:
        self.lora, self.scope = lora, scope
        self.active = active
        self.resident = resident(lora)
        self._placed: dict[tuple[torch.device, torch.dtype], GeneratedLoRA] = {}

    def release(self, *_: Any) -> None:
        """After sampling: only ComfyUI's memory manager keeps the LoRA on the device, or not."""
        self._placed.clear()

    def on(self, x: Tensor) -> GeneratedLoRA:
        """The LoRA beside x: as ComfyUI has loaded it, or a copy for the length of the sampling."""
        held = self.resident.model.lora.placed
        if (held.device, held.dtype) == (x.device, x.dtype):
            return held
        key = (x.device, x.dtype)
        if key not in self._placed:
            self._placed[key] = held.to(x.device, x.dtype, non_blocking=True)
        return self._placed[key]

    def _now(self, model: nn.Module, sigma: Tensor) -> bool:
        """Whether this step is one of the scope's; counted as ComfyUI's own timestep ranges are."""
        if self.scope.always:
            return True
        sampling, now = model.model_sampling, float(sigma.max())
        first, last = map(sampling.percent_to_sigma, (self.scope.start, self.scope.end))
        return float(last) <= now <= float(first) and (self.scope.end == 1 or now != float(last))

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._now(executor.class_obj, args[1]):
            return executor(*args, **kwargs)
        options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
        rows = args[0].shape[0]
        branches = options.get("cond_or_uncond") or [0]
        items = rows // len(branches)
        if self.lora.batch_size not in (1, items):
            raise HYWUError(
                f"The batch has {items} images, but there are {self.lora.batch_size} LoRAs; make the "
                "latent batch as long, or pick one with HY-WU Select LoRA."
            )
        branch_on = [self.scope.negative or branch == 0 for branch in branches]
        args, kwargs = told(args, kwargs, (id(self), *branch_on))
        model = executor.class_obj
        whole, rest = self._kinds(model)
        with self._hooks(model, whole, branch_on, rows):
            if not rest:
                return executor(*args, **kwargs)
            if self.lora.batch_size == 1 and all(branch_on):
                with self._other_experts(model, rest, 0):
                    return executor(*args, **kwargs)

        def around(place: int, item: int) -> contextlib.ExitStack:
            stack = contextlib.ExitStack()
            if branch_on[place]:
                chosen = item if self.lora.batch_size > 1 else 0
                stack.enter_context(self._hooks(model, whole, [True], 1, chosen))
                stack.enter_context(self._other_experts(model, rest, chosen))
            return stack

        return row_by_row(executor, args, kwargs, items, branches, around)

    def _kinds(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """Targets that know their batch item, and experts that don't."""
        experts = [path for path in expert_paths(self.lora) if path in self.active]
        rest = [path for path in experts if grouped(model, self.active[path][0]) is None]
        return [path for path in self.active if path not in rest], rest

    @contextlib.contextmanager
    def _hooks(
        self, model: nn.Module, paths: list[str], branch_on: list[bool], rows: int,
        item: int | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """Hooks for the block's length, of the LoRA of `item` alone, or each item's own."""
        handles = []

        def placed(x: Tensor) -> GeneratedLoRA:
            lora = self.on(x)
            return lora if item is None else lora.select(item)

        try:
            for path in paths:
                target, strength = self.active[path]
                module, scale = submodule(model, target), self.lora.scale * strength
                if self.lora.target(path).module.num_experts:
                    hook = GroupedHook(placed, path, scale, branch_on, rows)
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))
                    continue
                hook = _Hook(placed, path, scale, is_pointwise_conv(module), branch_on, rows)
                handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in reversed(handles):
                handle.remove()

    @contextlib.contextmanager
    def _other_experts(self, model: nn.Module, paths: list[str], item: int) -> Iterator[None]:
        handles = []
        try:
            targets = {path: self.active[path] for path in paths}
            handles = attach_experts(model, self.lora.select(item), targets)
            yield
        finally:
            for handle in reversed(handles):
                handle.remove()


class _Hook:
    """Adds one target's branch to the rows of the active guidance branches."""

    def __init__(
        self, placed: Callable[[Tensor], GeneratedLoRA], path: str, scale: float, conv: bool,
        active: list[bool], rows: int,
    ) -> None:  # fmt: skip
        self.placed, self.path, self.scale, self.conv = placed, path, scale, conv
        self.active, self.rows = active, rows

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0]
        shared = self.placed(x).batch_size == 1
        # the output is the module's own, fresh; only autograd may still need it as it was
        output = output.clone() if output.requires_grad else output
        if shared and all(self.active):
            self._add(output, x)
            return output
        if x.shape[0] % self.rows:
            raise HYWUError(
                f"{self.path} sees {x.shape[0]} rows for a batch of {self.rows}, so they can't be told "
                "apart by image; use one LoRA on both branches."
            )
        size = x.shape[0] // len(self.active)
        for i, active in enumerate(self.active):
            if active:
                at = slice(i * size, (i + 1) * size)
                self._add(output[at], x[at])
        return output

    def _add(self, output: Tensor, x: Tensor) -> None:
        """Add the branch in place; rows of one image stand together."""
        a, b = self.placed(x)[self.path]
        count = a.shape[0]
        if self.conv or output.dtype != x.dtype or not output.is_contiguous():
            if count > 1:
                a, b = (f.repeat_interleave(x.shape[0] // count, 0) for f in (a, b))
            output += (conv_delta if self.conv else linear_delta)(x, a, b, self.scale)
            return
        # one pass over the output instead of three: these products are bound by memory
        low = torch.bmm(x.reshape(count, -1, x.shape[-1]), a.mT)
        output.view(count, -1, output.shape[-1]).baddbmm_(low, b.mT, alpha=self.scale)
