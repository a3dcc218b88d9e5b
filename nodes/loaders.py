"""Loaders: a generator's checkpoint, and the bundled editor as MODEL, CLIP and VAE."""

from __future__ import annotations

from . import ui
from .host import bundled_editor, generators, paths
from .ui import CATEGORY, GENERATOR

PRECISIONS = ["auto", *generators.DTYPES, generators.FP8_WEIGHTS]


class HYWULoadGenerator:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a HY-WU generator: the hypernetwork that reads an image and an instruction and writes "
        "a LoRA. 'bundled' is the small one that comes with this extension, for its own editor. Others "
        "go into models/hywu: one .safetensors file, or an official folder with its config.json."
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
        checkpoint = ui.choice(
            paths.generator_names(),
            "'bundled', or a checkpoint in models/hywu (and in the folders of extra_model_paths.yaml under "
            "'hywu'). Everything else about it is in the file. 'auto' takes the one that fits the connected "
            "model.",
        )
        precision = ui.choice(
            PRECISIONS,
            "In what the generator computes. 'auto' keeps the checkpoint's precision where the device is "
            "good at it. 'fp8-weights' keeps the weights in 8 bits, half of bfloat16's memory; the LoRA "
            "differs by a few percent. Position tables keep the precision that the checkpoint was trained "
            "with.",
            "auto",
        )
        model = ui.socket(
            "MODEL",
            "The base model. 'auto' takes the generator that fits its layers; another choice is checked "
            "against them before its weights are read.",
        )
        required = {"checkpoint": checkpoint, "precision": ui.advanced(precision)}
        return {"required": required, "optional": {"model": model}}

    @classmethod
    def VALIDATE_INPUTS(cls, checkpoint=None):
        return ui.checked(lambda: paths.check_generator(checkpoint))

    @classmethod
    def IS_CHANGED(cls, checkpoint, **_):
        return paths.generator_stamp(checkpoint)

    def load(self, checkpoint, precision, model=None):
        if checkpoint == paths.FITTING:
            checkpoint = generators.fitting(model)
        elif model is not None:
            generators.check_fit(checkpoint, model)
        return (generators.load(checkpoint, precision),)


class HYWULoadBundledEditor:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads the small image editor that comes with this extension, as an ordinary base model: use it "
        "with CLIPTextEncode, InstructPixToPixConditioning, KSampler and VAEDecode. It works in pixel "
        "space, on any image size, in 4 to 8 steps (euler, simple, cfg 1). It is frozen: what it does "
        "beyond its own edits comes from the LoRA that is applied to it."
    )
    SEARCH_ALIASES = ["hy-wu editor", "hywu", "image edit model", "pixel space", "bundled model"]
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    RETURN_NAMES = ("model", "clip", "vae")
    OUTPUT_TOOLTIPS = (
        "The editor. Put Apply Generated LoRA between it and the sampler.",
        "The editor's text encoder of word pieces, for CLIPTextEncode. Any language's letters work; "
        "with a batch of images, write one line per image or one for all.",
        "The pixel-space VAE: pixels in, pixels out.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls):
        return paths.bundled_stamp("editor")

    def load(self):
        return bundled_editor.load_bundled()
