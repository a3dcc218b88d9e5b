"""LoRA Hook: a generated LoRA on one conditioning only, through ComfyUI's own hooks."""

from __future__ import annotations

from .host import hooks
from .reports import text_output
from .sockets import CATEGORY, LORA, LORA_TIP, strength_input


class HYWULoRAHook:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "The LoRA as a hook: it acts only on the conditioning that it is set on, by ComfyUI's own nodes "
        "(Cond Set Props, Cond Pair Set Props and their kin). Set Hook Keyframes changes its strength "
        "over the sampling. ComfyUI runs the model once for each group of hooks."
    )
    SEARCH_ALIASES = [
        "hy-wu hook",
        "hywu",
        "create hook lora",
        "conditioning lora",
        "regional lora",
    ]
    RETURN_TYPES = ("HOOKS", "STRING")
    RETURN_NAMES = ("hooks", "report")
    OUTPUT_TOOLTIPS = (
        "For Cond Set Props, Set Hook Keyframes and ComfyUI's other hook nodes.",
        "How many modules matched, as JSON.",
    )
    FUNCTION = "hook"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": (
                    "MODEL",
                    {"tooltip": "The model that will sample: the LoRA is checked against it."},
                ),
                "lora": (LORA, {"tooltip": LORA_TIP}),
                "strength": strength_input("Multiplies the LoRA. Keyframes multiply it once more."),
            },
            "optional": {
                "prev_hooks": (
                    "HOOKS",
                    {"tooltip": "Hooks that act as well, on the same conditioning."},
                ),
            },
        }

    def hook(self, model, lora, strength, prev_hooks=None):
        group, report = hooks.hook(model, lora, strength, prev_hooks)
        return text_output(report, (group, report))
