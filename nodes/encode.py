"""Condition Encode: images and instructions become the condition that a generator reads."""

from __future__ import annotations

from .host import encoders
from .reports import text_output
from .sockets import CATEGORY, CONDITION, GENERATOR


class HYWUConditionEncode:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Encodes the image and the instruction for the generator, with the encoder that the "
        "checkpoint names. A batch of images gives a batch of conditions. Write one instruction for "
        "all images, or one line for each. An image may have up to two further pictures."
    )
    SEARCH_ALIASES = [
        "hy-wu condition",
        "hywu",
        "instruction encode",
        "edit instruction",
        "condition",
    ]
    RETURN_TYPES = (CONDITION,)
    RETURN_NAMES = ("condition",)
    OUTPUT_TOOLTIPS = ("What the generator reads: tokens of the images and instructions.",)
    FUNCTION = "encode"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "generator": (
                    GENERATOR,
                    {
                        "tooltip": "The generator that the condition is for: its checkpoint names the encoder."
                    },
                ),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "The image to edit, or a batch of them. Any size; transparency is ignored."
                    },
                ),
                "instruction": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "",
                        "tooltip": "What to do with the image. With a batch of images, one line for "
                        "each, or a single line for all of them.",
                    },
                ),
            },
            "optional": {
                "model": (
                    "MODEL",
                    {
                        "tooltip": "The base model, for checkpoints that read its own hidden states; it "
                        "runs twice for each image, with whatever LoRAs lie on it. For the bundled "
                        "generator only a check: its encoder brings its own copy of the editor."
                    },
                ),
                "clip": (
                    "CLIP",
                    {
                        "tooltip": "A text encoder, for checkpoints that read the part 'text' from one of "
                        "ComfyUI's CLIPs, or hidden states of a model. Not needed for the bundled "
                        "generator, nor with a conditioning."
                    },
                ),
                "clip_vision": (
                    "CLIP_VISION",
                    {
                        "tooltip": "An image encoder, for checkpoints that read the part 'vision' from one "
                        "of ComfyUI's CLIP vision models. Not needed for the bundled generator."
                    },
                ),
                "vae": (
                    "VAE",
                    {
                        "tooltip": "The base model's VAE, for checkpoints that read hidden states of a "
                        "model. Not needed for the bundled generator."
                    },
                ),
                "image2": (
                    "IMAGE",
                    {
                        "tooltip": "A second picture, such as a reference, for checkpoints that were trained "
                        "with several: one for all images, or one for each. Any size."
                    },
                ),
                "image3": ("IMAGE", {"tooltip": "A third picture, like image2."}),
                "conditioning": (
                    "CONDITIONING",
                    {
                        "tooltip": "The text from any text encoder's node, in place of clip and the "
                        "instruction: its first entry, one for all images or one for each. The instruction "
                        "may then be empty; it only names the LoRA."
                    },
                ),
            },
        }

    def encode(self, generator, image, instruction, image2=None, image3=None, **sockets):
        images = {"image": image, "image2": image2, "image3": image3}
        condition, report = encoders.encode(generator, images, instruction, **sockets)
        return text_output(report, (condition,))
