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


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", "connect clip_vision"),
        ("width", "connect the encoder that it was trained with"),
        ("part", "which no encoder of a graph makes"),
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
    return run_inside("transformers_figures.py", tmp_path_factory.mktemp("standalone"), threads=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_transformers_give_what_the_graph_gives(standalone, family):
    """Parts, what counts of them, and every value, for pictures that are neither square nor small."""
    figures = standalone[family]
    assert figures["shapes"][0] == figures["shapes"][1]
    assert FAMILIES[family] in (None, figures["shapes"][0])
    assert figures["origins"] == ["comfyui", "comfyui"]
    assert figures["gap"] < 2e-5
    assert figures["varies"] > 0.1
