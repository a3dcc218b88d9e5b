"""HY-WU Train Generator on a MODEL that isn't ours: a tiny Wan of random weights, by the stock loader."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def wan(run_inside, tmp_path_factory) -> dict:
    return run_inside("train_figures.py", tmp_path_factory.mktemp("train"), "wan", timeout=1500)


def test_the_base_is_the_same_bit_by_bit(wan):
    assert wan["base_same"]
    assert wan["plain_same"]


def test_the_report_says_what_was_trained(wan):
    report = wan["report"]
    assert report["base"].startswith("WanModel-")
    assert "CONST" in report["sampling"]
    assert (report["pairs"], report["examples"], report["steps"]) == (8, 8, 4)
    assert 2e6 < report["generator_weights"] < 4e6
    assert report["memory_estimate_bytes"] > 20 * report["generator_weights"]
    assert wan["plot"] == [1, 360, 640, 3]
    # source, target and edit of two instructions' first pairs and two more
    assert wan["samples"] == [1, 4 * 68, 3 * 68, 3]


def test_the_checkpoint_reloads_and_reproduces(wan):
    assert wan["reload_same"]
    assert wan["again_same"]
    assert wan["finished_same"]
    assert wan["matched"]["skipped"] == 0
    assert wan["matched"]["matched"] == 20
    assert wan["effect"] > 1e-4


def test_an_interrupted_training_goes_on_to_the_same_weights(wan):
    assert wan["interrupted"] == "interrupted"
    assert wan["steps_before"] == 2
    assert wan["state_kept"]
    assert not wan["written_early"]
    assert wan["resumed_same"]


@pytest.mark.parametrize("kind", ["flow", "eps", "v_prediction"])
def test_the_loss_is_that_of_the_models_own_output(wan, kind):
    assert wan[f"loss_{kind}"] < 1e-3


def test_recomputed_layers_give_the_same_gradients(wan):
    assert wan["recomputed_runs"] == [1, 2]
    assert wan["recomputed_gradient"] > 1e-4
    assert wan["recomputed"] < 1e-4


def test_an_fp8_base_is_trained_through_in_bfloat16(wan):
    assert wan["fp8_weights"]
    assert wan["fp8_base_same"]
    assert wan["fp8_precision"] == "bf16"
    assert all(0 < loss < 10 for loss in wan["fp8_losses"])


def test_with_clip_vision_the_generator_sees_the_picture(wan):
    assert wan["seeing_parts"] == {"vision": 32, "text": 4096}
    assert wan["seeing_note"] is None
    assert "instruction only" in wan["report"]["note"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("outside", "lies outside"),
        ("above", "no such folder or .jsonl file inside"),
        ("empty", "no such folder or .jsonl file inside"),
        ("name", "name can't be used"),
        ("bundled", "choose another one"),
        ("foreign", "is not of this training"),
        ("other", "was started from another generator"),
        ("steps", "steps 4 -> 9"),
        ("memory", "takes at least"),
        ("step", "4 examples at once"),
        ("split", "can't be split evenly"),
        ("vae", "connect the model's own VAE"),
    ],
)
def test_errors_say_what_to_do(wan, case, words):
    assert words in wan[f"error_{case}"]


@pytest.fixture(scope="module")
def references(run_inside, weights, tmp_path_factory) -> dict:
    return run_inside(
        "train_figures.py", tmp_path_factory.mktemp("refs"), "references", timeout=900
    )


def test_a_generator_sees_the_references_of_its_pairs(references):
    assert references["parts"] == {"vision": 32, "text": 4096}
    assert references["images"] == 3
    assert references["report"]["pictures_each"] == 3
    assert references["report"]["skipped_rows"] == []
    assert references["again_same"]
    assert references["cache_kept"]


def test_condition_encode_gives_what_it_saw(references):
    found = references["condition"]
    # the crop, and both references with about as many pixels and their own proportions
    assert found["shapes"] == [[3, 64, 64], [3, 91, 45], [3, 78, 52]]
    assert found["same"] < 1e-5
    assert found["swapped"] > 1e-3
    assert found["first"] < 1e-5


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other", "was started from another list of pairs"),
        ("text only", "which a generator that reads the instruction only doesn't see"),
        ("uneven", "has 2 references and"),
        ("outside", "'../../secret.png' lies outside"),
        ("bundled", "The bundled editor reads one picture and the rows have references"),
    ],
)
def test_references_that_cannot_be_used_are_refused(references, case, words):
    assert words in references[case]


def test_two_contradictory_tasks(run_inside, tmp_path):
    """The excess loss of one static LoRA over one a task falls by at least half with a generator."""
    found = run_inside("train_figures.py", tmp_path, "conflict", timeout=1500)
    assert found["excess_shared"] > 0.005, found
    assert found["falls_by"] > 0.5, found
