"""HunyuanImage-3: the base model of the published HY-WU, its prompts and its thoughts."""

from __future__ import annotations

from . import ui
from .host import paths
from .host.hunyuan_image3 import load, prompt
from .host.page import Page
from .ui import CATEGORY

HUNYUAN = "HYWU_HUNYUAN"
PRECISIONS = ["auto", "stored", "float32", "bfloat16"]
ROUTERS = ["float32", "bfloat16"]
TASKS = ["think_recaption", "recaption", "think"]


class HYWULoadHunyuanImage3:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads HunyuanImage-3.0-Instruct, the base model of the published HY-WU, from its official folder "
        "in models/hunyuan_image_3. No code of the folder runs. The weights are not part of this "
        "extension; their licence excludes the EU, the UK and South Korea. `hywu hunyuan tiny` writes a "
        "tiny folder with random weights to try the whole path."
    )
    SEARCH_ALIASES = ["hunyuan", "hunyuanimage", "hy-wu base", "hywu", "image edit model"]
    RETURN_TYPES = ("MODEL", "VAE", HUNYUAN)
    RETURN_NAMES = ("model", "vae", "hunyuan")
    OUTPUT_TOOLTIPS = (
        "The model, for Condition Encode, Apply Generated LoRA and KSampler (euler, simple, cfg 2.5; the "
        "distilled one cfg 1). Its flow shift is the checkpoint's, 3.",
        "Its VAE, for VAE Decode.",
        "Tokenizer, system prompt and vision tower, for HunyuanImage-3 Edit Prompt and Think.",
    )
    FUNCTION = "load"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        folder = ui.choice(
            paths.hunyuan_names(),
            "A folder with the official config.json and shards, in models/hunyuan_image_3 or in a folder of "
            "extra_model_paths.yaml under 'hunyuan_image_3'.",
        )
        precision = ui.choice(
            PRECISIONS,
            "In what the model is kept and computes. 'auto' is bfloat16 where the device is good at it, else "
            "float32; 'stored' what the files hold.",
            "auto",
        )
        router = ui.choice(
            ROUTERS,
            "How the routers multiply: float32 as their weights are stored, or bfloat16 as official runs on "
            "a GPU do, where a few tokens get other experts.",
            "float32",
        )
        system = ui.text(
            "",
            "The system prompt. Empty reads it from system_prompt.py in the folder, as text: the file is "
            "never run. 'system_prompt.py:NAME' takes one of its constants by name.",
            multiline=True,
        )
        return {
            "required": {"folder": folder, "precision": precision},
            "optional": {
                "router": ui.advanced(router),
                "system_prompt": ui.advanced(system),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, folder=None):
        return ui.checked(lambda: paths.check_hunyuan(folder))

    @classmethod
    def IS_CHANGED(cls, folder, **_):
        return paths.hunyuan_stamp(folder)

    def load(self, folder, precision, router="float32", system_prompt=""):
        *made, said = load.load(
            paths.hunyuan_path(folder), precision, router, system_prompt or None
        )
        return ui.shown(said, tuple(made), [])


def _asked() -> dict:
    return {
        "instruction": ui.text(
            "",
            "What to change in the images, or, without images, what to show. With a batch, one line per "
            "image or one for all.",
            multiline=True,
        ),
    }


def _images() -> dict:
    return {
        "image": ui.socket(
            "IMAGE", "The image to edit, or a batch. Without one an image is made from text."
        ),
        "image2": ui.socket(
            "IMAGE", "A second image, such as a reference: one for all, or one per image."
        ),
        "image3": ui.socket("IMAGE", "A third image, like image2."),
    }


def _seed() -> tuple:
    return ui.whole(
        0, 0, 0xFFFFFFFF,
        "Of the noise that the VAE adds to source images, and of the text. Give Think and Edit Prompt the "
        "same.",
        control_after_generate=False,
    )  # fmt: skip


class HYWUHunyuanEditPrompt:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Instruction, one to three images and a chain of thought as HunyuanImage-3 reads them: positive, "
        "negative and an empty latent of the right size for a stock KSampler. The negative is made here; "
        "write none. Connect positive to Condition Encode too, so that the generator reads the same."
    )
    SEARCH_ALIASES = ["hunyuan prompt", "hy-wu", "hywu", "edit instruction", "text encode"]
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT", "STRING")
    RETURN_NAMES = ("positive", "negative", "latent", "report")
    OUTPUT_TOOLTIPS = (
        "For KSampler, and for conditioning of HY-WU Condition Encode.",
        "The same with instruction and thought blanked out: for guidance.",
        "An empty latent of the image's size.",
        "The size and the number of tokens.",
    )
    FUNCTION = "make"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        size = ui.text(
            "auto",
            "auto, height x width in pixels such as 1024x768 (multiples of 16), or a ratio of width to height "
            "such as 3:2. auto is what the chain of thought says, else what a connected model chooses, else "
            "the size nearest to the image's ratio.",
        )
        required = {
            "hunyuan": ui.socket(HUNYUAN, "From Load HunyuanImage-3."),
            **_asked(),
            "size": size,
            "seed": _seed(),
        }
        cot = ui.text(
            "",
            "A chain of thought, from HunyuanImage-3 Think or by hand: <think>…</think>"
            "<recaption>…</recaption>. Of a batch, divided by lines of dashes. May be empty.",
            multiline=True,
            forceInput=True,
        )
        optional = {
            **_images(),
            "cot": cot,
            "model": ui.socket(
                "MODEL", "Chooses the size where it is auto and no thought says it."
            ),
        }
        return {"required": required, "optional": optional}

    def make(
        self, hunyuan, instruction, size, seed, image=None, image2=None, image3=None, cot="", model=None
    ):  # fmt: skip
        images = (image, image2, image3)
        requests = prompt.requests_of(hunyuan, instruction, images, cot or "", size, seed)
        *made, report = prompt.prompt(hunyuan, requests, model)
        return ui.shown(report, (*made, report), [])


