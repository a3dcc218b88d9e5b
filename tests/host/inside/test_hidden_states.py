"""A MODEL's own hidden states as the condition: Condition Encode and Train Generator on models not ours."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import architectures
import comfy.ldm.flux.model
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import pytest
import torch
import training_models
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.generator.checkpoints import save_generator
from hywu_nodes.hywu_core.generator.config import GeneratorConfig
from hywu_nodes.hywu_core.generator.model import ParameterGenerator
from hywu_nodes.hywu_core.layout import LoRALayout
from hywu_nodes.hywu_core.lora import GeneratedLoRA
from hywu_nodes.hywu_core.training.base import frozen_digest
from hywu_nodes.nodes.host.cache import TensorCache
from hywu_nodes.nodes.host.encode import hidden_states, token_probe
from hywu_nodes.nodes.host.generators import HostGenerator
from hywu_nodes.nodes.host.train import files
from hywu_nodes.nodes.host.train.conditions import CachedEncoder
from hywu_nodes.nodes.host.train.data import FixedCrops

import nodes as stock

SIDE = training_models.SIZE
PART = hidden_states.PART
IMAGES = torch.rand(3, 80, 48, 3, generator=torch.Generator().manual_seed(0))
TEXTS = "make it warm\nmake it cold\nmake it warm"

#: Architecture -> the last of its blocks to run, its outputs' shape for three images of 80 x 48 pixels;
#: tokens are twice as wide, with what the text changes.
ARCHITECTURES = {
    "Wan 2.1": ("blocks.1", [3, 15, 128]),
    "SD3": ("joint_blocks.1", [3, 15, 128]),
    "SD 1.5": ("output_blocks.3.1.transformer_blocks.0", [3, 48, 32]),
    "UNet": ("output_blocks.3.0", [3, 48, 32]),
    "Flux": ("single_blocks.1", [3, 15, 128]),
    "HunyuanImage 2.1": ("single_blocks.1", [3, 48, 256]),
    "Qwen-Image": ("transformer_blocks.1", [3, 15, 128]),
    "Z-Image": ("layers.1", [3, 15, 256]),
}
#: Where the image's tokens are: of the output's tensor, from, to, (frames, rows, columns).
PLACES = {
    "Flux": [0, 8, 23, [1, 5, 3]],  # after 8 tokens of text
    "HunyuanImage 2.1": [0, 0, 60, [1, 10, 6]],  # before the text; after it in 0.33.0
    "Qwen-Image": [1, 0, 15, [1, 5, 3]],  # the block's second output
    "Z-Image": [0, 32, 47, [1, 5, 3]],  # text and image are padded to 32 tokens each
    "SD3": [0, 0, 15, [1, 5, 3]],  # the last block gives no text
    "Wan 2.1": [0, 0, 15, [1, 5, 3]],
    "SD 1.5": [0, 0, 60, [1, 10, 6]],
}


class Model:
    """A MODEL of random weights with a text encoder and a VAE that fit it."""

    def __init__(self, name: str, model: Any, vae: Any, text: int, pooled: int = 0) -> None:
        self.name, self.model, self.vae = name, model, vae
        self.clip = training_models.ToyCLIP(text, pooled)
        self.inputs = {"model": model, "vae": vae, "clip": self.clip}

    @property
    def network(self) -> torch.nn.Module:
        return self.model.model.diffusion_model

    def generator(self, folder: Path, **changed: Any) -> HostGenerator:
        """Random weights that read this MODEL's hidden states; `changed`: of the encoder."""
        cache = TensorCache(folder / "cache")
        encoder = CachedEncoder(self.model, self.clip, None, cache, "model", self.vae, SIDE)
        identity = {**encoder.identity, "model": {**encoder.identity["model"], **changed}}
        parts = dict(encoder.parts)
        if identity["model"]["contrast"] is None:  # as checkpoints say it that know of none
            del identity["model"]["contrast"]
            parts[PART] //= 2
        return self.reading(folder, parts, identity)

    def reading(
        self, folder: Path, parts: dict[str, int], encoder: dict[str, Any]
    ) -> HostGenerator:
        """Random weights that read these parts."""
        layout = LoRALayout.of(self.network, 2)
        config = GeneratorConfig(layout, parts, 32, 2, 64, 32, 1, encoder=encoder)
        torch.manual_seed(0)
        made = ParameterGenerator(config)
        made.reset_parameters()
        torch.nn.init.normal_(made.model.proj_out_B.weight, std=0.05)
        path = save_generator(made, folder / f"{self.name}.safetensors", overwrite=True)
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
        "Wan 2.1": lambda: Model(
            "wan", training_models.load_model("Wan 2.1"), training_models.wan_vae(), 4096
        ),
        "SD3": lambda: Model("sd3", training_models.load_model("SD3"), small_vae(16), 64, 2048),
        "SD 1.5": lambda: Model("sd15", unet(1, 1), small_vae(4), 768),
        "UNet": lambda: Model("unet", unet(1, 0), small_vae(4), 768),
        "Flux": lambda: Model("flux", flux(), small_vae(16), 64, 32),
        "HunyuanImage 2.1": lambda: Model(
            "hunyuan", training_models.load_model("HunyuanImage 2.1"), small_vae(64), 64
        ),
        "Qwen-Image": lambda: Model("qwen", qwen(), training_models.wan_vae(), 64),
        "Z-Image": lambda: Model("z", z_image(), small_vae(16), 32),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hidden")


