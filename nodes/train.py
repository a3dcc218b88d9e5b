"""Train Generator: a generator for whatever MODEL is in the graph, from pairs of pictures."""

from __future__ import annotations

from .host import layouts, training, training_base, training_conditions, training_files
from .host.previews import preview
from .reports import text_output
from .sockets import CATEGORY, GENERATOR


class HYWUTrainGenerator:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Trains a generator for the MODEL of this graph, from pairs of pictures with an instruction. The "
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
        "A row for each of up to 4 pairs: source, target, edit.",
    )
    FUNCTION = "train"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {**_SOCKETS, **_what(), **_schedule(), **_how()},
            "optional": {**_OPTIONAL_SOCKETS, **_PATTERNS, **_READS},
        }

    @classmethod
    def IS_CHANGED(cls, pairs=None, name=None, **_):
        # links arrive as None; a checkpoint that was taken away is made again from the state
        try:
            return training_files.pairs_stamp(pairs), training_files.checkpoint_path(name).is_file()
        except (ValueError, AttributeError, TypeError):
            return "unknown"

    def train(self, model, vae, clip, clip_vision=None, **widgets):
        request = training.Request(**widgets)
        trained = training.train(model, vae, clip, clip_vision, request)
        images = preview(trained.plot) + preview(trained.samples)
        result = (trained.generator, trained.report, trained.plot, trained.samples)
        return text_output(trained.report, result, images=images)


_SOCKETS = {
    "model": (
        "MODEL",
        {
            "tooltip": "The base model that the generator is for: any diffusion model, as its loader gives "
            "it. Its own kind of prediction (noise, v, flow) sets the loss."
        },
    ),
    "vae": (
        "VAE",
        {"tooltip": "The model's VAE: the pictures are trained on in its latent space."},
    ),
    "clip": (
        "CLIP",
        {
            "tooltip": "The model's text encoder. The instruction goes through it to the model, and to the "
            "generator (except where it reads hidden states, as of the bundled editor)."
        },
    ),
}

_OPTIONAL_SOCKETS = {
    "clip_vision": (
        "CLIP_VISION",
        {
            "tooltip": "An image encoder, by which the generator sees the source picture (SigLIP, CLIP, "
            "DINO). Without it the generator reads the instruction only."
        },
    ),
}

_PATTERNS = {
    "include": (
        "STRING",
        {
            "default": "",
            "tooltip": "Only modules whose path matches one of these patterns, divided by commas, such as "
            "'*attn*'. They may lie outside the repeated blocks.",
        },
    ),
    "exclude": (
        "STRING",
        {"default": "", "tooltip": "No modules whose path matches one of these patterns."},
    ),
}

_READS = {
    "reads": (
        list(training_conditions.READS),
        {
            "default": training_conditions.READS[0],
            "tooltip": "What the generator reads. 'encoders': clip, and clip_vision where connected. "
            "'model': the MODEL's own hidden states of picture and instruction, at most 64 tokens; "
            "Condition Encode then takes model, vae and clip. Or both. The bundled editor always gives "
            "its hidden states.",
        },
    ),
}


def _what():
    """Widgets: which run, which pairs, which generator."""
    return {
        "name": (
            "STRING",
            {
                "default": "my_generator",
                "tooltip": "Name of the checkpoint in models/hywu and of the run's folder in "
                "output/hywu_training. A run of this name that was stopped goes on.",
            },
        ),
        "pairs": (
            "STRING",
            {
                "default": training_files.SAMPLES,
                "tooltip": "A folder inside ComfyUI's input folder with a .jsonl file (or that file) of rows "
                '{"source": "a.png", "target": "b.png", "instruction": "…", "task": "…"}; "references": '
                "a list of up to 2 further pictures that only the generator sees. 'samples': the pairs that "
                "come along.",
            },
        ),
        "generator_size": (
            list(layouts.SIZES),
            {
                "default": "XS",
                "tooltip": "Weights of the generator, about: XS 3 million, S 20 million, M 100 million, L "
                "400 million.",
            },
        ),
        "rank": _whole(4, 1, 512, "Rank of the LoRAs that the generator writes."),
    }


def _schedule():
    """Widgets: how long, on how much at once, how fast."""
    return {
        "steps": _whole(500, 1, 10_000_000, "Updates of the generator."),
        "batch_size": _whole(8, 1, 4096, "Examples of one update."),
        "accumulation": _whole(
            1, 1, 4096,
            "Parts that a batch is split into, one after another: less memory, the same result. It must "
            "divide batch_size.",
        ),
        "learning_rate": (
            "FLOAT",
            {
                "default": 0.0, "min": 0.0, "max": 1.0, "step": 1e-6, "round": False,
                "tooltip": "Peak learning rate; 0 takes 5e-4. Lower it when the loss jumps.",
            },
        ),
    }  # fmt: skip


def _how():
    """Widgets: the examples, the computation, the samples."""
    return {
        "image_size": _whole(
            256, 16, 4096,
            "Side of the square crops in pixels. Take a size that the model was trained on, or less to be "
            "quicker (the bundled editor: 64).",
            16,
        ),
        "crops": _whole(
            4, 1, 1000,
            "Crops of each pair that are trained on; the first is the largest square. All are encoded once, "
            "before the first step, and kept on disk.",
        ),
        "source_input": (
            list(training_base.SOURCES),
            {
                "default": "both",
                "tooltip": "How the model gets the source picture: as ReferenceLatent gives it, as "
                "InstructPixToPixConditioning does, both (models take what they know), or not at "
                "all. Sample with the same later.",
            },
        ),
        "precision": (
            ["auto", "float32", "bfloat16"],
            {
                "default": "auto",
                "tooltip": "In what the generator computes while it is trained; its weights stay float32. The "
                "model keeps its own precision. 'auto': bfloat16 on GPUs that are good at it.",
            },
        ),
        "checkpointing": (
            "BOOLEAN",
            {
                "default": False,
                "tooltip": "Compute the blocks of the model and of the generator again in the backward pass "
                "instead of keeping what they computed: far less memory, about a third slower.",
            },
        ),
        "sample_every": _whole(100, 0, 1_000_000, "Steps between samples; 0 draws them at the end only."),
        "sample_steps": _whole(8, 1, 200, "Sampling steps of the samples (euler, simple, cfg 1)."),
        "seed": _whole(0, 0, 2**31 - 1, "Of the generator's first weights, the order and the noise."),
    }  # fmt: skip


def _whole(default, low, high, tip, step=1):
    return ("INT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tip})
