"""Loader of generator checkpoints."""

from __future__ import annotations

from .host import generators, paths
from .sockets import CATEGORY, GENERATOR

PRECISIONS = ["auto", "float32", "bfloat16", "float16"]


class HYWULoadGenerator:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a HY-WU generator: the hypernetwork that reads an image and an instruction and writes "
        "a LoRA. Checkpoints go "
        "into models/hywu: one .safetensors file, or an official folder with its config.json."
    )
    SEARCH_ALIASES = ["hypernetwork", "parameter generator", "hy-wu", "hywu", "lora generator"]
    RETURN_TYPES = (GENERATOR,)
    RETURN_NAMES = ("generator",)
    OUTPUT_TOOLTIPS = (
        "The generator, managed by ComfyUI like any model: loaded when used, offloaded when memory is short.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "checkpoint": (
                    paths.generator_names(),
                    {
                        "tooltip": "A checkpoint in models/hywu (and in the folders of "
                        "extra_model_paths.yaml under 'hywu'). Everything else about it is in the file."
                    },
                ),
                "precision": (
                    PRECISIONS,
                    {
                        "default": "auto",
                        "tooltip": "In what the generator computes. 'auto' keeps the checkpoint's "
                        "precision where the device is good at it. Position tables keep the "
                        "precision that the checkpoint was trained with.",
                    },
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, checkpoint, precision):
        return paths.stamp("hywu", checkpoint)

    def load(self, checkpoint, precision):
        return (generators.load(checkpoint, precision),)
