"""Training: what a generator for a MODEL would write, and training one from pairs of images."""

from __future__ import annotations

from ..hywu_core.generator.config import SIZES
from . import ui
from .host import layouts
from .host.previews import preview
from .host.train import base, conditions, files, session
from .ui import CATEGORY, GENERATOR

_SIZES = (
    "Weights of the generator, about: XS 3 million, S 20 million, M 100 million, L 400 million."
)


class HYWUModelLayout:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows which modules of any model a generated LoRA would reach: the stacks of layers found, the "
        "tokens that a generator writes, the size of the LoRA, and an estimate of the generation's time "
        "and memory on this machine for a generator of the size chosen. Nothing is trained or loaded."
    )
    SEARCH_ALIASES = ["hy-wu layout", "hywu", "lora targets", "model blocks", "estimate memory"]
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("table", "report")
    OUTPUT_TOOLTIPS = (
        "Stacks, modules and shapes, and the estimates, to read.",
        "The same as JSON.",
    )
    FUNCTION = "show"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        rank = "Rank of the LoRA. Its size and the generator's tokens follow from it."
        tokens = "Tokens of image and instruction together that the generator reads."
        required = {
            "model": ui.socket("MODEL", "Any diffusion model."),
            "rank": ui.whole(16, 1, 512, rank),
            "generator_size": ui.choice(list(SIZES), _SIZES, "S"),
            "condition_tokens": ui.whole(1024, 1, 1048576, tokens),
            "batch_size": ui.whole(1, 1, 4096, "LoRAs generated at once."),
        }
        return {"required": required, "optional": ui.PATTERNS}

    def show(
        self, model, rank, generator_size, condition_tokens, batch_size, include="", exclude=""
    ):
        table, report = layouts.describe(
            model, rank, generator_size, condition_tokens, batch_size, include, exclude
        )
        return ui.shown(table, (table, report))


class HYWUTrainGenerator:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Trains a generator for the MODEL of this graph, from pairs of images with an instruction. The "
        "MODEL stays as it is, bit by bit. The generator lies in models/hywu afterwards, for HY-WU Load "
        "Generator. Stop at any time: the same graph, run again, goes on where it stopped. Train on the "
        "device and in the environment that ComfyUI runs in; `hywu comfy run` does it without a window."
    )
    SEARCH_ALIASES = ["hy-wu train", "hywu", "hypernetwork training", "train lora", "fine-tune"]
    RETURN_TYPES = (GENERATOR, "STRING", "IMAGE", "IMAGE")
    RETURN_NAMES = ("generator", "report", "loss_plot", "samples")
    OUTPUT_TOOLTIPS = (
        "The trained generator, for HY-WU Condition Encode and HY-WU Generate LoRA.",
        "What was trained on what, losses, times and the checkpoint's name, as JSON.",
        "The loss over the steps.",
        "One row for each of up to 4 pairs: source, target, edit.",
    )
    FUNCTION = "train"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        widgets = {**_what(), **_schedule(), **_how(), **ui.PATTERNS, "reads": _READS}
        widgets |= {name: ui.advanced(widgets[name]) for name in _RARE}
        optional = {name: widgets.pop(name) for name in (*ui.PATTERNS, "reads")}
        return {
            "required": {**_SOCKETS, **widgets},
            "optional": {"clip_vision": _CLIP_VISION, **optional},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name=None, pairs=None):
        return ui.checked(lambda: files.check_names(name, pairs))

    @classmethod
    def IS_CHANGED(cls, pairs=None, name=None, **_):
        # links arrive as None; a checkpoint that was taken away is made again from the state
        try:
            return files.pairs_stamp(pairs), files.checkpoint_path(name).is_file()
        except (ValueError, AttributeError, TypeError):
            return "unknown"

    def train(self, model, vae, clip, clip_vision=None, **widgets):
        request = session.Request(**widgets)
        trained = session.train(model, vae, clip, clip_vision, request)
        images = preview(trained.plot) + preview(trained.samples)
        result = (trained.generator, trained.report, trained.plot, trained.samples)
        return ui.shown(trained.report, result, trained.warnings, images=images)


