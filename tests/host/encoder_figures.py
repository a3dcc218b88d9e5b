"""Run inside ComfyUI's tree by test_encoders.py: conditions from a graph's encoders, figures as JSON.

Arguments: ComfyUI's tree, this extension's folder, a folder to write to.
"""

from __future__ import annotations

import json
from pathlib import Path

from inside_comfyui import ARGUMENTS, error, load_nodes, show

# isort: split
import comfy.clip_vision
import torch

folder = ARGUMENTS[0]
NODES = load_nodes()
from hywu_nodes.hywu_core.generator.checkpoints import save_generator  # noqa: E402
from hywu_nodes.hywu_core.generator.config import GeneratorConfig  # noqa: E402
from hywu_nodes.hywu_core.generator.model import ParameterGenerator  # noqa: E402
from hywu_nodes.hywu_core.layout import LoRALayout, Module, Stack  # noqa: E402
from hywu_nodes.nodes.host.generators import HostGenerator  # noqa: E402

VISION = {
    "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 32, "image_size": 28, "intermediate_size": 64,
    "layer_norm_eps": 1e-5, "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 2,
    "patch_size": 14, "projection_dim": 16,
}  # fmt: skip


def vision() -> comfy.clip_vision.ClipVisionModel:
    """A CLIP vision model of two layers with random weights."""
    file = Path(folder) / "vision.json"
    file.write_text(json.dumps(VISION))
    made = comfy.clip_vision.ClipVisionModel(str(file))
    for parameter in made.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def generator(parts: dict[str, int]) -> HostGenerator:
    layout = LoRALayout((Stack(("blocks.0", "blocks.1"), (Module("fc", 8, 8),)),), 2, 2.0)
    config = GeneratorConfig(layout, parts, 8, 2, 32, 16, 1, encoder={"type": "comfyui"})
    made = ParameterGenerator(config)
    made.reset_parameters()
    torch.nn.init.normal_(made.model.proj_out_B.weight)
    path = save_generator(made, Path(folder) / f"{'-'.join(parts)}.safetensors", overwrite=True)
    return HostGenerator(path, torch.float32)


def encode(made: HostGenerator, text: str, count: int = 2, **inputs):
    return NODES["HYWUConditionEncode"]().encode(made, images[:count], text, **inputs)["result"][0]


def lora(made: HostGenerator, condition):
    return NODES["HYWUGenerateLoRA"]().generate(made, condition)["result"][0]


def gap(one, two) -> float:
    return max(float((one[path].B - two[path].B).abs().max()) for path in one)


torch.manual_seed(0)
images = torch.rand(2, 40, 30, 3)
_, clip, _ = NODES["HYWULoadBundledEditor"]().load()
seeing, width = vision(), clip.cond_stage_model.config.width
both = generator({"vision": 32, "text": width})
texts = "blur\nmake all of it darker"
inputs = {"clip": clip, "clip_vision": seeing}
with torch.no_grad():
    batch = lora(both, encode(both, texts, **inputs))
    single = lora(both, encode(both, "blur", 1, **inputs))
    figures = {
        "parts": {n: list(t.shape) for n, t in encode(both, texts, **inputs).parts.items()},
        "item": gap(batch.select(0), single),
        "differ": gap(batch.select(0), batch.select(1)),
        "missing": error(lambda: encode(both, texts, clip=clip)),
        "width": error(lambda: encode(generator({"text": width + 1}), texts, clip=clip)),
        "part": error(lambda: encode(generator({"audio": 8}), texts, clip=clip)),
    }
show(figures)
