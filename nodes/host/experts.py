"""Generated LoRAs on the experts of a MODEL, around one call of it.

Where experts are called as `GroupedLinear`, with the batch item of every row, each item and each branch of
guidance gets its own. Other models keep experts as lists or banks whose rows tell nothing of the sort: there
the items and branches run one after another where their LoRAs differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...hywu_core.adapters import attach, expert_hooks
from ...hywu_core.discovery import submodule
from ...hywu_core.errors import HYWUError
from ...hywu_core.grouped import grouped_delta, reads_ends
from ...hywu_core.lora import GeneratedLoRA

#: Position of ``transformer_options`` among the arguments of ``apply_model``.
OPTIONS = 5


def expert_paths(lora: GeneratedLoRA) -> list[str]:
    """The targets that are experts."""
    return [path for path in lora if lora.target(path).module.num_experts]


def grouped(model: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` where it is called as `GroupedLinear`."""
    module = submodule(model, path)
    return module if module is not None and reads_ends(module) else None


class GroupedHook:
    """Adds the branch to rows sorted by expert: item i of a branch gets LoRA i, branches that are off none.

    placed: the LoRA on a tensor's device in its dtype.
    active: whether each branch is on.
    rows: of the model's batch, branch by branch.
    """

    def __init__(
        self,
        placed: Callable[[Tensor], GeneratedLoRA],
        path: str,
        scale: float,
        active: list[bool],
        rows: int,
    ) -> None:
        self.placed, self.path, self.scale = placed, path, scale
        self.active, self.size = active, rows // len(active)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x, ends = args[0], args[1] if len(args) > 1 else kwargs["ends"]
        a, b = self.placed(x)[self.path]
        items = kwargs.get("items")
        if items is None and (a.shape[0] > 1 or not all(self.active)):
            raise HYWUError(
                f"{self.path}: the rows of this model's experts don't tell which image they belong to; use "
                "one LoRA on both branches."
            )
        which = items % self.size if a.shape[0] > 1 else None
        delta = grouped_delta(x, ends, a, b, self.scale, which).to(output.dtype)
        if not all(self.active):
            on = torch.tensor(self.active, device=x.device)[items // self.size]
            delta = delta * on[:, None]
        return output + delta


def attach_experts(
    model: nn.Module, lora: GeneratedLoRA, targets: dict[str, tuple[str, float]]
) -> list[Any]:
    """Handles of hooks for lists and banks: path in the LoRA -> (path in the model, strength).

    lora: a single one, where its tensors are needed (they follow their input's device and dtype).
    """
    handles: list[Any] = []
    for path, (target, strength) in targets.items():
        scale = lora.scale * strength
        for module, hook in expert_hooks(model, target, lora[path], scale):
            handles += attach(module, hook)
    return handles


def row_by_row(
    executor: Callable[..., Tensor], args: tuple, kwargs: dict, count: int,
    branches: list[int], around: Callable[[int, int], Any],
) -> Tensor:  # fmt: skip
    """``apply_model`` for one row of its batch after another.

    count: rows per branch.
    around: (branch's place, item) -> a context manager for that row's call.
    """
    rows, made = args[0].shape[0], []
    for row in range(rows):
        place, item = divmod(row, count)

        def cut(value: Any, row: int = row) -> Any:
            return _row(value, row, rows)

        given = [cut(value) for value in args]
        options = dict(given[OPTIONS] if len(given) > OPTIONS else kwargs["transformer_options"])
        options["cond_or_uncond"] = [branches[place]]
        if "uuids" in options:
            options["uuids"] = options["uuids"][place : place + 1]
        named = {name: cut(value) for name, value in kwargs.items()}
        if len(given) > OPTIONS:
            given[OPTIONS] = options
        else:
            named["transformer_options"] = options
        with around(place, item):
            made.append(executor(*given, **named))
    return torch.cat(made)


def told(args: tuple, kwargs: dict, acting: tuple) -> tuple[tuple, dict]:
    """The arguments of ``apply_model`` with what acts in the options: models that keep something between
    steps read there whether their weights are still the same.
    """
    options = args[OPTIONS] if len(args) > OPTIONS else kwargs.get("transformer_options", {})
    options = {**options, "hywu_loras": (*options.get("hywu_loras", ()), acting)}
    if len(args) > OPTIONS:
        return (*args[:OPTIONS], options, *args[OPTIONS + 1 :]), kwargs
    return args, {**kwargs, "transformer_options": options}


def _row(value: Any, row: int, rows: int) -> Any:
    """One row of whatever has the batch's length, in lists and dicts too."""
    if isinstance(value, Tensor):
        return value[row : row + 1] if value.ndim and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {key: _row(each, row, rows) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_row(each, row, rows) for each in value)
    return value