_SOCKETS = {
    "model": ui.socket(
        "MODEL",
        "The base model that the generator is for: any diffusion model, as its loader gives it. Its own kind "
        "of prediction (noise, v, flow) sets the loss.",
    ),
    "vae": ui.socket("VAE", "The model's VAE: the images are trained on in its latent space."),
    "clip": ui.socket(
        "CLIP",
        "The model's text encoder. The instruction goes through it to the model, and to the generator (except "
        "where it reads hidden states, as of the bundled editor).",
    ),
}

#: Widgets that most runs leave as they are.
_RARE = ("accumulation", "learning_rate", "crops", "source_input", "precision", "checkpointing",
         "sample_every", "sample_steps", "include", "exclude", "reads")  # fmt: skip

_CLIP_VISION = ui.socket(
    "CLIP_VISION",
    "An image encoder, by which the generator sees the source image (SigLIP, CLIP, DINO). Without it the "
    "generator reads the instruction only.",
)

_READS = ui.choice(
    conditions.READS,
    "What the generator reads. 'encoders': clip, and clip_vision where connected. 'model': the MODEL's own "
    "hidden states of image and instruction, at most 64 tokens; Condition Encode then takes model, vae and "
    "clip. Or both. The bundled editor always gives its hidden states.",
    conditions.READS[0],
)


def _what():
    """Widgets: which run, which pairs, which generator."""
    return {
        "name": ui.text(
            "my_generator",
            "Name of the checkpoint in models/hywu and of the run's folder in output/hywu_training. A run of "
            "this name that was stopped goes on.",
        ),
        "pairs": ui.text(
            files.SAMPLES,
            "A folder inside ComfyUI's input folder with a .jsonl file (or that file) of rows "
            '{"source": "a.png", "target": "b.png", "instruction": "…", "task": "…"}; "references": a list of '
            "up to 2 further images that only the generator sees. 'samples': the pairs that come along.",
        ),
        "generator_size": ui.choice(list(SIZES), _SIZES, "XS"),
        "rank": ui.whole(4, 1, 512, "Rank of the LoRAs that the generator writes.", step=1),
    }


def _schedule():
    """Widgets: how long, on how much at once, how fast."""
    return {
        "steps": ui.whole(500, 1, 10_000_000, "Updates of the generator.", step=1),
        "batch_size": ui.whole(8, 1, 4096, "Examples of one update.", step=1),
        "accumulation": ui.whole(
            1, 1, 4096,
            "Parts that a batch is split into, one after another: less memory, the same result. It must "
            "divide batch_size.",
            step=1,
        ),
        "learning_rate": ui.number(
            0.0, 0.0, 1.0, 1e-6,
            "Peak learning rate; 0 takes 1.4e-3, or that of a run that goes on. Lower it when the loss jumps.",
            round=False,
        ),
    }  # fmt: skip


def _how():
    """Widgets: the examples, the computation, the samples."""
    return {
        "image_size": ui.whole(
            256, 16, 4096,
            "Side of the square crops in pixels. Take a size that the model was trained on, or less to be "
            "quicker (the bundled editor: 64).",
            step=16,
        ),
        "crops": ui.whole(
            4, 1, 1000,
            "Crops of each pair that are trained on; the first is the largest square. All are encoded once, "
            "before the first step, and kept on disk.",
            step=1,
        ),
        "source_input": ui.choice(
            list(base.SOURCES),
            "How the model gets the source image: as ReferenceLatent gives it, as "
            "InstructPixToPixConditioning does, both (models take what they know), or not at all. Sample with "
            "the same later.",
            "both",
        ),
        "precision": ui.choice(
            ["auto", "float32", "bfloat16"],
            "In what the generator computes while it is trained; its weights stay float32. The model keeps "
            "its own precision. 'auto': bfloat16 on GPUs that are good at it.",
            "auto",
        ),
        "checkpointing": ui.switch(
            False,
            "Compute the blocks of the model and of the generator again in the backward pass instead of "
            "keeping what they computed: far less memory, about a third slower.",
        ),
        "sample_every": ui.whole(
            100, 0, 1_000_000, "Steps between samples; 0 draws them at the end only.", step=1
        ),
        "sample_steps": ui.whole(
            8, 1, 200, "Sampling steps of the samples (euler, simple, cfg 1).", step=1
        ),
        "seed": ui.whole(
            0, 0, 2**31 - 1, "Of the generator's first weights, the order and the noise.", step=1
        ),
    }  # fmt: skip
