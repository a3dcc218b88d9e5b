"""Applying a generated LoRA: to a MODEL, to a part of the sampling, or to one conditioning only."""

from __future__ import annotations

from dataclasses import replace

from . import ui
from .host import application, hooks
from .host.scope import Scope, module_patterns
from .ui import CATEGORY, SCOPE

MODES = ["auto", "merge", "unmerged"]


class HYWUApplyLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Applies a generated LoRA to the model it was made for. 'unmerged' leaves the weights alone: a "
        "new LoRA with every prompt costs nothing to exchange, quantized weights stay exact, and each "
        "image of a batch gets its own LoRA. 'merge' adds it to the weights, as Load LoRA does. Both "
        "give the same image. Several Apply nodes and stock LoRA loaders add up."
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
        required = {
            "model": ui.socket("MODEL", "The base model that the generator was trained for."),
            "lora": ui.lora_socket(),
            "strength": ui.strength(
                "Multiplies the LoRA: 1 as generated, 0 off, negative the opposite direction. "
                "Changing it never generates the LoRA again."
            ),
            "mode": ui.choice(
                MODES,
                "'auto' is unmerged wherever the model allows it, and merge otherwise (for instance inside "
                "compiled models). A batch of LoRAs needs unmerged.",
                "auto",
            ),
        }
        optional = {
            "apply_to_negative": ui.switch(
                True,
                "Off leaves the negative branch of guidance without the LoRA, which makes guidance push "
                "towards the edit. Needs unmerged; no effect at cfg 1.",
                label_on="both",
                label_off="positive",
            ),
            "scope": ui.socket(
                SCOPE,
                "From HY-WU LoRA Scope: only for a part of the sampling, or with strengths of their own "
                "for some modules.",
            ),
            "skip_missing": ui.skip_missing(),
        }
        return {"required": required, "optional": optional}

    def apply(
        self, model, lora, strength, mode, apply_to_negative=True, scope=None, skip_missing=False
    ):
        scope = replace(scope or Scope(), negative=apply_to_negative)
        patched, report, warnings = application.apply(
            model, lora, strength, mode, scope, skip_missing
        )
        return ui.shown(report, (patched, report), warnings)


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
        return {
            "required": {
                "start_percent": ui.number(
                    0.0, 0.0, 1.0, 0.01,
                    "Share of the sampling at which the LoRA begins to act, counted as in ComfyUI's own "
                    "timestep ranges. More than 0 needs unmerged.",
                ),
                "end_percent": ui.number(
                    1.0, 0.0, 1.0, 0.01,
                    "Share of the sampling from which on it no longer acts. Less than 1 needs unmerged.",
                ),
                "module_strengths": ui.text(
                    "",
                    "Strengths for some modules, one 'pattern = number' per line, such as '*attn* = 0.5' or "
                    "'single_blocks.* = 0'; the last match counts. They multiply the strength of Apply. "
                    "The paths are those that HY-WU Inspect LoRA shows.",
                    multiline=True,
                ),
            }
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, module_strengths=None):
        return ui.checked(lambda: module_patterns(module_strengths or ""))

    def make(self, start_percent, end_percent, module_strengths):
        return (Scope(True, start_percent, end_percent, module_strengths),)


class HYWULoRAHook:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "The LoRA as a hook: it acts only on the conditioning that it is set on, by ComfyUI's own nodes "
        "(Cond Set Props, Cond Pair Set Props and their kin). Set Hook Keyframes changes its strength "
        "over the sampling. ComfyUI runs the model once per group of hooks."
    )
    SEARCH_ALIASES = [
        "hy-wu hook", "hywu", "create hook lora", "conditioning lora", "regional lora",
    ]  # fmt: skip
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
        model = ui.socket("MODEL", "The model that will sample: the LoRA is checked against it.")
        strength = ui.strength("Multiplies the LoRA. Keyframes multiply it once more.")
        before = ui.socket("HOOKS", "Hooks that act as well, on the same conditioning.")
        return {
            "required": {"model": model, "lora": ui.lora_socket(), "strength": strength},
            "optional": {"prev_hooks": before, "skip_missing": ui.skip_missing()},
        }

    def hook(self, model, lora, strength, prev_hooks=None, skip_missing=False):
        group, report, warnings = hooks.hook(model, lora, strength, prev_hooks, skip_missing)
        return ui.shown(report, (group, report), warnings)
