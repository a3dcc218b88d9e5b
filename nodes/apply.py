"""Apply Generated LoRA: onto any MODEL whose modules it fits, merged or unmerged."""

from __future__ import annotations

from dataclasses import replace

from .host import application
from .reports import text_output
from .sockets import CATEGORY, LORA, LORA_TIP, SCOPE, strength_input

MODES = ["auto", "merge", "unmerged"]


class HYWUApplyLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Applies a generated LoRA to the model it was made for. 'unmerged' leaves the weights alone: a "
        "new LoRA with every prompt costs nothing to exchange, quantized weights stay exact, and each "
        "image of a batch gets its own LoRA. 'merge' adds it to the weights, as Load LoRA does. Both "
        "give the same picture. Several Apply nodes and stock LoRA loaders add up."
    )
    SEARCH_ALIASES = ["hy-wu apply", "hywu", "lora in memory", "apply lora", "load lora"]
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The model with the LoRA; the model that went in is unchanged.",
        "How many modules matched and how, as JSON.",
    )
    FUNCTION = "apply"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": (
                    "MODEL",
                    {"tooltip": "The base model that the generator was trained for."},
                ),
                "lora": (LORA, {"tooltip": LORA_TIP}),
                "strength": strength_input(
                    "Multiplies the LoRA: 1 as generated, 0 off, negative the opposite direction. "
                    "Changing it never generates the LoRA again."
                ),
                "mode": (
                    MODES,
                    {
                        "default": "auto",
                        "tooltip": "'auto' is unmerged wherever the model allows it, and merge "
                        "otherwise (for instance inside compiled models). A batch of LoRAs needs unmerged.",
                    },
                ),
            },
            "optional": {
                "apply_to_negative": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "label_on": "both branches",
                        "label_off": "positive only",
                        "tooltip": "Off leaves the negative branch of guidance without the LoRA, which "
                        "makes guidance push towards the edit. Needs unmerged; no effect at cfg 1.",
                    },
                ),
                "scope": (
                    SCOPE,
                    {
                        "tooltip": "From HY-WU LoRA Scope: only for a part of the sampling, or with "
                        "strengths of their own for some modules."
                    },
                ),
            },
        }

    def apply(self, model, lora, strength, mode, apply_to_negative=True, scope=None):
        scope = replace(scope or application.Scope(), negative=apply_to_negative)
        patched, report = application.apply(model, lora, strength, mode, scope)
        return text_output(report, (patched, report))


class HYWULoRAScope:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Narrows where and when Apply Generated LoRA acts: a part of the sampling, and strengths for "
        "some of the modules."
    )
    SEARCH_ALIASES = ["hy-wu scope", "hywu", "lora timestep range", "lora block weight"]
    RETURN_TYPES = (SCOPE,)
    RETURN_NAMES = ("scope",)
    OUTPUT_TOOLTIPS = ("For Apply Generated LoRA.",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "start_percent": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        **percent,
                        "tooltip": "Share of the sampling at which the LoRA begins to act, counted as "
                        "in ComfyUI's own timestep ranges. More than 0 needs unmerged.",
                    },
                ),
                "end_percent": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        **percent,
                        "tooltip": "Share of the sampling from which on it no longer acts. Less than 1 "
                        "needs unmerged.",
                    },
                ),
                "module_strengths": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "Strengths for some modules, one 'pattern = number' a line, such as "
                        "'*attn* = 0.5' or 'single_blocks.* = 0'; the last match counts. They multiply "
                        "the strength of Apply. The paths are those that HY-WU Inspect LoRA shows.",
                    },
                ),
            }
        }

    def make(self, start_percent, end_percent, module_strengths):
        return (application.Scope(True, start_percent, end_percent, module_strengths),)
