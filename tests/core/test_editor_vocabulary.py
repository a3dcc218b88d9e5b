"""The warning about instructions far from everything trained."""

from __future__ import annotations

import pytest

from hywu_core.bases.bundled.vocabulary import unknown_instruction
from hywu_core.experiments.tasks import TASKS

KNOWN = [(task.name, text) for task in TASKS.values() for text in task.seen]


@pytest.mark.parametrize(
    "text",
    [
        "please blur this photo", "make my picture warmer", "Sharpen it a bit",
        "could you deblur the image", "convert this to black and white", "restore the photo!",
        "do nothing", "increase brightness", "foggier", "make it look old", "it should look new",
    ],
)  # fmt: skip
def test_variants_of_what_was_trained_pass(text):
    assert unknown_instruction(text, KNOWN) == ""


@pytest.mark.parametrize(
    "text",
    [
        "add a dragon to the castle", "translate the sign into french",
        "replace the cat by a dog", "give him a beard and a top hat",
        "write a poem about spring", "remove the person", "",
        "we need to see much too much of everything",
    ],
)  # fmt: skip
def test_strange_requests_get_a_list_of_tasks(text):
    warning = unknown_instruction(text, KNOWN)
    assert "It knows:" in warning
    assert all(task in warning for task in TASKS)
