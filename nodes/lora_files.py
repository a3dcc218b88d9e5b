"""Save and load generated LoRAs, in ComfyUI's folders."""

from __future__ import annotations

from .host import paths, storage
from .reports import lora_summary, norm_entries, text_output
from .sockets import CATEGORY, LORA, LORA_TIP, STOCK_LORA
from .stock import stock_lora


class HYWUSaveLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Saves a generated LoRA below ComfyUI's output folder. 'ComfyUI' is one file that every stock LoRA "
        "loader takes, 'PEFT' a folder for diffusers and transformers, 'native' keeps everything: the "
        "whole batch, its layout and where it came from. Nothing is overwritten."
    )
    SEARCH_ALIASES = ["hy-wu save", "hywu", "export lora", "save lora", "peft"]
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("paths",)
    OUTPUT_TOOLTIPS = ("The names of the saved files below the output folder, one a line.",)
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "lora": (LORA, {"tooltip": LORA_TIP}),
                "filename_prefix": (
                    "STRING",
                    {
                        "default": "loras/hywu",
                        "tooltip": "Folder and start of the name, below ComfyUI's output folder. What lies "
                        "under 'loras/' there appears in the lists of the LoRA loaders.",
                    },
                ),
                "format": (
                    list(storage.FORMATS),
                    {
                        "default": "ComfyUI",
                        "tooltip": "ComfyUI: one file an image, for the stock loaders. PEFT: one folder an "
                        "image. native: one file for the whole batch.",
                    },
                ),
            }
        }

    def save(self, lora, filename_prefix, format):
        names = storage.save_lora(lora, filename_prefix, format)
        return text_output("\n".join(names), ("\n".join(names),))


class HYWULoadLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a LoRA that was saved by Save Generated LoRA (in any of its formats), another LoRA file in "
        "models/loras, or one of the bundled ones: the Single LoRAs (each trained for one edit) and the "
        "Shared LoRA (trained for all of them) of the bundled editor."
    )
    SEARCH_ALIASES = ["hy-wu load", "hywu", "load lora", "shared lora", "single lora", "peft"]
    RETURN_TYPES = (LORA, STOCK_LORA, "STRING")
    RETURN_NAMES = ("lora", "lora_model", "summary")
    OUTPUT_TOOLTIPS = (
        "The LoRA, for Apply, Inspect, Blend and Select.",
        "The same for ComfyUI's own Load LoRA Model node; a batch must go through HY-WU Select LoRA.",
        "What is in it and where it came from, as JSON.",
    )
    FUNCTION = "load"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "lora": (
                    paths.lora_names(),
                    {
                        "tooltip": "A bundled LoRA, a file in models/loras or output/loras, or a PEFT "
                        "folder there."
                    },
                ),
            },
            "optional": {
                "model": (
                    "MODEL",
                    {
                        "tooltip": "The model the LoRA is for. Needed for files whose names begin with "
                        "lora_unet_, which only the model can tell apart."
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, lora, model=None):
        return paths.lora_stamp(lora)

    def load(self, lora, model=None):
        loaded = storage.load_lora(lora, model)
        summary = lora_summary(loaded)
        result = (loaded, stock_lora(loaded), summary)
        return text_output(summary, result, hywu_norms=norm_entries(loaded))