class HYWUHunyuanThink:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "HunyuanImage-3 writes a chain of thought and a new caption for an edit, word by word; with an "
        "automatic size it ends in the ratio that it chose. Optional, and slow for the real model. The text "
        "can be edited before it goes into Edit Prompt."
    )
    SEARCH_ALIASES = [
        "hunyuan think",
        "chain of thought",
        "recaption",
        "hy-wu",
        "hywu",
        "prompt rewrite",
    ]
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("cot",)
    OUTPUT_TOOLTIPS = ("The chain of thought, for cot of HunyuanImage-3 Edit Prompt.",)
    FUNCTION = "think"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        required = {
            "model": ui.socket("MODEL", "From Load HunyuanImage-3; a LoRA on it would act on the text."),
            **_asked(),
            "size": ui.text("auto", "As in Edit Prompt: with auto the model chooses the ratio."),
            "seed": _seed(),
            "task": ui.choice(TASKS, "Think and write a new caption, or one of the two.", TASKS[0]),
            "max_tokens": ui.whole(2000, 1, 20_000, "Tokens after which the text is cut off."),
            "temperature": ui.number(
                -1.0, -1.0, 2.0, 0.05,
                "0 always takes the likeliest word; -1 is the checkpoint's own, with its top-k and top-p.",
            ),
        }  # fmt: skip
        return {"required": required, "optional": _images(), "hidden": {"node": "UNIQUE_ID"}}

    def think(
        self, model, instruction, size, seed, task, max_tokens, temperature,
        image=None, image2=None, image3=None, node=None,
    ):  # fmt: skip
        reader = load.model_of(model).reader
        requests = prompt.requests_of(reader, instruction, (image, image2, image3), "", size, seed)
        sampler = None if temperature < 0 else prompt.Sampler(temperature, 1024, 0.95)
        text = prompt.thoughts(model, requests, task, max_tokens, sampler, Page(node))
        return ui.shown(text, (text,), [])
