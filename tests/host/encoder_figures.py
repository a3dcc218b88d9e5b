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


def generator(parts: dict[str, int], **facts) -> HostGenerator:
    layout = LoRALayout((Stack(("blocks.0", "blocks.1"), (Module("fc", 8, 8),)),), 2, 2.0)
    config = GeneratorConfig(layout, parts, 8, 2, 32, 16, 1, encoder={"type": "comfyui", **facts})
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


def warned(*arguments, **inputs) -> list[str]:
    return said(*arguments, **inputs)["warnings"]


def said(made: HostGenerator, text: str, **inputs) -> dict:
    done = NODES["HYWUConditionEncode"]().encode(made, images, text, **inputs)
    return json.loads(done["ui"]["text"][0])


def far(one, two) -> float:
    return float((one - two).abs().max())


# -- several pictures ---------------------------------------------------------------------------------


def several() -> dict:
    """Three pictures an item, of different sizes; the third one is the same for all."""
    further = {"image2": torch.rand(2, 33, 50, 3), "image3": torch.rand(1, 28, 28, 3)}
    alone = {**inputs, "clip_vision": seeing}
    whole = encode(both, texts, **alone, **further)
    places = [images, further["image2"], further["image3"].expand(2, -1, -1, -1)]
    by_itself = [
        NODES["HYWUConditionEncode"]().encode(both, p, texts, **alone)["result"][0] for p in places
    ]
    single = NODES["HYWUConditionEncode"]().encode(
        both, images[1:], "make all of it darker", **alone, image2=further["image2"][1:],
        image3=further["image3"],
    )["result"][0]  # fmt: skip
    swapped = {"image2": further["image3"], "image3": further["image2"]}
    repeated = {**further, "image3": places[2]}
    trained = generator({"vision": 32, "text": width}, images=3)
    report = said(trained, texts, **alone, **further)
    others = [
        encode(both, texts, **alone),
        encode(both, texts, **alone, image2=further["image2"]),
        encode(both, texts, **alone, **swapped),
        encode(both, texts, **alone, **{**further, "image2": further["image2"].flip(0)}),
    ]
    tokens = whole.parts["vision"]
    return {
        "length": tokens.shape[1],
        "places": far(tokens, torch.cat([c.parts["vision"] for c in by_itself], dim=1)),
        "item": gap(lora(both, whole).select(1), lora(both, single)),
        "swapped": gap(lora(both, whole), lora(both, encode(both, texts, **alone, **swapped))),
        "shared": far(tokens, encode(both, texts, **alone, **repeated).parts["vision"]),
        "prints": len({whole.fingerprint, *(c.fingerprint for c in others)}),
        "origin": whole.origin["images"],
        "report": {name: report[name] for name in ("images", "pictures_each")},
        "warned_1": warned(trained, texts, **alone),
        "warned_3": report["warnings"],
        "untrained_3": warned(both, texts, **alone, **further),
    }


# -- a CONDITIONING -----------------------------------------------------------------------------------


def conditionings() -> dict:
    """The CLIP's own tokens of two texts, as another node would give them: padded, in one entry."""
    made = [clip.encode_from_tokens_scheduled(clip.tokenize(t))[0][0] for t in texts.split("\n")]
    longest = max(t.shape[1] for t in made)
    tokens = torch.cat([torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[1])) for t in made])
    mask = torch.tensor([[i < t.shape[1] for i in range(longest)] for t in made])
    given = [[tokens, {"attention_mask": mask}]]
    alone = {"clip_vision": seeing, "conditioning": given}
    by_clip, found = encode(both, texts, **inputs), encode(both, texts, **alone)
    busy = [
        [tokens, {"attention_mask": mask, "reference_latents": [tokens], "strength": 0.5}],
        [tokens, {}],
    ]
    one = [[made[0], {}]]
    shared = encode(both, "", clip_vision=seeing, conditioning=one)
    changed = [[tokens + 1, {"attention_mask": mask}]]
    masked = [[tokens, {"attention_mask": mask.flip(0)}]]
    reports = [said(both, "", **alone), said(both, texts, **alone), said(both, texts, **inputs)]
    with_clip = {**inputs, "conditioning": busy}
    sees = generator({"vision": 32})
    prints = [encode(both, texts, **{**alone, "conditioning": c}) for c in (changed, masked)]
    return {
        "same": torch.equal(
            found.parts["text"][mask], by_clip.parts["text"][by_clip.masks["text"]]
        ),
        "masked": found.masks["text"].sum(1).tolist(),
        "alone": far(shared.parts["text"], made[0].expand(2, -1, -1)),
        "text": [report["text_from"] for report in reports],
        "unwritten": reports[0]["instructions"],
        "prints": len({c.fingerprint for c in (by_clip, found, *prints)}),
        "warnings": reports[0]["warnings"] + reports[1]["warnings"],
        "both": warned(both, texts, **with_clip),
        "both_same": torch.equal(
            encode(both, texts, **with_clip).parts["text"], found.parts["text"]
        ),
        "unread": warned(sees, "", clip_vision=seeing, conditioning=given),
    }


def refusals() -> dict[str, str]:
    """Errors in one sentence of what can't be connected so."""
    bundled = NODES["HYWULoadGenerator"]().load("bundled", "auto")[0]
    token = torch.zeros(1, 4, width)
    cases = {
        "missing": (both, texts, {"clip": clip}),
        "text": (both, texts, {"clip_vision": seeing}),
        "width": (generator({"text": width + 1}), texts, {"clip": clip}),
        "part": (generator({"audio": 8}), texts, {"clip": clip}),
        "image2": (both, texts, {**inputs, "image2": torch.rand(3, 8, 8, 3)}),
        "nothing": (both, texts, {**inputs, "image3": torch.rand(0, 8, 8, 3)}),
        "bundled": (bundled, texts, {"image3": images}),
        "bundled text": (bundled, "", {"conditioning": [[token, {}]]}),
        "texts": (both, "", {**inputs, "conditioning": [[token.expand(3, -1, -1), {}]]}),
        "no text": (both, "", {**inputs, "conditioning": []}),
        "wide text": (both, "", {**inputs, "conditioning": [[torch.zeros(1, 4, 9), {}]]}),
        "odd mask": (
            both, "", {**inputs, "conditioning": [[token, {"attention_mask": torch.ones(1, 3)}]]},
        ),
        "no instruction": (both, " ", inputs),
    }  # fmt: skip
    return {
        name: error(lambda made=made, text=text, given=given: encode(made, text, **given))
        for name, (made, text, given) in cases.items()
    }


torch.manual_seed(0)
images = torch.rand(2, 40, 30, 3)
_, clip, _ = NODES["HYWULoadBundledEditor"]().load()
seeing, width = vision(), clip.cond_stage_model.config.condition_parts["words"]
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
        "several": several(),
        "conditioning": conditionings(),
        **refusals(),
    }
show(figures)
