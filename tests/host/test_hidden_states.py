"""A MODEL's own hidden states as the condition: Condition Encode and Train Generator on models not ours."""

from __future__ import annotations

import pytest

#: Architecture -> the last of its blocks to run, its outputs' shape for three pictures of 80 x 48 pixels;
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


@pytest.fixture(scope="module")
def figures(run_inside, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hidden")
    return run_inside("hidden_state_figures.py", folder, threads=1, timeout=1500)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_block_gives_a_grid_of_the_images_tokens(figures, name):
    found, (layer, shape) = figures[name], ARCHITECTURES[name]
    assert found["layer"] == layer
    assert found["shape"] == [*shape[:2], 2 * shape[2]]
    assert found["width"] == {"hidden_states": 2 * shape[2]}
    assert found["hooks_left"] == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_image_and_instruction_change_it_and_nothing_else_does(figures, name):
    found = figures[name]
    assert found["again"] == 0
    assert found["item"] < 1e-5
    assert found["by_image"] > 1e-3
    assert found["by_text"] > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_instructions_differ_more_in_what_the_text_changes_than_in_the_states(figures, name):
    """In the states it is 0.3 to 26 % of the norm, for these random weights; in the changes 14 to 41 %."""
    found = figures[name]
    assert found["text_in_contrast"] > 0.1
    assert found["text_in_contrast"] > 1.3 * found["text_in_states"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_without_the_contrast_gets_the_states_alone(figures, name):
    assert figures[name]["without_contrast"] < 1e-6


@pytest.mark.parametrize(
    ("name", "place"),
    [
        # of the output's tensor, from, to, (frames, rows, columns)
        ("Flux", [0, 8, 23, [1, 5, 3]]),  # after 8 tokens of text
        ("HunyuanImage 2.1", [0, 0, 60, [1, 10, 6]]),  # before the text; after it in 0.33.0
        ("Qwen-Image", [1, 0, 15, [1, 5, 3]]),  # the block's second output
        ("Z-Image", [0, 32, 47, [1, 5, 3]]),  # text and image are padded to 32 tokens each
        ("SD3", [0, 0, 15, [1, 5, 3]]),  # the last block gives no text
        ("Wan 2.1", [0, 0, 15, [1, 5, 3]]),
        ("SD 1.5", [0, 0, 60, [1, 10, 6]]),
    ],
)
def test_the_images_tokens_are_told_apart(figures, name, place):
    found = figures[name]["place"][-1]
    if name == "HunyuanImage 2.1" and found[1]:
        place = [0, 8, 68, place[3]]
    assert found == place


def test_the_tokens_are_those_that_the_models_last_layer_gets(figures):
    assert figures["hand"] < 1e-6


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("base", "connect the base model that the generator was trained for"),
        ("layer", "which has no blocks.7"),
        ("vae", "connect vae."),
        ("clip", "connect clip (or conditioning)."),
        ("model", "connect model."),
        ("channels", "connect the model's own VAE"),
        ("origin", "made by the model's layer 'blocks.1'"),
        ("official", "which no encoder of a graph makes"),
    ],
)
def test_errors_say_what_to_connect(figures, case, words):
    assert words in figures["errors"][case]


def test_loras_on_the_model_act_and_are_said(figures):
    found = figures["lora"]
    assert found["quiet"] == []
    assert len(found["warned"]) == 1
    assert "LoRAs and patches" in found["warned"][0]
    assert found["effect"] > 1e-3
    assert found["unmerged"] < 1e-4
    # plain, and a print of its own for each strength and way of applying, the same when made again
    assert found["print_same"]
    assert found["prints"] == 4


def test_a_lora_merged_for_a_sibling_branch_is_not_seen(figures):
    found = figures["lora"]
    assert found["dirty_warned"] == []
    assert found["back"] < 1e-6
    assert found["print_back"]


def test_the_stop_button_works_between_pictures(figures):
    assert figures["stopped"] == "interrupted"


def test_each_picture_of_an_item_runs_by_itself_under_the_items_text(figures):
    found = figures["several"]
    assert found["lengths"] == [15 + 16 + 14, 15, 16, 14]
    assert found["gap"] < 1e-5
    # one picture for all items runs under the text of each, once where it is the same
    assert found["third_by_text"] > 1e-3
    # each with its text and without
    assert found["runs"] == [12, 10]
    assert found["images"] == 3


def test_the_model_runs_under_a_conditioning_in_place_of_clip(figures):
    found = figures["conditioning"]
    assert found["same"] < 1e-6
    assert found["differ"] > 1e-3
    assert found["for_all"] < 1e-6
    # it acts at every noise level, and no picture is beside it
    assert found["beside"] < 1e-6
    assert found["said"] == [
        "Of the conditioning's 2 entries the first is read.",
        "Of the conditioning only the text is read, not end_percent, reference_latents.",
    ]
    assert found["pooled"] > 1e-3
    assert found["prints"] == 3
    assert found["print_same"]


@pytest.mark.parametrize("reads", ["model", "model and encoders"])
def test_a_generator_is_trained_on_them_and_used(figures, reads):
    found = figures[reads]
    more = {"vision": 32, "text": 4096} if "encoders" in reads else {}
    assert found["parts"] == {"hidden_states": 256, **more}
    assert found["facts"]["layer"] == "blocks.1"
    assert found["facts"]["pixels"] == 64
    assert found["images"] == ([3, 3] if reads == "model" else [None, 1])
    assert all(0 < loss < 10 for loss in found["losses"])
    assert found["note"] is None
    assert found["warnings"] == []
    assert found["base_same"]
    assert found["cached"] > 0
    assert found["training_condition"] < 1e-4
    assert found["by_text"] > 1e-6
    assert found["effect"] > 1e-5
