"""Model Layout: what a generator for this MODEL would have to write, before anyone trains one."""

from __future__ import annotations

from .host import layouts
from .reports import text_output
from .sockets import CATEGORY


class HYWUModelLayout:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows which modules of any model a generated LoRA would reach: the stacks of layers found, the "
        "tokens that a generator writes, the size of the LoRA, and an estimate of the generation's time "
        "and memory on this machine for a generator of the size chosen. Nothing is trained or loaded."
    )
    SEARCH_ALIASES = ["hy-wu layout", "hywu", "lora targets", "model blocks", "estimate memory"]
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("table", "report")
    OUTPUT_TOOLTIPS = (
        "Stacks, modules and shapes, and the estimates, to read.",
        "The same as JSON.",
    )
    FUNCTION = "show"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Any diffusion model."}),
                "rank": (
                    "INT",
                    {
                        "default": 16,
                        "min": 1,
                        "max": 512,
                        "tooltip": "Rank of the LoRA. Its size and the generator's tokens follow from it.",
                    },
                ),
                "generator_size": (
                    list(layouts.SIZES),
                    {
                        "default": "S",
                        "tooltip": "Weights of the generator, about: XS 3 million, S 20 million, M 100 "
                        "million, L 400 million.",
                    },
                ),
                "condition_tokens": (
                    "INT",
                    {
                        "default": 1024,
                        "min": 1,
                        "max": 1048576,
                        "tooltip": "Tokens of image and instruction together that the generator reads.",
                    },
                ),
                "batch_size": (
                    "INT",
                    {"default": 1, "min": 1, "max": 4096, "tooltip": "LoRAs generated at once."},
                ),
            },
            "optional": {
                "include": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Only modules whose path matches one of these patterns, divided by "
                        "commas, such as '*attn*'. They may lie outside the repeated blocks.",
                    },
                ),
                "exclude": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "No modules whose path matches one of these patterns.",
                    },
                ),
            },
        }

    def show(
        self, model, rank, generator_size, condition_tokens, batch_size, include="", exclude=""
    ):
        table, report = layouts.describe(
            model, rank, generator_size, condition_tokens, batch_size, include, exclude
        )
        return text_output(table, (table, report))
