"""Run inside ComfyUI's tree by test_hidden_states.py: a MODEL's own hidden states as the condition.

Arguments: ComfyUI's tree, this extension's folder, a folder to write to.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import inside_comfyui as inside

import architectures  # isort: skip
import comfy.ldm.flux.model
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import folder_paths
import torch

import nodes as stock

FOLDER = Path(inside.ARGUMENTS[0])
folder_paths.set_input_directory(str(FOLDER / "input"))
folder_paths.set_output_directory(str(FOLDER / "output"))
folder_paths.models_dir = str(FOLDER / "models")
for kind in ("diffusion_models", "loras"):
    folder_paths.add_model_folder_path(kind, str(FOLDER / "models"), is_default=True)
NODES = inside.load_nodes()

import training_models as tools  # noqa: E402
from hywu_nodes.hywu_core.generator.checkpoints import save_generator  # noqa: E402
from hywu_nodes.hywu_core.generator.config import GeneratorConfig  # noqa: E402
from hywu_nodes.hywu_core.generator.model import ParameterGenerator  # noqa: E402
from hywu_nodes.hywu_core.layout import LoRALayout  # noqa: E402
from hywu_nodes.hywu_core.lora import GeneratedLoRA  # noqa: E402
from hywu_nodes.hywu_core.training.base import frozen_digest  # noqa: E402
from hywu_nodes.nodes.host.cache import TensorCache  # noqa: E402
from hywu_nodes.nodes.host.encode import hidden_states, token_probe  # noqa: E402
from hywu_nodes.nodes.host.generators import HostGenerator  # noqa: E402
from hywu_nodes.nodes.host.train import files  # noqa: E402
from hywu_nodes.nodes.host.train.conditions import CachedEncoder  # noqa: E402
from hywu_nodes.nodes.host.train.data import FixedCrops  # noqa: E402

SIDE = tools.SIZE
PICTURES = torch.rand(3, 80, 48, 3, generator=torch.Generator().manual_seed(0))


class Model:
    """A MODEL of random weights with a text encoder and a VAE that fit it."""

    def __init__(self, name: str, model: Any, vae: Any, text: int, pooled: int = 0) -> None:
        self.name, self.model, self.vae = name, model, vae
        self.clip = tools.ToyCLIP(text, pooled)
        self.inputs = {"model": model, "vae": vae, "clip": self.clip}

    @property
    def network(self) -> torch.nn.Module:
        return self.model.model.diffusion_model

    def generator(self, **changed: Any) -> HostGenerator:
        """Random weights that read this MODEL's hidden states; `changed` facts of the encoder."""
        cache = TensorCache(FOLDER / "cache")
        encoder = CachedEncoder(self.model, self.clip, None, cache, "model", self.vae, SIDE)
        facts = {**encoder.identity, "model": {**encoder.identity["model"], **changed}}
        layout = LoRALayout.of(self.network, 2)
        parts = dict(encoder.parts)
        if facts["model"]["contrast"] is None:  # as checkpoints say it that know of none
            del facts["model"]["contrast"]
            parts[hidden_states.PART] //= 2
        config = GeneratorConfig(layout, parts, 32, 2, 64, 32, 1, encoder=facts)
        torch.manual_seed(0)
        made = ParameterGenerator(config)
        made.reset_parameters()
        torch.nn.init.normal_(made.model.proj_out_B.weight, std=0.05)
        path = save_generator(made, FOLDER / f"{self.name}.safetensors", overwrite=True)
        return HostGenerator(path, torch.float32)


def narrow(kind: type, **options: Any) -> Any:
    """A MODEL of one of ComfyUI's kinds, narrower than its loader makes it."""
    config = kind(options)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    weights = architectures.random_weights(model.diffusion_model, torch.float32)
    model.diffusion_model.load_state_dict(weights, strict=False)
    return comfy.model_patcher.ModelPatcher(model, mm.get_torch_device(), torch.device("cpu"))


def small_vae(channels: int) -> comfy.sd.VAE:
    vae = comfy.taesd.taesd.TAESD(latent_channels=channels)
    return comfy.sd.VAE(sd=architectures.random_weights(vae, torch.float32))


def flux() -> Any:
    # later ComfyUIs ask which axes the text's positions count, their loaders say none for Flux 1
    fields = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in fields else {}
    return narrow(
        comfy.supported_models.Flux, image_model="flux", guidance_embed=True, in_channels=16,
        out_channels=16, hidden_size=128, mlp_ratio=4.0, num_heads=2, depth=1, depth_single_blocks=2,
        axes_dim=[16, 24, 24], theta=10000, patch_size=2, qkv_bias=True,
        vec_in_dim=32, context_in_dim=64, **newer,
    )  # fmt: skip


