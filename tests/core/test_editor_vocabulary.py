"""The warning about instructions far from everything trained."""

from __future__ import annotations

import pytest

from hywu_core.bases.bundled.vocabulary import unknown_instruction
from hywu_core.experiments.tasks import CONFLICT

KNOWN = [(task.name, text) for task in CONFLICT.values() for text in task.seen]


@pytest.mark.parametrize(
    "text",
    [
        "please blur this photo", "Sharpen it a bit", "could you deblur the image", "restore the photo!",
        "increase brightness", "foggier", "make it look old", "it should look new",
    ],
)  # fmt: skip
def test_variants_of_what_was_trained_pass(text):
    assert unknown_instruction(text, KNOWN) == ""


@pytest.mark.parametrize(
    "text",
    [
        "add a dragon to the castle", "translate the sign into french",
        "replace the cat by a dog", "give him a beard and a top hat",
        "write a poem about spring", "remove the person", "", "add a red hat",
        "convert this to black and white",
        "we need to see much too much of everything",
    ],
)  # fmt: skip
def test_strange_requests_get_a_list_of_tasks(text):
    warning = unknown_instruction(text, KNOWN)
    assert "It knows:" in warning
    assert all(task in warning for task in CONFLICT)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("blur background", "background"), ("blur the background, please", "background"),
        ("sharpen only the face", "only"), ("darken the sky", "sky"), ("restore her eyes", "her"),
    ],
)  # fmt: skip
def test_a_part_of_the_image_is_warned_of(text, part):
    warning = unknown_instruction(text, KNOWN)
    assert f"can't keep to '{part}'" in warning
    assert "It knows" not in warning


@pytest.mark.parametrize(
    "text",
    ["deblur", "make it sharp", "unblur this", "sharpen this up", "sharpen", "too dark", "defog",
     "fix this old photo", "older", "brighten this up"],
)  # fmt: skip
def test_what_users_type_first_is_known(text):
    assert unknown_instruction(text, KNOWN) == ""


def test_no_phrasing_is_warned_of():
    told = [(name, text) for name, text in KNOWN if unknown_instruction(text, KNOWN)]
    assert told == []
    held = [text for task in CONFLICT.values() for text in task.held_out]
    assert [text for text in held if unknown_instruction(text, KNOWN)] == []
