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
    assert report["memory_estimate_bytes"] > 24 * report["generator_weights"]
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
        ("steps", "steps 4 -> 3"),
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
        ("bundled", "The bundled editor reads one image per item, here are 3"),
    ],
)
def test_references_that_cannot_be_used_are_refused(references, case, words):
    assert words in references[case]


@pytest.fixture(scope="module")
def conflict(run_inside, tmp_path_factory) -> dict:
    arguments = ("conflict", 0, "encoders", "model")
    folder = tmp_path_factory.mktemp("conflict")
    return run_inside("train_figures.py", folder, *arguments, timeout=1500)


@pytest.mark.parametrize(("arm", "part"), [("encoders", "text"), ("model", "hidden_states")])
def test_two_contradictory_tasks(conflict, arm, part):
    """The excess loss of one static LoRA over one a task falls by at least half with a generator.

    It reads a text encoder's tokens, or nothing but the MODEL's own hidden states, of another picture
    than the one to be made: the instruction alone must tell the tasks apart.
    """
    assert list(conflict["parts"][arm]) == [part]
    assert conflict["excess_shared"] > 0.005, conflict
    assert conflict["falls_by"][arm] > 0.5, conflict


# -- sizes -------------------------------------------------------------------------------------------------

#: Size -> weights that a generator of its name may have.
SIZES = {"XS": (2e6, 4.2e6), "S": (16e6, 25e6), "M": (80e6, 120e6), "L": (320e6, 450e6)}


@pytest.fixture(scope="module")
def size_s(run_inside, tmp_path_factory) -> dict:
    return run_inside("train_figures.py", tmp_path_factory.mktemp("size"), "size", "S", timeout=900)


@pytest.mark.parametrize("model", ["tiny", "Wan 2.1 14B", "Flux", "SDXL"])
def test_a_size_is_what_its_name_says_for_a_tiny_model_and_for_real_ones(size_s, model):
    found = size_s["counts"][model]
    assert found.keys() == SIZES.keys()
    assert all(low < found[size] < high for size, (low, high) in SIZES.items()), found


def test_size_s_is_stopped_gone_on_with_loaded_and_generates(size_s):
    weights = size_s["weights"]
    assert SIZES["S"][0] < weights < SIZES["S"][1]
    assert size_s["interrupted"] == "interrupted"
    assert len(size_s["losses"]) == 3
    assert all(0 < loss < 10 for loss in size_s["losses"])
    # weights, average and two moments in float32; the checkpoint in float16
    assert 16 * weights < size_s["state_bytes"] < 16.1 * weights
    assert 2 * weights < size_s["checkpoint_bytes"] < 2.1 * weights
    assert size_s["modules"] == 20
    assert size_s["finite"]
    assert size_s["largest"] > 1e-4


def test_the_memory_estimate_is_about_what_a_training_takes(size_s):
    """The process also loads libraries at its first training, about 100 MB."""
    assert size_s["estimate"] >= 24 * size_s["weights"]
    assert 0.7 < size_s["measured"] / size_s["estimate"] < 1.4, size_s


def test_nothing_of_a_training_stays_in_memory(size_s):
    """Neither of one that was stopped nor of one that ended: a copy of the weights has 4 bytes a weight."""
    assert max(size_s["left"]) < size_s["weights"], size_s["left"]


def test_model_layout_takes_any_rank(size_s):
    """12 doesn't divide the generator's width."""
    assert SIZES["S"][0] < size_s["odd_rank"] < SIZES["S"][1]
