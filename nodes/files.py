"""Save and load conditions, in ComfyUI's folders."""

from __future__ import annotations

from ..hywu_core.condition import Condition
from .host import paths
from .reports import text_output
from .sockets import CATEGORY, CONDITION


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
        return {
            "required": {
                "condition": (CONDITION, {"tooltip": "From HY-WU Condition Encode."}),
                "filename_prefix": (
                    "STRING",
                    {
                        "default": "conditions/hywu",
                        "tooltip": "Folder and start of the name, below ComfyUI's output folder. What "
                        "lies under 'conditions/' there appears in Load Condition.",
                    },
                ),
            }
        }

    def save(self, condition, filename_prefix):
        path, name = paths.save_path(filename_prefix, ".safetensors")
        condition.save(path)
        return text_output(name, (name,))


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
        return {
            "required": {
                "condition": (
                    paths.condition_names(),
                    {
                        "tooltip": "A .safetensors file in models/hywu_conditions, output/conditions, or "
                        "the input folder."
                    },
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, condition):
        return paths.stamp("hywu_conditions", condition)

    def load(self, condition):
        loaded = Condition.load(paths.condition_path(condition))
        parts = ", ".join(f"{n} {list(t.shape)}" for n, t in loaded.parts.items())
        return text_output(parts, (loaded,))
