"""A generated LoRA as ComfyUI's own LORA_MODEL: a dict of tensors, views of the LoRA."""

from __future__ import annotations

import torch

from ...hywu_core.errors import HYWUError
from ...hywu_core.lora import GeneratedLoRA


class Refused(dict):
    """Stands on the stock socket for what it can't hold: whoever reads it is told why.

    `values()` is empty: newer hosts look there for models in every output, outside of any node's run.
    """

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def _refuse(self, *_):
        raise HYWUError(self.reason)

    __contains__ = __getitem__ = __iter__ = keys = items = get = copy = _refuse


def stock_lora(lora: GeneratedLoRA) -> dict[str, torch.Tensor]:
    """Keys ``diffusion_model.<module>.lora_up.weight``, ``.lora_down.weight``, ``.alpha``."""
    if lora.batch_size != 1:
        return Refused(
            f"This is a batch of {lora.batch_size} LoRAs, and ComfyUI's own LoRA nodes take one; put "
            "HY-WU Select LoRA in between."
        )
    result = {}
    for path, (a, b) in lora.items():
        if a.ndim != 3:
            return Refused(
                f"{path} is a LoRA on grouped experts, which ComfyUI's own LoRA nodes can't hold; save "
                "it with Save Generated LoRA instead."
            )
        key = f"diffusion_model.{path}"
        result[f"{key}.lora_up.weight"] = b[0].contiguous()
        result[f"{key}.lora_down.weight"] = a[0].contiguous()
        result[f"{key}.alpha"] = torch.tensor(float(lora.layout.alpha))
    return result