@pytest.fixture(autouse=True)
def as_comfyui_runs_nodes():
    with torch.inference_mode():
        yield


@pytest.fixture
def encode(call):
    """(generator, text, images) -> the condition."""

    def run(generator, text, images=IMAGES, **inputs):
        return call.HYWUConditionEncode(generator, images, text, **inputs)[0]

    return run


@pytest.fixture
def tokens(encode):
    return lambda *args, **inputs: encode(*args, **inputs).parts[PART]


@pytest.fixture
def warnings(call):
    def run(generator, text, images=IMAGES, **inputs):
        return call.report("HYWUConditionEncode", generator, images, text, **inputs)["warnings"]

    return run


def gap(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / one.abs().max())


# -- every architecture ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request):
    with torch.inference_mode():
        model = models()[request.param]()
    model.architecture = request.param
    yield model
    del model
    gc.collect()


@pytest.fixture(scope="module")
def reader(made, folder):
    with torch.inference_mode():
        return made.generator(folder)


def test_the_last_block_gives_a_grid_of_the_images_tokens(made, reader, tokens):
    layer, shape = ARCHITECTURES[made.architecture]
    assert reader.config.encoder["model"]["layer"] == layer
    assert list(tokens(reader, TEXTS, **made.inputs).shape) == [*shape[:2], 2 * shape[2]]
    assert dict(reader.config.condition) == {PART: 2 * shape[2]}
    assert not any(module._forward_hooks for module in made.network.modules())


def test_image_and_instruction_change_it_and_nothing_else_does(made, reader, tokens):
    batch = tokens(reader, TEXTS, **made.inputs)
    assert torch.equal(batch, tokens(reader, TEXTS, **made.inputs))
    single = tokens(reader, "make it cold", IMAGES[1:2], **made.inputs)
    assert gap(batch[1:2], single) < 1e-5
    assert gap(batch[0], batch[2]) > 1e-3


def test_two_instructions_differ_more_in_what_the_text_changes_than_in_the_states(
    made, reader, tokens
):
    """In the states it is 0.3 to 26 % of the norm, for these random weights; in the changes 14 to 41 %."""
    same = IMAGES[:1].expand(2, -1, -1, -1)
    asked = tokens(reader, "make it warm\nmake it cold", same, **made.inputs)
    assert gap(asked[0], asked[1]) > 1e-3

    def share(one: torch.Tensor, two: torch.Tensor) -> float:
        return float((one - two).norm() / one.norm())

    in_states, in_contrast = (share(*(row.chunk(2, dim=-1)[i] for row in asked)) for i in (0, 1))
    assert in_contrast > 0.1
    assert in_contrast > 1.3 * in_states


