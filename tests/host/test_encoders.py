"""Condition Encode with the encoders of a graph, a CLIP and a CLIP_VISION, and their likes without ComfyUI."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def figures(run_inside, weights, tmp_path_factory):
    return run_inside("encoder_figures.py", tmp_path_factory.mktemp("encoders"), threads=1)


def test_parts_come_from_their_encoders_in_the_generators_order(figures):
    assert list(figures["parts"]) == ["vision", "text"]
    # 28 pixels in patches of 14 and a class token
    assert figures["parts"]["vision"] == [2, 5, 32]
    assert figures["parts"]["text"][:2] == [2, 1 + len(["make", "all", "of", "it", "darker"])]


def test_an_item_of_a_batch_is_as_alone(figures):
    """Its shorter text is padded beside a longer one, which must change nothing."""
    assert figures["differ"] > 1e-3
    assert figures["item"] < 1e-5


def test_several_pictures_follow_one_another(figures):
    """Each picture's tokens are those of the picture alone, in the order of the inputs, which counts."""
    found = figures["several"]
    assert found["length"] == 3 * 5
    assert found["places"] == 0
    assert found["item"] < 1e-5
    assert found["shared"] == 0
    assert found["swapped"] > 1e-3
    # of every picture, its place and their number
    assert found["prints"] == 5
    assert found["origin"] == 3
    assert found["report"] == {"images": 2, "pictures_each": 3}


def test_another_number_of_pictures_than_in_the_training_is_said(figures):
    found = figures["several"]
    assert found["warned_1"] == [
        "The generator was trained with 3 images per item, here is 1; give as many as in the training."
    ]
    assert found["warned_3"] == []
    (warning,) = found["untrained_3"]
    assert "was trained with 1 image per item, here are 3" in warning


def test_a_conditioning_is_the_text_in_place_of_clip(figures):
    found = figures["conditioning"]
    # as what the CLIP gives for the instructions one by one
    assert found["same"]
    assert found["masked"] == [2, 6]
    assert found["alone"] == 0
    assert found["text"] == ["conditioning", "conditioning", "instruction"]
    assert found["unwritten"] == ["", ""]
    assert found["prints"] == 4
    assert found["warnings"] == []
    assert found["both"] == [
        "The conditioning is read as the text; clip and the instruction are not.",
        "Of the conditioning's 2 entries the first is read.",
        "Of the conditioning only the text is read, not reference_latents, strength.",
    ]
    assert found["both_same"]
    assert found["unread"] == ["The generator reads no text; the conditioning is not looked at."]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", "connect clip_vision"),
        ("text", "connect clip (or conditioning)."),
        ("width", "connect the encoder that it was trained with"),
        ("part", "which no encoder of a graph makes"),
        ("image2", "image2 has 3 images for 2 images; give one for all images, or one per image."),
        ("nothing", "The image3 is 0 x 8 x 8 x 3"),
        ("bundled", "The bundled editor reads one image per item, here are 2"),
        ("bundled text", "leave conditioning unconnected and write the instruction"),
        ("texts", "The conditioning holds 3 texts for 2 images; connect one that holds a single"),
        ("no text", "The conditioning is empty"),
        ("wide text", "The connected conditioning gives tokens 9 wide"),
        ("odd mask", "has 4 tokens and an attention mask (1, 3)"),
        ("no instruction", "The instruction is empty"),
    ],
)
def test_errors_say_what_to_connect(figures, case, words):
    assert words in figures[case]


# -- the same encoders without ComfyUI ------------------------------------------------------------

#: Family -> tokens and width of both conditions; texts' as many as count, of a short and a long one.
FAMILIES = {
    "clip_vision": [2, 5, 16],
    "siglip": [2, 4, 16],
    "dinov2": [2, 1370, 16],
    "clip_l": [4 * 77, 16],  # one window of the short text and three of the long one
    "clip_h": [4 * 77, 16],
    "clip_g": [4 * 77, 16],
    "t5 masked": None,
    "t5 padded": None,
    "umt5": [2 * 512, 16],
}


@pytest.fixture(scope="module")
def standalone(run_inside, tmp_path_factory):
    folder = tmp_path_factory.mktemp("standalone")
    return run_inside("transformers_figures.py", folder, threads=1, timeout=900)


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_transformers_give_what_the_graph_gives(standalone, family):
    """Parts, what counts of them, and every value, for pictures that are neither square nor small."""
    figures = standalone[family]
    assert figures["shapes"][0] == figures["shapes"][1]
    assert FAMILIES[family] in (None, figures["shapes"][0])
    assert figures["origins"] == ["comfyui", "comfyui"]
    assert figures["gap"] < 2e-5
    assert figures["varies"] > 0.1


@pytest.mark.parametrize("family", ["clip_vision", "siglip", "dinov2"])
def test_folders_see_several_pictures_as_the_graph_does(standalone, family):
    figures = standalone[family]
    batch, length, width = FAMILIES[family]
    assert figures["several_shapes"] == [[batch, 3 * length, width]] * 2
    assert figures["several_gap"] < 2e-5
    assert figures["first_same"]
    assert figures["images"] == [3, 3]
