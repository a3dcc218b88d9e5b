"""Condition Encode with the encoders of a graph: a CLIP and a CLIP_VISION."""

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
