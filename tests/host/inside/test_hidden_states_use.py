"""Condition Encode and Train Generator on a MODEL's own hidden states: sockets, LoRAs, texts, a whole training."""

from __future__ import annotations

import json
from typing import Any

import architectures
import comfy.model_management as mm
import pytest
import torch
import train_node
import training_models
from hidden_models import IMAGES, PART, SIDE, gap, models, small_vae
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.layout import LoRALayout
from hywu_nodes.hywu_core.lora import GeneratedLoRA
from hywu_nodes.hywu_core.training.base import frozen_digest
from hywu_nodes.nodes.host.cache import TensorCache
from hywu_nodes.nodes.host.encode import hidden_states
from hywu_nodes.nodes.host.train import files
from hywu_nodes.nodes.host.train.conditions import CachedEncoder
from hywu_nodes.nodes.host.train.data import FixedCrops

import nodes as stock

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")


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
        **{**train_node.WIDGETS, "name": name, "pairs": pairs},
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
