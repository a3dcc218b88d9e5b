"""Generated LoRAs: generated, inspected, picked out of a batch, mixed, saved, loaded."""

from __future__ import annotations

from . import ui
from .host import generators, lora_files, paths
from .host.previews import preview
from .host.stock_lora import stock_lora
from .ui import CATEGORY, CONDITION, GENERATOR, LORA, STOCK_LORA


class HYWUGenerateLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "The generator writes a LoRA for every image of the condition, in one forward pass. The result "
        "is kept (in host memory, up to a limit): changing the strength, the seed or the sampler never "
        "generates it again."
    )
    SEARCH_ALIASES = ["hypernetwork", "hy-wu", "hywu", "lora generator", "instant lora"]
    RETURN_TYPES = (LORA, STOCK_LORA, "STRING")
    RETURN_NAMES = ("lora", "lora_model", "summary")
    OUTPUT_TOOLTIPS = (
        "The generated LoRA, one per image of the batch: for Apply, Save, Inspect, Blend, Select.",
        "The same for ComfyUI's own Load LoRA Model and Save LoRA Weights. It holds one LoRA: pick one "
        "of a batch with HY-WU Select LoRA.",
        "What was generated, for what and how long it took, as JSON.",
    )
    FUNCTION = "generate"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        condition = ui.socket(
            CONDITION,
            "From HY-WU Condition Encode with the same generator, or a saved condition from Load Condition.",
        )
        generator = ui.socket(GENERATOR, "From HY-WU Load Generator.")
        return {"required": {"generator": generator, "condition": condition}}

    def generate(self, generator, condition):
        lora, seconds, cached = generators.generate(generator, condition)
        summary = ui.lora_summary(lora, seconds=seconds, cached=cached)
        norms = ui.norm_entries(lora, seconds=seconds, cached=cached)
        return ui.shown(summary, (lora, stock_lora(lora), summary), hywu_norms=norms)


class HYWUInspectLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows where a LoRA changes the base model: the norm of every layer and module as a heat map, and "
        "the numbers as a table. A batch gives one heat map per image."
    )
    SEARCH_ALIASES = ["hy-wu inspect", "hywu", "lora norms", "lora heat map", "lora analysis"]
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "table")
    OUTPUT_TOOLTIPS = (
        "Heat maps of the norms |scale * B * A|: layers from left to right, modules from top to bottom.",
        "The same numbers as text, one line per layer and module.",
    )
    FUNCTION = "inspect"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"lora": ui.lora_socket()}}

    def inspect(self, lora):
        norms = lora.norms()
        table, image = ui.norm_table(norms), ui.norm_map(lora, norms)
        entries = ui.norm_entries(lora, norms)
        return ui.shown(table, (image, table), images=preview(image), hywu_norms=entries)


class HYWUSelectLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Picks the LoRA of one image out of a batch. ComfyUI's own LoRA socket holds a single LoRA, so a "
        "batch goes through this node before stock LoRA nodes."
    )
    SEARCH_ALIASES = ["hy-wu select", "hywu", "pick lora", "lora from batch"]
    RETURN_TYPES = (LORA, STOCK_LORA)
    RETURN_NAMES = ("lora", "lora_model")
    OUTPUT_TOOLTIPS = (
        "The LoRA of that image.",
        "The same for ComfyUI's own Load LoRA Model and Save LoRA Weights.",
    )
    FUNCTION = "select"

    @classmethod
    def INPUT_TYPES(cls):
        tip = "Which image of the batch, counted from 0; -1 is the last."
        index = ui.whole(0, -4096, 4095, tip)
        return {"required": {"lora": ui.lora_socket(), "index": index}}

    def select(self, lora, index):
        one = lora.select(index)
        return (one, stock_lora(one))


class HYWUBlendLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Mixes two LoRAs for the same base model: (1 - weight) of the first and weight of the second, "
        "exactly, in weight space. The ranks add up. Weights below 0 or above 1 extrapolate."
    )
    SEARCH_ALIASES = ["hy-wu blend", "hywu", "merge loras", "mix loras", "interpolate lora"]
    RETURN_TYPES = (LORA,)
    RETURN_NAMES = ("lora",)
    OUTPUT_TOOLTIPS = ("The mixture.",)
    FUNCTION = "blend"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "lora_a": ui.socket(LORA, "What weight 0 gives."),
                "lora_b": ui.socket(
                    LORA, "What weight 1 gives; for the same base model and modules."
                ),
                "weight": ui.number(0.5, -10.0, 10.0, 0.05, "Share of the second LoRA."),
            }
        }

    def blend(self, lora_a, lora_b, weight):
        return (lora_a.blend(lora_b, weight),)


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
    OUTPUT_TOOLTIPS = ("The names of the saved files below the output folder, one per line.",)
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        prefix = ui.text(
            "loras/hywu",
            "Folder and start of the name, below ComfyUI's output folder. What lies under 'loras/' there "
            "appears in the lists of the LoRA loaders.",
        )
        kind = ui.choice(
            list(lora_files.FORMATS),
            "ComfyUI: one file per image, for the stock loaders. PEFT: one folder per image. native: one "
            "file for the whole batch.",
            "ComfyUI",
        )
        return {"required": {"lora": ui.lora_socket(), "filename_prefix": prefix, "format": kind}}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix=None):
        return ui.checked(lambda: paths.check_prefix(filename_prefix))

    def save(self, lora, filename_prefix, format):
        names = "\n".join(lora_files.save_lora(lora, filename_prefix, format))
        return ui.shown(names, (names,))


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
        lora = ui.choice(
            paths.lora_names(),
            "A bundled LoRA, a file in models/loras or output/loras, or a PEFT folder there.",
        )
        model = ui.socket(
            "MODEL",
            "The model the LoRA is for. Needed for files whose names only the model can translate: those "
            "that begin with lora_unet_, and the names that diffusers gives the model's modules.",
        )
        optional = {"model": model, "skip_missing": ui.skip_missing()}
        return {"required": {"lora": lora}, "optional": optional}

    @classmethod
    def VALIDATE_INPUTS(cls, lora=None):
        return ui.checked(lambda: paths.check_lora(lora))

    @classmethod
    def IS_CHANGED(cls, lora, model=None, skip_missing=False):
        return paths.lora_stamp(lora)

    def load(self, lora, model=None, skip_missing=False):
        loaded, warnings = lora_files.load_lora(lora, model, skip_missing)
        summary = ui.lora_summary(loaded, **({"warnings": warnings} if warnings else {}))
        result = (loaded, stock_lora(loaded), summary)
        return ui.shown(summary, result, warnings, hywu_norms=ui.norm_entries(loaded))