def unet(inner: int, outer: int) -> Any:
    """SD 1.5's, 32 channels wide, with that many transformer blocks in its two levels, as SDXL's differ."""
    return narrow(
        comfy.supported_models.SD15, image_size=32, in_channels=4, out_channels=4, model_channels=32,
        num_res_blocks=[1, 1], channel_mult=(1, 2), num_heads=2, context_dim=768,
        transformer_depth=[outer, inner], transformer_depth_middle=1,
        transformer_depth_output=[outer] * 2 + [inner] * 2, use_spatial_transformer=True, legacy=False,
        use_temporal_attention=False,
    )  # fmt: skip


def z_image() -> Any:
    """Pads its text and its image to 32 tokens, in one sequence."""
    return narrow(
        comfy.supported_models.Lumina2, image_model="lumina2", in_channels=16, cap_feat_dim=32,
        n_layers=2, n_refiner_layers=1, qk_norm=True, patch_size=2, dim=256, n_heads=4, n_kv_heads=4,
        axes_dims=[16, 24, 24], axes_lens=[1536, 512, 512], rope_theta=256.0, ffn_dim_multiplier=2.0,
        z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
    )  # fmt: skip


def qwen() -> Any:
    """Its blocks give text and image one by one."""
    return narrow(
        comfy.supported_models.QwenImage, image_model="qwen_image", num_layers=2, in_channels=64,
        num_attention_heads=1, joint_attention_dim=64,
    )  # fmt: skip


def models() -> dict[str, Any]:
    """Name -> a function that makes it."""
    return {
        "Wan 2.1": lambda: Model("wan", tools.load_model("Wan 2.1"), tools.wan_vae(), 4096),
        "SD3": lambda: Model("sd3", tools.load_model("SD3"), small_vae(16), 64, 2048),
        "SD 1.5": lambda: Model("sd15", unet(1, 1), small_vae(4), 768),
        "UNet": lambda: Model("unet", unet(1, 0), small_vae(4), 768),
        "Flux": lambda: Model("flux", flux(), small_vae(16), 64, 32),
        "HunyuanImage 2.1": lambda: Model(
            "hunyuan", tools.load_model("HunyuanImage 2.1"), small_vae(64), 64
        ),
        "Qwen-Image": lambda: Model("qwen", qwen(), tools.wan_vae(), 64),
        "Z-Image": lambda: Model("z", z_image(), small_vae(16), 32),
    }


def encode(generator: Any, text: str, pictures: Any = PICTURES, **inputs: Any) -> Any:
    return NODES["HYWUConditionEncode"]().encode(generator, pictures, text, **inputs)


def tokens(*arguments: Any, **inputs: Any) -> torch.Tensor:
    return encode(*arguments, **inputs)["result"][0].parts[hidden_states.PART]


def gap(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / one.abs().max())


# -- every architecture ------------------------------------------------------------------------------------


def looked_at(make: Any) -> dict[str, Any]:
    made = make()
    generator = made.generator()
    facts = generator.config.encoder["model"]
    texts = "make it warm\nmake it cold\nmake it warm"
    batch = tokens(generator, texts, **made.inputs)
    single = tokens(generator, "make it cold", PICTURES[1:2], **made.inputs)
    same = PICTURES[:1].expand(2, -1, -1, -1)
    asked = tokens(generator, "make it warm\nmake it cold", same, **made.inputs)
    return {
        "layer": facts["layer"],
        "shape": list(batch.shape),
        "width": dict(generator.config.condition),
        "again": gap(batch, tokens(generator, texts, **made.inputs)),
        "item": gap(batch[1:2], single),
        "by_image": gap(batch[0], batch[2]),
        "by_text": gap(asked[0], asked[1]),
        "text_in_states": share(*(half(row, 0) for row in asked)),
        "text_in_contrast": share(*(half(row, 1) for row in asked)),
        "without_contrast": gap(half(batch, 0), without_contrast(made, texts)),
        "place": image_place(made),
        "hooks_left": sum(len(m._forward_hooks) for m in made.network.modules()),
    }


def share(one: torch.Tensor, two: torch.Tensor) -> float:
    """How much of one is not in the other, by their norms."""
    return float((one - two).norm() / one.norm())


