"""A generated LoRA as ComfyUI's own LORA_MODEL: a dict of tensors, views of the LoRA."""

from __future__ import annotations

import torch

from ..hywu_core.errors import HYWUError
from ..hywu_core.lora import GeneratedLoRA


class BatchOfLoRAs(dict):
    """Stands on the stock socket for a batch: whoever reads it is told to select one."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def _refuse(self, *_):
        raise HYWUError(
            f"This is a batch of {self.count} LoRAs, and ComfyUI's own LoRA nodes take one; put HY-WU "
            "Select LoRA in between."
        )

    __contains__ = __getitem__ = __iter__ = keys = items = values = get = copy = _refuse


def stock_lora(lora: GeneratedLoRA) -> dict[str, torch.Tensor]:
    """Keys ``diffusion_model.<module>.lora_up.weight``, ``.lora_down.weight``, ``.alpha``."""
    if lora.batch_size != 1:
        return BatchOfLoRAs(lora.batch_size)
    result = {}
    for path, (a, b) in lora.items():
        if a.ndim != 3:
            raise HYWUError(f"{path}: ComfyUI's LoRA socket can't hold LoRAs on grouped experts.")
        key = f"diffusion_model.{path}"
        result[f"{key}.lora_up.weight"] = b[0].contiguous()
        result[f"{key}.lora_down.weight"] = a[0].contiguous()
        result[f"{key}.alpha"] = torch.tensor(float(lora.layout.alpha))
    return result
