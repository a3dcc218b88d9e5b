"""Apply Generated LoRA inside a real ComfyUI: merged, unmerged, per item, chained, refused."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def figures(run_inside):
    return run_inside("apply_figures.py", threads=2)


def test_merged_unmerged_and_stock_give_the_same(figures):
    assert figures["effect"] > 0.01
    assert figures["merge"] < 1e-4
    assert figures["stock"] < 1e-5


def test_each_image_of_a_batch_gets_its_own_lora(figures):
    assert figures["items"] < 1e-5


def test_two_in_a_row_add_up_and_the_model_that_went_in_is_unchanged(figures):
    assert figures["chain"] < 1e-4
    assert figures["untouched"] == 0


def test_the_negative_branch_can_be_left_alone(figures):
    assert figures["negative"] > 1e-3
    assert figures["cfg1"] == 0


def test_ranges_of_the_sampling_add_up_to_the_whole(figures):
    assert figures["scopes"]["early"] > 0.01
    assert figures["scopes"]["parts"] < 1e-6


def test_modules_have_strengths_of_their_own(figures):
    assert figures["scopes"]["masked"] < 1e-6
    assert figures["scopes"]["masked_merge"] < 1e-4


def test_several_generated_and_stock_loras_stack_in_any_order(figures):
    assert figures["scopes"]["several"] < 1e-4
    assert figures["scopes"]["siblings"] == 0


def test_a_hook_acts_on_its_conditioning_only_and_keyframes_on_it(figures):
    scopes = figures["scopes"]
    assert scopes["hook_effect"] > 0.01
    assert scopes["hook"] < 1e-4
    assert scopes["hook_two"] < 1e-4
    assert scopes["keyframes"] < 1e-4


def test_skipped_modules_are_counted(figures):
    assert figures["report"]["matched"] == 1
    assert figures["report"]["skipped_modules"] == ["elsewhere.0"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("nan", "finite number"),
        ("batch", "HY-WU Select LoRA"),
        ("latents", "2 images, but there are 3 LoRAs"),
        ("base", "4 x 4, the LoRA says 4 x 5"),
        ("range", "start_percent must be below end_percent"),
        ("line", "'blocks.0' is not 'pattern = number'"),
        ("idle", "'x*' matches none"),
        ("merged range", "Merged weights serve all steps"),
        ("hook batch", "HY-WU Select LoRA"),
        ("hook base", "none of its 1 modules"),
        ("nothing", "none of its 1 modules"),
    ],
)
def test_errors_say_what_disagrees(figures, case, words):
    assert words in figures["errors"][case]
