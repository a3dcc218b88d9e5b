"""HY-WU Train Generator on a MODEL that isn't ours: a tiny Wan of random weights, by the stock loader."""

from __future__ import annotations

import json
from pathlib import Path

import architectures
import comfy.model_management as mm
import pytest
import torch
import training_models
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.generator.checkpoints import load_generator
from hywu_nodes.hywu_core.training.base import frozen_digest
from hywu_nodes.hywu_core.training.logs import read_log
from hywu_nodes.hywu_core.training.state import state_header
from hywu_nodes.nodes.host.train import files, session
from train_node import checkpoint, interrupt_at

import nodes as stock


@pytest.fixture(scope="module")
def trained(train, loaded):
    before = frozen_digest(loaded[0].model)
    outputs = train()
    assert frozen_digest(loaded[0].model) == before  # bit by bit
    return outputs


def tensors_equal(one: Path, two: Path) -> bool:
    a, b = (load_generator(path).state_dict() for path in (one, two))
    return all(torch.equal(a[key], b[key]) for key in a)


def test_the_report_says_what_was_trained(trained):
    _, text, plot, samples = trained
    report = json.loads(text)
    assert report["base"].startswith("WanModel-")
    assert "CONST" in report["sampling"]
    assert (report["pairs"], report["examples"], report["steps"]) == (8, 8, 4)
    assert 2e6 < report["generator_weights"] < 4e6
    assert report["memory_estimate_bytes"] > 16 * report["generator_weights"]
    assert "instruction only" in report["note"]
    assert list(plot.shape) == [1, 360, 640, 3]
    # source, target and edit of two instructions' first pairs and two more
    assert list(samples.shape) == [1, 4 * 68, 3 * 68, 3]


@torch.inference_mode()
def test_the_checkpoint_reloads_and_fits(call, loaded, trained):
    """The node's generator and the one that Load Generator loads write the same LoRA."""
    model, _, clip = loaded
    image = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0))
    again = call.HYWULoadGenerator("wan.safetensors", "auto")[0]
    one, two = (
        call.HYWUGenerateLoRA(made, call.HYWUConditionEncode(made, image, "make it warm", clip=clip)[0])[0]
        for made in (trained[0], again)
    )  # fmt: skip
    assert all(torch.equal(one[path].B, two[path].B) for path in one)
    report = call.report("HYWUApplyLoRA", model, one, 1.0, "merge")
    assert (report["matched"], report["skipped"]) == (20, 0)
    sample = architectures.sampler("Wan 2.1", stock.common_ksampler)
    plain = sample(model)
    assert (
        float((sample(call.HYWUApplyLoRA(model, one, 1.0, "unmerged")[0]) - plain).abs().max())
        > 1e-4
    )
    assert torch.equal(sample(model), plain)


def test_it_reproduces_and_a_finished_one_is_not_trained_again(train, trained):
    train(name="again")
    assert tensors_equal(checkpoint("again"), checkpoint("wan"))
    first, log = checkpoint("wan").read_bytes(), files.run_folder("wan") / "log.csv"
    rows = log.read_text()
    train()
    assert len(checkpoint("wan").read_bytes()) == len(first)
    assert log.read_text() == rows


def test_an_interrupted_training_goes_on_to_the_same_weights(train, trained):
    interrupt_at(2, lambda: train(name="stopped"))
    folder = files.run_folder("stopped")
    assert len(read_log(folder / "log.csv")) == 2
    assert (folder / "state.safetensors").is_file()
    assert not checkpoint("stopped").exists()
    train(name="stopped")
    assert tensors_equal(checkpoint("stopped"), checkpoint("wan"))


@pytest.mark.parametrize(
    "damaged", ["{}", '{"run": 3, "made_from": {}}', '{"run": "a", "made_from": []}']
)
def test_a_record_of_the_run_without_its_keys_is_named(train, trained, damaged):
    record = files.run_folder("wan") / "run.json"
    before = record.read_text()
    record.write_text(damaged)
    try:
        with pytest.raises(HYWUError, match="run.json: doesn't say which run this is"):
            train()
    finally:
        record.write_text(before)


