"""Names that several nodes share: sockets, category, and texts that appear on more than one node."""

from __future__ import annotations

CATEGORY = "HY-WU"

GENERATOR = "HYWU_GENERATOR"
CONDITION = "HYWU_CONDITION"
LORA = "HYWU_LORA"
#: Where and when a LoRA acts.
SCOPE = "HYWU_SCOPE"
#: ComfyUI's own socket for a LoRA in memory: a dict of ``<module>.lora_up.weight`` and so on.
STOCK_LORA = "LORA_MODEL"

LORA_TIP = "A generated LoRA: from HY-WU Generate LoRA, or Load Generated LoRA. One for each image of the batch."


def strength_input(tooltip: str) -> tuple[str, dict[str, object]]:
    """The input that multiplies a LoRA, with the range of ComfyUI's own LoRA loaders."""
    return (
        "FLOAT",
        {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.05, "tooltip": tooltip},
    )
