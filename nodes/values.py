"""Nodes that make one LoRA out of others: Select and Blend."""

from __future__ import annotations

from .sockets import CATEGORY, LORA, LORA_TIP, STOCK_LORA
from .stock import stock_lora


class HYWUSelectLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Picks the LoRA of one image out of a batch. ComfyUI's own LoRA socket holds a single LoRA, so a "
        "batch goes through this node before stock LoRA nodes."
    )
    SEARCH_ALIASES = ["hy-wu select", "hywu", "pick lora", "lora from batch"]
    RETURN_TYPES = (LORA, STOCK_LORA)
    RETURN_NAMES = ("lora", "lora_model")
    OUTPUT_TOOLTIPS = (
        "The LoRA of that image.",
        "The same for ComfyUI's own Load LoRA Model and Save LoRA Weights.",
    )
    FUNCTION = "select"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "lora": (LORA, {"tooltip": LORA_TIP}),
                "index": (
                    "INT",
                    {
                        "default": 0,
                        "min": -4096,
                        "max": 4095,
                        "tooltip": "Which image of the batch, counted from 0; -1 is the last.",
                    },
                ),
            }
        }

    def select(self, lora, index):
        one = lora.select(index)
        return (one, stock_lora(one))


class HYWUBlendLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Mixes two LoRAs for the same base model: (1 - weight) of the first and weight of the second, "
        "exactly, in weight space. The ranks add up. Weights below 0 or above 1 extrapolate."
    )
    SEARCH_ALIASES = ["hy-wu blend", "hywu", "merge loras", "mix loras", "interpolate lora"]
    RETURN_TYPES = (LORA,)
    RETURN_NAMES = ("lora",)
    OUTPUT_TOOLTIPS = ("The mixture.",)
    FUNCTION = "blend"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "lora_a": (LORA, {"tooltip": "What weight 0 gives."}),
                "lora_b": (
                    LORA,
                    {"tooltip": "What weight 1 gives; for the same base model and modules."},
                ),
                "weight": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.05,
                        "tooltip": "Share of the second LoRA.",
                    },
                ),
            }
        }

    def blend(self, lora_a, lora_b, weight):
        return (lora_a.blend(lora_b, weight),)
