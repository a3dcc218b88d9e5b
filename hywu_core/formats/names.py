"""Names of modules in LoRA files of other programs -> names of the base model.

Without a base only what is certain is taken off (``base_model.model.``, ``diffusion_model.``). With one, each
name is tried with and without the starts that programs put before it, with its dots where it has lost
them (``lora_unet_…``), and as diffusers' attention processors have it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..discovery import linear_shape
from ..errors import HYWUError
from ..layout import LoRALayout
from .matrices import expert_path

#: Starts of names that are no part of the model's own.
CERTAIN = ("base_model.model.", "diffusion_model.")
STARTS = (*CERTAIN, "model.diffusion_model.", "transformer.", "unet.", "model.")
#: Starts of names whose dots became underscores.
FLAT = ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")


class Names:
    """base: the base model or its layout, or None. `of` gives the base's name, or None."""

    def __init__(self, base: LoRALayout | nn.Module | None) -> None:
        self.known = None if base is None else set(_names(base))
        self.base = "" if base is None else type(base).__name__
        flat = (name.removeprefix("diffusion_model.") for name in self.known or ())
        self._flat = {name.replace(".", "_"): name for name in flat}

    def of(self, name: str) -> str | None:
        """The base's name of a file's name; None where the base has none, or it can't be known."""
        if self.known is None:
            if name.startswith(FLAT):
                return None
            for start in CERTAIN:
                name = name.removeprefix(start)
            return name
        for start in FLAT:
            if name.startswith(start):
                return self._whole(self._flat.get(name.removeprefix(start)))
        return next((n for n in map(self._whole, _forms(name)) if n is not None), None)

    def _whole(self, name: str | None) -> str | None:
        if name is None or name in self.known:
            return name
        whole = f"diffusion_model.{name}"
        return whole if whole in self.known else None


def _forms(name: str) -> Iterator[str]:
    """The name, and what is left of it without each start of `STARTS`, one after another."""
    yield from _spelled(name)
    for start in STARTS:
        if name.startswith(start):
            yield from _forms(name.removeprefix(start))


def _spelled(name: str) -> Iterator[str]:
    yield name
    # diffusers: attn1.processor.to_q_lora -> attn1.to_q, and attn1.to_out is the first of a list
    plain = name.replace(".processor.", ".").removesuffix("_lora")
    yield plain
    yield f"{plain}.0"


def _names(base: LoRALayout | nn.Module) -> Iterator[str]:
    if isinstance(base, LoRALayout):
        found = ((target.path, target.module.num_experts) for target in base.targets())
    else:
        shapes = ((path, linear_shape(module)) for path, module in base.named_modules())
        found = ((path, shape[0]) for path, shape in shapes if shape is not None)
    for path, experts in found:
        yield path
        with contextlib.suppress(HYWUError):  # no list of experts shows in its name
            yield from (expert_path(path, str(e)) for e in range(experts))