def half(states: torch.Tensor, second: int) -> torch.Tensor:
    """The states themselves, or what the text changes in them."""
    return states.chunk(2, dim=-1)[second]


def without_contrast(made: Model, texts: str) -> torch.Tensor:
    """The tokens that a checkpoint gets which says nothing about a contrast."""
    return tokens(made.generator(contrast=None), texts, **made.inputs)


def image_place(made: Model) -> list[Any]:
    """What was found for the last latent; and how far the place moves tokens of the image only."""
    found = list(token_probe._places.get(made.network, {}).values())
    return [[p.member, p.start, p.stop, list(p.grid)] if p else None for p in found]


# -- one, from all sides -------------------------------------------------------------------------------------


def wrong(wan: Model, generator: HostGenerator) -> dict[str, str]:
    sd3 = models()["SD3"]()
    one = PICTURES[:1]
    cases = {
        "base": {**wan.inputs, "model": sd3.model},
        "vae": {**wan.inputs, "vae": None},
        "clip": {**wan.inputs, "clip": None},
        "model": {**wan.inputs, "model": None},
        "channels": {**wan.inputs, "vae": small_vae(4)},
    }
    found = {
        name: inside.error(lambda inputs=inputs: encode(generator, "a", one, **inputs))
        for name, inputs in cases.items()
    }
    lost = wan.generator(layer="blocks.7")
    found["layer"] = inside.error(lambda: encode(lost, "a", one, **wan.inputs))
    made = encode(generator, "a", one, **wan.inputs)["result"][0]
    found["origin"] = inside.error(lambda: NODES["HYWUGenerateLoRA"]().generate(lost, made))
    official = HostGenerator(lost_encoder(wan), torch.float32)
    found["official"] = inside.error(lambda: encode(official, "a", one, **wan.inputs))
    return found


def lost_encoder(wan: Model) -> Path:
    """A checkpoint of ComfyUI's encoders that says nothing about a model."""
    layout = LoRALayout.of(wan.network, 2)
    parts = {hidden_states.PART: 128}
    config = GeneratorConfig(layout, parts, 32, 2, 64, 32, 1, encoder={"type": "comfyui"})
    made = ParameterGenerator(config)
    made.reset_parameters()
    return save_generator(made, FOLDER / "lost.safetensors", overwrite=True)


def with_lora(wan: Model, generator: HostGenerator) -> dict[str, Any]:
    """The same LoRA merged and unmerged on the MODEL, and taken off again."""

    def made(model: Any) -> tuple[Any, list[str]]:
        result = encode(generator, "make it warm", PICTURES[:1], **{**wan.inputs, "model": model})
        report = json.loads(result["ui"]["text"][0])
        return result["result"][0], report["warnings"]

    draw = torch.Generator().manual_seed(5)
    layout = LoRALayout.of(wan.network, 2)
    pairs = {
        t.path: (
            torch.randn(1, 2, t.module.in_features, generator=draw) * t.module.in_features**-0.5,
            torch.randn(1, t.module.out_features, 2, generator=draw) * 0.15,
        )
        for t in layout.targets()
    }
    layers = {t.path: layout.stacks[t.stack].layers[t.layer] for t in layout.targets()}
    lora = GeneratedLoRA.from_pairs(pairs, 2.0, layers=layers)

    def on(strength: float, mode: str) -> Any:
        return NODES["HYWUApplyLoRA"]().apply(wan.model, lora, strength, mode)["result"][0]

    plain, quiet = made(wan.model)
    merged, warned = made(on(1.0, "merge"))
    unmerged, _ = made(on(1.0, "unmerged"))
    # the shared weights hold the merged LoRA now, unless they are given back first
    mm.load_models_gpu([on(1.0, "merge")])
    dirty, dirty_warned = made(wan.model)
    part = hidden_states.PART
    prints = [
        made(on(strength, mode))[0].fingerprint
        for strength, mode in ((1.0, "merge"), (1.0, "merge"), (0.5, "merge"), (1.0, "unmerged"))
    ]
    return {
        "quiet": quiet,
        "warned": warned,
        "dirty_warned": dirty_warned,
        "effect": gap(plain.parts[part], merged.parts[part]),
        "unmerged": gap(merged.parts[part], unmerged.parts[part]),
        "back": gap(plain.parts[part], dirty.parts[part]),
        "print_back": plain.fingerprint == dirty.fingerprint,
        "print_same": prints[0] == prints[1] == merged.fingerprint,
        "prints": len({plain.fingerprint, *prints}),
    }


