"""HunyuanImage-3's modules against the official code's values, one by one."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hunyuan_golden import BASE, GOLDEN, PARTS, Golden, distance, golden, pipeline, source

from hywu_core import GeneratedLoRA, inject
from hywu_core.bases.hunyuan_image3 import vision
from hywu_core.bases.hunyuan_image3.attention import Rows, Segment
from hywu_core.bases.hunyuan_image3.config import HunyuanConfig, VAEConfig
from hywu_core.bases.hunyuan_image3.editing import schedule
from hywu_core.bases.hunyuan_image3.images import buckets, nearest, to_pixels, vae_image
from hywu_core.bases.hunyuan_image3.model import HunyuanImage3
from hywu_core.bases.hunyuan_image3.rope import Grid, positions, rotation
from hywu_core.bases.hunyuan_image3.vae import VAE


@pytest.fixture(scope="module")
def parts() -> Golden:
    return golden("parts")


def grids(case: dict) -> list[Grid]:
    return [Grid(i["start"], i["height"], i["width"]) for i in case["images"]]


@pytest.mark.parametrize("case", ["text", "one_square", "odd", "joint", "adjacent"])
def test_positions_and_rotations(parts, case):
    metadata, config = parts.metadata["rope"][case], pipeline().config
    yx = positions(metadata["length"], grids(metadata))
    assert torch.equal(yx, parts[f"rope.{case}.positions_yx"].long())
    cos, sin = rotation(yx, config.head_dim, config.rope_theta)
    parts.check(f"rope.{case}.cos", cos)
    parts.check(f"rope.{case}.sin", sin)


def test_halves_of_a_centred_grid_are_cut_off():
    yx = positions(5 + 80 * 45, [Grid(5, 80, 45)])
    # 5 + (3600 - 80)/2 = 1765, 5 + (3600 - 45)/2 = 1782.5
    assert yx[5].tolist() == [1765, 1782]
    assert yx[-1].tolist() == [1765 + 79, 1782 + 44]


def test_time_embeddings_patches_and_head(parts):
    model = pipeline().model
    with torch.no_grad():
        for name in ("timestep_emb", "time_embed", "time_embed_2"):
            made = getattr(model, name)(parts["time.t"], torch.float32)
            parts.check(f"time.{name}", made)
        time = model.time_embed(parts["patch.t"], torch.float32)
        parts.check("patch.tokens", model.patch_embed(parts["patch.latent"], time))
        time = model.time_embed_2(parts["final.t"], torch.float32)
        size = (int(parts["final.height"]), int(parts["final.width"]))
        parts.check("final.prediction", model.final_layer(parts["final.hidden"], time, size))


def test_a_decoder_layer_stage_by_stage(parts):
    config, layer = pipeline().config, pipeline().model.model.layers[1]
    metadata = parts.metadata["layer"]
    turn = rotation(positions(34, grids(metadata)), config.head_dim, config.rope_theta)[:, None]
    bounds = [0, *(i for span in metadata["full_attention"] for i in span), 34]
    rows = Rows(
        tuple(Segment(a, b, bool(i % 2)) for i, (a, b) in enumerate(itertools.pairwise(bounds)))
    )
    x, normed, post = parts["layer.input"], parts["layer.normed"], parts["layer.post_normed"]
    with torch.no_grad():
        parts.check("layer.normed", layer.input_layernorm(x))
        for name, made in zip(
            ("query", "key", "value"), layer.self_attn.project(normed, turn), strict=True
        ):
            parts.check(f"layer.{name}", made)
        parts.check("layer.attention", layer.self_attn(normed, turn, [rows], None, 1))
        parts.check("layer.shared", layer.mlp.shared_mlp(post))
        weights, chosen = layer.mlp.gate(post[0])
        assert torch.equal(chosen, parts["layer.router_index"].long())
        parts.check("layer.router_weight", weights)
        items = torch.zeros(34, dtype=torch.int64)
        parts.check("layer.experts", layer.mlp.experts(post[0], weights, chosen, items)[None])
        parts.check("layer.output", layer(x, turn, [rows]))


def test_a_lora_on_the_experts(parts):
    layer, post = pipeline().model.model.layers[1], parts["layer.post_normed"]
    path = "model.layers.1.mlp.experts"
    pairs = {
        f"{path}.{w}": (parts[f"layer.lora.{w}.lora_A"], parts[f"layer.lora.{w}.lora_B"])
        for w in ("w1", "w2", "w3")
    }
    lora = GeneratedLoRA.from_pairs(pairs, alpha=6)  # rank 3, scale 2
    with torch.no_grad(), inject(pipeline().model, lora):
        weights, chosen = layer.mlp.gate(post[0])
        items = torch.zeros(34, dtype=torch.int64)
        made = layer.mlp.experts(post[0], weights, chosen, items)[None]
    parts.check("layer.experts_with_lora_scale_2", made)
    assert distance(made, parts["layer.experts"]) > 0.01


def test_vae(parts):
    vae = pipeline().vae
    with torch.no_grad():
        parts.check("vae.moments", vae.moments(parts["vae.pixels"].view(1, 3, 48, 64)))
        frames = vae.frames(parts["vae.latent"])
    parts.check("vae.decoded", frames[:, :, -1:])


def test_vision_tower_and_aligner(parts):
    encoder = pipeline().encode_source
    patches = vision.Patches(
        parts["vision.patches"][0], parts["vision.mask"][0], *parts["vision.shapes"][0].tolist()
    )
    with torch.no_grad():
        seen = vision.see(encoder.tower, [patches])
        parts.check("vision.last_hidden", seen)
        parts.check("vision.aligned", encoder.aligner(seen))


@pytest.mark.parametrize(("shift", "steps"), [(3, 5), (1, 4), (3, 50)])
def test_schedule(parts, shift, steps):
    sigmas = schedule(steps, shift)
    parts.check(f"schedule.shift_{shift}_steps_{steps}.sigmas", sigmas)
    parts.check(f"schedule.shift_{shift}_steps_{steps}.timesteps", 1000 * sigmas[:-1])


def test_buckets():
    metadata = json.loads((GOLDEN / "resolutions.json").read_text("utf-8"))
    assert [list(size) for size in buckets(metadata["base_size"])] == metadata["buckets"]
    for case in metadata["nearest"]:
        index = nearest(case["height"], case["width"], metadata["base_size"])
        assert (index, buckets(1024)[index][::-1]) == (case["index"], tuple(case["target_wh"]))


def test_images_as_the_encoders_read_them():
    edit, encoder = golden("edit"), pipeline().encode_source
    pixels, size = vae_image(source(), 256)
    assert (size.height, size.width, size.ratio) == (272, 240, 17)
    levels = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    assert torch.equal(edit.cut("image.0.vae_pixels_u8", levels), edit["image.0.vae_pixels_u8"])
    patches = vision.patches_of(source(), encoder.prompts.processor)
    assert [patches.height, patches.width] == edit["image.0.vit_shape"].tolist()
    assert torch.equal(
        edit.cut("image.0.vit_patches", patches.patches), edit["image.0.vit_patches"]
    )
    with torch.no_grad():
        edit.check("image.0.vae_moments", encoder.vae.moments(to_pixels(pixels)[None]))


def test_the_published_sizes():
    """Parameters of the published checkpoint, as its metadata state them."""
    data = json.loads((BASE / "config.json").read_text("utf-8"))
    data |= {
        "hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8,
        "attention_head_dim": 128, "moe_intermediate_size": 3072, "moe_topk": 8, "num_shared_expert": 1,
        "num_experts": 64, "vocab_size": 133120, "patch_embed_hidden_dim": 1024,
        "vae": data["vae"] | {
            "block_out_channels": [128, 256, 512, 1024, 1024], "layers_per_block": 2, "latent_channels": 32
        },
    }  # fmt: skip
    config = HunyuanConfig.from_json(data)
    with torch.device("meta"):
        model, vae = HunyuanImage3(config), VAE(config.vae)

    def millions(*modules) -> float:
        return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 1)

    layer = model.model.layers[0]
    assert millions(layer.mlp.experts) == 2415.9
    assert millions(layer) - 2415.9 == pytest.approx(80.0, abs=0.06)
    assert millions(model.model.wte) == 545.3
    assert millions(model.patch_embed) == 226.8
    assert millions(model.final_layer) == 60.1
    assert millions(model.timestep_emb, model.time_embed, model.time_embed_2) == 53.5
    assert (round(millions(vae.encoder)), round(millions(vae.decoder))) == (389, 871)


def test_shift_factor():
    data = json.loads((BASE / "config.json").read_text("utf-8"))["vae"]
    vae = VAE(VAEConfig.read(data | {"shift_factor": 0.25})).eval()
    pixels, noise = torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(1, 8, 1, 2, 2)
    with torch.no_grad():
        z = vae.moments(pixels)[:, :8, 0]
        latent = vae.sample(pixels, noise)
    assert distance(latent, (z - 0.25) * 0.562679178327931) <= PARTS
    assert distance(vae.unscaled(latent), z) <= PARTS
