"""A generated LoRA around each call of a MODEL: hooks that exist only while the model runs.

A wrapper of ``apply_model`` registers them on the modules of the model that executes and removes them, so no
clone, sibling branch or later prompt ever sees them.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn

from ...hywu_core.adapters import add_conv_, conv_delta, joins, linear_delta
from ...hywu_core.discovery import is_pointwise_conv, submodule
from ...hywu_core.errors import HYWUError
from ...hywu_core.lora import GeneratedLoRA
from .experts import GroupedHook, attach_experts, expert_paths, grouped, row_by_row, told
from .resident import resident
from .scope import Scope


def attach(
    patched: Any, lora: GeneratedLoRA, active: dict[str, tuple[str, float]], scope: Scope
) -> None:
    """Wrap the calls of a MODEL, and let ComfyUI load the LoRA beside it.

    active: path in the LoRA -> (path in the model, strength).
    """
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
        plain = joins(output, x)
        x = x.to(output.dtype) if plain else x
        a, b = self.placed(x)[self.path]
        count = a.shape[0]
        if self.conv or not plain:
            if count > 1:
                a, b = (f.repeat_interleave(x.shape[0] // count, 0) for f in (a, b))
            if self.conv and plain:
                add_conv_(output, x, a, b, self.scale)
            else:
                output += (conv_delta if self.conv else linear_delta)(x, a, b, self.scale)
            return
        # one pass over the output instead of three: these products are bound by memory
        low = torch.bmm(x.reshape(count, -1, x.shape[-1]), a.mT)
        output.view(count, -1, output.shape[-1]).baddbmm_(low, b.mT, alpha=self.scale)