def test_a_checkpoint_without_the_contrast_gets_the_states_alone(made, reader, tokens, folder):
    states = tokens(reader, TEXTS, **made.inputs).chunk(2, dim=-1)[0]
    alone = tokens(made.generator(folder, contrast=None), TEXTS, **made.inputs)
    assert gap(states, alone) < 1e-6


def test_the_images_tokens_are_told_apart(made, reader, tokens):
    tokens(reader, TEXTS, **made.inputs)
    place = PLACES.get(made.architecture)
    if place is None:  # gives a feature map
        assert made.network not in token_probe._places
        return
    found = list(token_probe._places[made.network].values())[-1]
    if made.architecture == "HunyuanImage 2.1" and found.start:
        place = [0, 8, 68, place[3]]
    assert [found.member, found.start, found.stop, list(found.grid)] == place


# -- one, from all sides -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan():
    with torch.inference_mode():
        return models()["Wan 2.1"]()


@pytest.fixture(scope="module")
def generator(wan, folder):
    with torch.inference_mode():
        return wan.generator(folder)


def test_the_tokens_are_those_that_the_models_last_layer_gets(tokens, folder):
    """Against those that the network itself cuts out for its last layer."""
    made, seen = models()["Flux"](), []
    reader = made.generator(folder)
    handle = made.network.final_layer.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    found = tokens(reader, "make it warm", IMAGES[:1, :48, :48], **made.inputs)
    handle.remove()
    with_text, without = seen[0].float(), seen[-1].float()
    assert with_text.shape[1] <= hidden_states.SIDE**2  # the grid is not averaged
    assert gap(found, torch.cat([with_text, with_text - without], dim=2)) < 1e-6


def test_sockets_that_are_missing_or_others(wan, generator, encode):
    cases = {
        "connect the base model that the generator was trained for": {
            "model": models()["SD3"]().model
        },
        "connect vae.": {"vae": None},
        r"connect clip \(or conditioning\).": {"clip": None},
        "connect model.": {"model": None},
        "connect the model's own VAE": {"vae": small_vae(4)},
    }
    for words, changed in cases.items():
        with pytest.raises(HYWUError, match=words):
            encode(generator, "a", IMAGES[:1], **{**wan.inputs, **changed})


def test_checkpoints_that_read_something_else(call, wan, generator, encode, folder):
    lost = wan.generator(folder / "lost", layer="blocks.7")
    with pytest.raises(HYWUError, match=r"which has no blocks\.7"):
        encode(lost, "a", IMAGES[:1], **wan.inputs)
    made = encode(generator, "a", IMAGES[:1], **wan.inputs)
    with pytest.raises(HYWUError, match=r"made by the model's layer 'blocks\.1'"):
        call.HYWUGenerateLoRA(lost, made)
    official = wan.reading(folder / "lost", {PART: 128}, {"type": "comfyui"})
    with pytest.raises(HYWUError, match="which no encoder of a graph makes"):
        encode(official, "a", IMAGES[:1], **wan.inputs)


@pytest.fixture(scope="module")
def on(call, wan):
    """(strength, mode) -> the MODEL with a LoRA of random values."""
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
    return lambda strength, mode: call.HYWUApplyLoRA(wan.model, lora, strength, mode)[0]


@pytest.fixture
def seen_through(wan, generator, encode):
    return lambda model: encode(
        generator, "make it warm", IMAGES[:1], **{**wan.inputs, "model": model}
    )


def test_loras_on_the_model_act_and_are_said(wan, generator, on, seen_through, warnings):
    plain, merged = seen_through(wan.model), seen_through(on(1.0, "merge"))
    unmerged = seen_through(on(1.0, "unmerged"))
    assert gap(plain.parts[PART], merged.parts[PART]) > 1e-3
    assert gap(merged.parts[PART], unmerged.parts[PART]) < 1e-4
    for model, found in ((wan.model, []), (on(1.0, "merge"), ["LoRAs and patches"])):
        said = warnings(generator, "make it warm", IMAGES[:1], **{**wan.inputs, "model": model})
        assert len(said) == len(found)
        assert all(words in text for words, text in zip(found, said, strict=True))
    # plain, and a print of its own for each strength and way of applying, the same when made again
    ways = ((1.0, "merge"), (1.0, "merge"), (0.5, "merge"), (1.0, "unmerged"))
    prints = [seen_through(on(*way)).fingerprint for way in ways]
    assert prints[0] == prints[1] == merged.fingerprint
    assert len({plain.fingerprint, *prints}) == 4