def test_more_steps_than_before_go_on_where_it_ended(train, trained):
    train(name="longer")
    train(name="longer", steps=6)
    steps = [row["step"] for row in read_log(files.run_folder("longer") / "log.csv")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not tensors_equal(checkpoint("longer"), checkpoint("wan"))


def test_it_trains_with_the_recipe_of_the_bundled_weights(train, trained):
    """And a run that an older version began with AdamW goes on with AdamW, at its own rate."""
    train(name="recipe", learning_rate=0.0)
    state = files.run_folder("recipe") / "state.safetensors"
    config = state_header(state)["config"]
    assert (config["optimizer"], config["lr"]) == ("muon", 1.4e-3)
    assert state_header(files.run_folder("wan") / "state.safetensors")["config"]["lr"] == 1e-3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "OPTIMIZER", "adamw")
        interrupt_at(2, lambda: train(name="older", learning_rate=5e-4))
    older = files.run_folder("older") / "state.safetensors"
    assert state_header(older)["config"]["optimizer"] == "adamw"
    train(name="older", learning_rate=0.0)
    went_on = state_header(older)
    assert (went_on["config"]["optimizer"], went_on["config"]["lr"]) == ("adamw", 5e-4)
    assert len(read_log(files.run_folder("older") / "log.csv")) == 4


def test_an_fp8_base_is_trained_through_in_bfloat16_by_a_generator_that_sees(
    train, loaded, tmp_path
):
    """With recomputed layers; with clip_vision the generator sees the image."""
    seeing = training_models.clip_vision(tmp_path)
    with torch.inference_mode():
        fp8 = stock.UNETLoader().load_unet("Wan 2.1.safetensors", "fp8_e4m3fn")[0]
    before = frozen_digest(fp8.model)
    generator, text, *_ = train(
        on=(fp8, *loaded[1:]),
        name="fp8",
        clip_vision=seeing,
        precision="bfloat16",
        checkpointing=True,
    )
    report = json.loads(text)
    kinds = {value.dtype for value in fp8.model.diffusion_model.parameters()}
    assert torch.float8_e4m3fn in kinds
    assert frozen_digest(fp8.model) == before
    assert report["precision"] == "bf16"
    assert all(0 < report[f"loss_{part}_tenth"] < 10 for part in ("first", "last"))
    assert dict(generator.config.condition) == {"vision": 32, "text": 4096}
    assert report.get("note") is None


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widgets", "words"),
    [
        ({"pairs": "outside"}, "lies outside"),
        ({"pairs": "../output"}, "no such folder or .jsonl file inside"),
        ({"pairs": ""}, "no such folder or .jsonl file inside"),
        ({"name": "../x"}, "name can't be used"),
        ({"name": "bundled"}, "choose another one"),
        ({"name": "foreign"}, "is not of this training"),
        ({"rank": 4}, "was started from another generator"),
        ({"batch_size": 2}, "batch_size 4 -> 2"),
        ({"steps": 3}, "steps 4 -> 3"),
        ({"name": "split", "accumulation": 3}, "can't be split evenly"),
    ],
)
def test_settings_that_cannot_be_used(train, trained, base, widgets, words):
    outside = base / "input" / "outside"
    outside.mkdir(exist_ok=True)
    row = {"source": "../../secret.png", "target": "../../secret.png", "instruction": "x"}
    (outside / "pairs.jsonl").write_text(json.dumps(row))
    checkpoint("foreign").write_bytes(checkpoint("wan").read_bytes())
    with pytest.raises(HYWUError) as caught:
        train(**widgets)
    assert words in str(caught.value)


def test_a_vae_of_another_model(train, loaded):
    pixels = stock.VAELoader().load_vae("pixel_space")[0]
    with pytest.raises(HYWUError, match="connect the model's own VAE"):
        train(on=(loaded[0], pixels, loaded[2]), name="vae")


@pytest.mark.parametrize(
    ("function", "more", "words"),
    [
        ("get_total_memory", 0, "takes at least"),  # less than the weights need
        ("get_free_memory", 4 << 20, "4 examples at once"),  # less than a step needs
    ],
)
def test_a_machine_with_too_little_memory(train, trained, monkeypatch, function, more, words):
    size = 16 * json.loads(trained[1])["generator_weights"] + more
    monkeypatch.setattr(
        mm, function, lambda device=None, both=False, **_: (size, size) if both else size
    )
    with pytest.raises(HYWUError, match=words):
        train(name=function)
