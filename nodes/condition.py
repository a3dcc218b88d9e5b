"""Conditions: encoded from images and instructions, saved, loaded."""

from __future__ import annotations

from ..hywu_core.condition import Condition
from . import ui
from .host import encode, instructions, paths
from .ui import CATEGORY, CONDITION, GENERATOR

#: Stands for an input without a link, where a linked one arrives as None.
UNCONNECTED = object()


class HYWUConditionEncode:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Encodes the image and the instruction for the generator, with the encoder that the "
        "checkpoint names. A batch of images gives a batch of conditions. Write one instruction for "
        "all images, or one line per image. An image may have up to two further ones beside it."
    )
    SEARCH_ALIASES = [
        "hy-wu condition", "hywu", "instruction encode", "edit instruction", "condition",
    ]  # fmt: skip
    RETURN_TYPES = (CONDITION,)
    RETURN_NAMES = ("condition",)
    OUTPUT_TOOLTIPS = ("What the generator reads: tokens of the images and instructions.",)
    FUNCTION = "encode"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        required = {
            "generator": ui.socket(
                GENERATOR,
                "The generator that the condition is for: its checkpoint names the encoder.",
            ),
            "image": ui.socket(
                "IMAGE",
                "The image to edit, or a batch of them. Any size; transparency is ignored.",
            ),
            "instruction": ui.text(
                "",
                "What to do with the image. With a batch of images, one line per image, or a single line for "
                "all of them.",
                multiline=True,
            ),
        }
        return {"required": required, "optional": _ENCODERS}

    @classmethod
    def VALIDATE_INPUTS(cls, instruction=None, conditioning=UNCONNECTED):
        if instruction is None or conditioning is not UNCONNECTED:
            return True
        return ui.checked(lambda: instructions.nonempty(instruction))

    def encode(self, generator, image, instruction, image2=None, image3=None, **sockets):
        images = {"image": image, "image2": image2, "image3": image3}
        condition, report, warnings = encode.encode(generator, images, instruction, **sockets)
        return ui.shown(report, (condition,), warnings)


_ENCODERS = {
    "model": ui.socket(
        "MODEL",
        "The base model, for checkpoints that read its own hidden states; it runs twice per image, with "
        "whatever LoRAs lie on it. For the bundled generator only a check: its encoder brings its own copy "
        "of the editor.",
    ),
    "clip": ui.socket(
        "CLIP",
        "A text encoder, for checkpoints that read the part 'text' from one of ComfyUI's CLIPs, or hidden "
        "states of a model. Not needed for the bundled generator, nor with a conditioning.",
    ),
    "clip_vision": ui.socket(
        "CLIP_VISION",
        "An image encoder, for checkpoints that read the part 'vision' from one of ComfyUI's CLIP vision "
        "models. Not needed for the bundled generator.",
    ),
    "vae": ui.socket(
        "VAE",
        "The base model's VAE, for checkpoints that read hidden states of a model. Not needed for the "
        "bundled generator.",
    ),
    "image2": ui.socket(
        "IMAGE",
        "A second image, such as a reference, for checkpoints that were trained with several: one for all "
        "images, or one per image. Any size.",
    ),
    "image3": ui.socket("IMAGE", "A third image, like image2."),
    "conditioning": ui.socket(
        "CONDITIONING",
        "The text from any text encoder's node, in place of clip and the instruction: its first entry, one "
        "for all images or one per image. The instruction may then be empty; it only names the LoRA.",
    ),
}


class HYWUSaveCondition:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Saves a condition as one .safetensors file, so that another machine can generate from it "
        "without the encoder."
    )
    SEARCH_ALIASES = ["hy-wu condition", "hywu", "export condition"]
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    OUTPUT_TOOLTIPS = ("The name of the saved file below the output folder.",)
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        prefix = ui.text(
            "conditions/hywu",
            "Folder and start of the name, below ComfyUI's output folder. What lies under 'conditions/' "
            "there appears in Load Condition.",
        )
        condition = ui.socket(CONDITION, "From HY-WU Condition Encode.")
        return {"required": {"condition": condition, "filename_prefix": prefix}}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix=None):
        return ui.checked(lambda: paths.check_prefix(filename_prefix))

    def save(self, condition, filename_prefix):
        name = paths.save_new(filename_prefix, ".safetensors", condition.save)
        return ui.shown(name, (name,))


class HYWULoadCondition:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a condition that was made elsewhere, for instance by an 80B base model on a server: a file "
        "of Save Condition, or any .safetensors file with one [batch, length, width] tensor."
    )
    SEARCH_ALIASES = ["hy-wu condition", "hywu", "hidden states", "import condition"]
    RETURN_TYPES = (CONDITION,)
    RETURN_NAMES = ("condition",)
    OUTPUT_TOOLTIPS = ("The condition, for HY-WU Generate LoRA.",)
    FUNCTION = "load"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        condition = ui.choice(
            paths.condition_names(),
            "A .safetensors file in models/hywu_conditions, output/conditions, or the input folder.",
        )
        return {"required": {"condition": condition}}

    @classmethod
    def VALIDATE_INPUTS(cls, condition=None):
        return ui.checked(lambda: paths.check_condition(condition))

    @classmethod
    def IS_CHANGED(cls, condition):
        return paths.condition_stamp(condition)

    def load(self, condition):
        loaded = Condition.load(paths.condition_path(condition))
        parts = ", ".join(f"{n} {list(t.shape)}" for n, t in loaded.parts.items())
        return ui.shown(parts, (loaded,))