def placed_by_hand(flux_model: Model) -> dict[str, Any]:
    """The tokens that are taken, against those that the network itself cuts out for its last layer."""
    generator, seen = flux_model.generator(), []
    handle = flux_model.network.final_layer.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    picture = PICTURES[:1, :48, :48]
    found = tokens(generator, "make it warm", picture, **flux_model.inputs)
    handle.remove()
    with_text, without = seen[0].float(), seen[-1].float()
    assert with_text.shape[1] <= hidden_states.SIDE**2  # the grid is not averaged
    wanted = torch.cat([with_text, with_text - without], dim=2)
    return {"hand": gap(found, wanted)}


def stopped(wan: Model, generator: HostGenerator) -> dict[str, Any]:
    """The stop button between two pictures."""
    calls = {"left": 2}
    ask = mm.throw_exception_if_processing_interrupted

    def stop_at_second() -> None:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise mm.InterruptProcessingException()

    mm.throw_exception_if_processing_interrupted = stop_at_second
    try:
        encode(generator, "make it warm", **wan.inputs)
        how = "went on"
    except mm.InterruptProcessingException:
        how = "interrupted"
    finally:
        mm.throw_exception_if_processing_interrupted = ask
    return {"stopped": how}


# -- several pictures, and a text from another node ----------------------------------------------------------


def several(wan: Model, generator: HostGenerator) -> dict[str, Any]:
    """Three pictures an item, the third the same for all; under texts that differ and under one."""
    texts, runs = "make it warm\nmake it cold", []
    draw = torch.Generator().manual_seed(7)
    further = {
        "image2": torch.rand(2, 48, 48, 3, generator=draw),
        "image3": torch.rand(1, 32, 90, 3, generator=draw),
    }
    places = [PICTURES[:2], further["image2"], further["image3"].expand(2, -1, -1, -1)]
    alone = [tokens(generator, texts, picture, **wan.inputs) for picture in places]
    handle = wan.network.register_forward_hook(lambda *_: runs.append(1))
    found = encode(generator, texts, PICTURES[:2], **wan.inputs, **further)["result"][0]
    differing = len(runs)
    encode(generator, "make it warm", PICTURES[:2], **wan.inputs, **further)
    handle.remove()
    return {
        "lengths": [found.parts[hidden_states.PART].shape[1], *(t.shape[1] for t in alone)],
        "gap": gap(torch.cat(alone, dim=1), found.parts[hidden_states.PART]),
        "third_by_text": gap(alone[2][0], alone[2][1]),
        "runs": [differing, len(runs) - differing],
        "images": found.origin["images"],
    }


def by_conditioning(made: Model) -> dict[str, Any]:
    """Texts as other nodes give them, in a batch of two with pooled outputs, against the CLIP's own."""
    generator, one = made.generator(), PICTURES[:1].expand(2, -1, -1, -1)
    texts = ["make it warm", "make it cold"]
    entries = [made.clip.encode_from_tokens_scheduled(made.clip.tokenize(t))[0] for t in texts]
    pooled = torch.cat([facts["pooled_output"] for _, facts in entries])
    given = [[torch.cat([text for text, _ in entries]), {"pooled_output": pooled}]]
    beside = {
        "pooled_output": pooled,
        "reference_latents": [torch.ones(1, 16, 4, 4)],
        "end_percent": 0.5,
    }
    without = {name: value for name, value in made.inputs.items() if name != "clip"}

    def at(conditioning: Any, text: str = "") -> Any:
        return encode(generator, text, one, conditioning=conditioning, **without)

    wanted = tokens(generator, "\n".join(texts), one, **made.inputs)
    found = at(given)["result"][0]
    first = at([list(entries[0])])["result"][0]
    busy = at([[given[0][0], beside], *given])
    other_pooled = at([[given[0][0], {"pooled_output": pooled + 1}]])["result"][0]
    part = hidden_states.PART
    return {
        "same": gap(wanted, found.parts[part]),
        "differ": gap(found.parts[part][0], found.parts[part][1]),
        "for_all": gap(wanted[:1].expand(2, -1, -1), first.parts[part]),
        "beside": gap(wanted, busy["result"][0].parts[part]),
        "said": json.loads(busy["ui"]["text"][0])["warnings"],
        "pooled": gap(wanted, other_pooled.parts[part]),
        "prints": len({c.fingerprint for c in (found, first, other_pooled)}),
        "print_same": found.fingerprint == at(given)["result"][0].fingerprint,
    }


# -- trained -----------------------------------------------------------------------------------------------