def test_a_lora_merged_for_a_sibling_branch_is_not_seen(wan, generator, on, seen_through, warnings):
    plain = seen_through(wan.model)
    # the shared weights hold the merged LoRA now, unless they are given back first
    mm.load_models_gpu([on(1.0, "merge")])
    dirty = seen_through(wan.model)
    assert warnings(generator, "make it warm", IMAGES[:1], **wan.inputs) == []
    assert gap(plain.parts[PART], dirty.parts[PART]) < 1e-6
    assert plain.fingerprint == dirty.fingerprint


def test_the_stop_button_works_between_images(wan, generator, encode, monkeypatch):
    left = [2]

    def stop_at_second() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise mm.InterruptProcessingException()

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", stop_at_second)
    with pytest.raises(mm.InterruptProcessingException):
        encode(generator, "make it warm", **wan.inputs)


def test_each_image_of_an_item_runs_by_itself_under_the_items_text(wan, generator, encode, tokens):
    """Three images per item, the third the same for all; under texts that differ and under one."""
    texts, runs, draw = "make it warm\nmake it cold", [], torch.Generator().manual_seed(7)
    further = {
        "image2": torch.rand(2, 48, 48, 3, generator=draw),
        "image3": torch.rand(1, 32, 90, 3, generator=draw),
    }
    rows = [IMAGES[:2], further["image2"], further["image3"].expand(2, -1, -1, -1)]
    alone = [tokens(generator, texts, row, **wan.inputs) for row in rows]
    handle = wan.network.register_forward_hook(lambda *_: runs.append(1))
    found = encode(generator, texts, IMAGES[:2], **wan.inputs, **further)
    differing = len(runs)
    encode(generator, "make it warm", IMAGES[:2], **wan.inputs, **further)
    handle.remove()
    assert [t.shape[1] for t in alone] == [15, 16, 14]
    assert found.parts[PART].shape[1] == 15 + 16 + 14
    assert gap(torch.cat(alone, dim=1), found.parts[PART]) < 1e-5
    # one image for all items runs under the text of each, once where it is the same
    assert gap(alone[2][0], alone[2][1]) > 1e-3
    # each with its text and without
    assert [differing, len(runs) - differing] == [12, 10]
    assert found.origin["images"] == 3


def test_the_model_runs_under_a_conditioning_in_place_of_clip(call, encode, tokens, folder):
    """Texts as other nodes give them, in a batch of two with pooled outputs, against the CLIP's own."""
    made, one = models()["SD3"](), IMAGES[:1].expand(2, -1, -1, -1)
    generator, texts = made.generator(folder), ["make it warm", "make it cold"]
    entries = [made.clip.encode_from_tokens_scheduled(made.clip.tokenize(t))[0] for t in texts]
    pooled = torch.cat([options["pooled_output"] for _, options in entries])
    given = [[torch.cat([text for text, _ in entries]), {"pooled_output": pooled}]]
    without = {name: value for name, value in made.inputs.items() if name != "clip"}

    def at(conditioning: Any) -> Any:
        return encode(generator, "", one, conditioning=conditioning, **without)

    wanted = tokens(generator, "\n".join(texts), one, **made.inputs)
    found, first = at(given), at([list(entries[0])])
    assert gap(wanted, found.parts[PART]) < 1e-6
    assert gap(found.parts[PART][0], found.parts[PART][1]) > 1e-3
    assert gap(wanted[:1].expand(2, -1, -1), first.parts[PART]) < 1e-6
    # it acts at every noise level, and no image is beside it
    latents = {"reference_latents": [torch.ones(1, 16, 4, 4)], "end_percent": 0.5}
    busy = [[given[0][0], {"pooled_output": pooled, **latents}], *given]
    assert gap(wanted, at(busy).parts[PART]) < 1e-6
    report = call.report("HYWUConditionEncode", generator, one, "", conditioning=busy, **without)
    assert report["warnings"] == [
        "Of the conditioning's 2 entries the first is read.",
        "Of the conditioning only the text is read, not end_percent, reference_latents.",
    ]
    other = at([[given[0][0], {"pooled_output": pooled + 1}]])
    assert gap(wanted, other.parts[PART]) > 1e-3
    assert len({c.fingerprint for c in (found, first, other)}) == 3
    assert found.fingerprint == at(given).fingerprint


