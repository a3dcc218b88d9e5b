"""Inspect LoRA: where a generated LoRA changes the base, as a picture and a table."""

from __future__ import annotations

from .host.previews import preview
from .pictures import norm_map
from .reports import norm_entries, norm_table, text_output
from .sockets import CATEGORY, LORA, LORA_TIP


class HYWUInspectLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows where a LoRA changes the base model: the norm of every layer and module as a heat map, and "
        "the numbers as a table. A batch gives one picture an image."
    )
    SEARCH_ALIASES = ["hy-wu inspect", "hywu", "lora norms", "lora heat map", "lora analysis"]
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "table")
    OUTPUT_TOOLTIPS = (
        "Heat maps of the norms |scale * B * A|: layers from left to right, modules from top to bottom.",
        "The same numbers as text, one line a layer and module.",
    )
    FUNCTION = "inspect"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"lora": (LORA, {"tooltip": LORA_TIP})}}

    def inspect(self, lora):
        norms = lora.norms()
        table = norm_table(norms)
        image = norm_map(lora, norms)
        shown = norm_entries(lora, norms)
        return text_output(table, (image, table), images=preview(image), hywu_norms=shown)