WIDGETS: dict[str, Any] = {
    "name": "own", "pairs": "colour", "generator_size": "XS", "rank": 2, "steps": 4, "batch_size": 4,
    "accumulation": 1, "learning_rate": 1e-3, "image_size": SIDE, "crops": 1, "source_input": "both",
    "precision": "auto", "checkpointing": False, "sample_every": 0, "sample_steps": 2, "seed": 0,
}  # fmt: skip


def trained(wan: Model, reads: str) -> dict[str, Any]:
    """Train, load the checkpoint, encode, generate, apply, sample. Its pairs have references for 'model'."""
    before = frozen_digest(wan.model.model)
    name = reads.replace(" ", "_")
    images = 3 if reads == "model" else 1
    further = {"image2": PICTURES[1:2], "image3": PICTURES[2:, :20]} if images > 1 else {}
    node = NODES["HYWUTrainGenerator"]()
    done = node.train(
        wan.model, wan.vae, wan.clip, clip_vision=tools.clip_vision(FOLDER), reads=reads,
        **{**WIDGETS, "name": name, "pairs": "colour" if images == 1 else "references"},
    )["result"]  # fmt: skip
    cached = len(list((files.run_folder(name) / "cache").glob("*.safetensors")))
    generator = NODES["HYWULoadGenerator"]().load(f"{name}.safetensors", "auto")[0]
    inputs = {**wan.inputs, "clip_vision": tools.clip_vision(FOLDER), **further}
    picture = PICTURES[:1, :48, :48]
    result = encode(generator, "make it warm", picture, **inputs)
    other = encode(generator, "make it cold", picture, **inputs)["result"][0]
    loras = [
        NODES["HYWUGenerateLoRA"]().generate(generator, condition)["result"][0]
        for condition in (result["result"][0], other)
    ]
    sample = architectures.sampler("Wan 2.1", stock.common_ksampler)
    plain = sample(wan.model)
    applied = NODES["HYWUApplyLoRA"]().apply(wan.model, loras[0], 1.0, "unmerged")["result"][0]
    report = json.loads(done[1])
    return {
        "parts": dict(generator.config.condition),
        "facts": generator.config.encoder["model"],
        "images": [generator.config.encoder.get("images"), report["pictures_each"]],
        "losses": [report["loss_first_tenth"], report["loss_last_tenth"]],
        "note": report.get("note"),
        "warnings": json.loads(result["ui"]["text"][0])["warnings"],
        "base_same": frozen_digest(wan.model.model) == before,
        "cached": cached,
        "effect": float((sample(applied) - plain).abs().max()),
        "by_text": max(float((loras[0][p].B - loras[1][p].B).abs().max()) for p in loras[0]),
        "training_condition": gap_to_training(wan, generator, name),
    }


def gap_to_training(wan: Model, generator: HostGenerator, name: str) -> float:
    """The condition of a training's crop against that of Condition Encode for the same picture."""
    pairs = "colour" if name != "model" else "references"
    crop = FixedCrops(files.training_pairs(pairs)[0], 1, SIDE, 1, 0).batch([0])
    further = crop.references[0] if crop.references else ()
    cache = TensorCache(files.run_folder(name) / "cache")
    encoder = CachedEncoder(
        wan.model, wan.clip, None, cache, "model", wan.vae, SIDE, images=1 + len(further)
    )
    kept = encoder.condition(crop.source, crop.instruction[0], further).parts[hidden_states.PART]
    inputs = {**wan.inputs, "clip_vision": tools.clip_vision(FOLDER)}
    inputs |= {f"image{i}": p.movedim(0, -1)[None] for i, p in enumerate(further, 2)}
    picture = crop.source.movedim(1, -1)
    return gap(kept, tokens(generator, crop.instruction[0], picture, **inputs))


with torch.inference_mode():  # as ComfyUI runs its nodes
    tools.make_pairs(FOLDER / "input" / "colour")
    tools.make_pairs(FOLDER / "input" / "references", references=2)
    figures: dict[str, Any] = {name: looked_at(make) for name, make in models().items()}
    wan = models()["Wan 2.1"]()
    generator = wan.generator()
    figures["errors"] = wrong(wan, generator)
    figures["lora"] = with_lora(wan, generator)
    figures |= placed_by_hand(models()["Flux"]()) | stopped(wan, generator)
    figures["several"] = several(wan, generator)
    figures["conditioning"] = by_conditioning(models()["SD3"]())
    for reads in ("model", "model and encoders"):
        figures[reads] = trained(wan, reads)
inside.show(figures)