# -- trained -----------------------------------------------------------------------------------------

WIDGETS: dict[str, Any] = {
    "pairs": "hidden_colour", "generator_size": "XS", "rank": 2, "steps": 4, "batch_size": 4,
    "accumulation": 1, "learning_rate": 1e-3, "image_size": SIDE, "crops": 1, "source_input": "both",
    "precision": "auto", "checkpointing": False, "sample_every": 0, "sample_steps": 2, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize(("reads", "count"), [("model", 3), ("model and encoders", 1)])
def test_a_generator_is_trained_on_them_and_used(
    call, base, wan, encode, tokens, warnings, folder, reads, count
):
    """Trained, loaded, encoded, generated, applied, sampled; with references where `count` is 3."""
    pairs = "hidden_references" if count > 1 else "hidden_colour"
    training_models.make_pairs(base / "input" / pairs, references=count - 1)
    before, name = frozen_digest(wan.model.model), "hidden_" + reads.replace(" ", "_")
    seeing = training_models.clip_vision(folder)
    trained = call.HYWUTrainGenerator(
        wan.model, wan.vae, wan.clip, clip_vision=seeing, reads=reads,
        **{**WIDGETS, "name": name, "pairs": pairs},
    )  # fmt: skip
    report = json.loads(trained[1])
    assert frozen_digest(wan.model.model) == before
    assert report["pictures_each"] == count
    assert all(0 < report[f"loss_{part}_tenth"] < 10 for part in ("first", "last"))
    assert report.get("note") is None
    assert list((files.run_folder(name) / "cache").glob("*.safetensors"))
    generator = call.HYWULoadGenerator(f"{name}.safetensors", "auto")[0]
    more = {"vision": 32, "text": 4096} if "encoders" in reads else {}
    assert dict(generator.config.condition) == {PART: 256, **more}
    identity = generator.config.encoder
    assert (identity["model"]["layer"], identity["model"]["pixels"]) == ("blocks.1", 64)
    assert identity.get("images", 1) == count
    # the condition of a training's crop is that of Condition Encode for the same image
    crop = FixedCrops(files.training_pairs(pairs)[0], 1, SIDE, 1, 0).batch([0])
    references = crop.references[0] if crop.references else ()
    encoder = CachedEncoder(
        wan.model, wan.clip, None, TensorCache(files.run_folder(name) / "cache"), "model", wan.vae,
        SIDE, images=count,
    )  # fmt: skip
    kept = encoder.condition(crop.source, crop.instruction[0], references).parts[PART]
    inputs = {**wan.inputs, "clip_vision": seeing}
    rows = {f"image{i}": p.movedim(0, -1)[None] for i, p in enumerate(references, 2)}
    source = crop.source.movedim(1, -1)
    assert gap(kept, tokens(generator, crop.instruction[0], source, **inputs, **rows)) < 1e-4
    # and its LoRAs act
    further = {"image2": IMAGES[1:2], "image3": IMAGES[2:, :20]} if count > 1 else {}
    image = IMAGES[:1, :48, :48]
    assert warnings(generator, "make it warm", image, **inputs, **further) == []
    loras = [
        call.HYWUGenerateLoRA(generator, encode(generator, text, image, **inputs, **further))[0]
        for text in ("make it warm", "make it cold")
    ]
    assert max(float((loras[0][p].B - loras[1][p].B).abs().max()) for p in loras[0]) > 1e-6
    sample = architectures.sampler("Wan 2.1", stock.common_ksampler)
    plain = sample(wan.model)
    applied = call.HYWUApplyLoRA(wan.model, loras[0], 1.0, "unmerged")[0]
    assert float((sample(applied) - plain).abs().max()) > 1e-5
