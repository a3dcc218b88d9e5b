"""Tasks: shapes and ranges, one distribution of sources for both directions, held-out phrasings."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch

from hywu_core.bases.bundled.vocabulary import COMMON
from hywu_core.errors import HYWUError
from hywu_core.experiments.phrasings import CARRIERS
from hywu_core.experiments.pretraining_tasks import RELATIVES, SPATIAL
from hywu_core.experiments.tasks import CONFLICT, PRETRAINING, TASKS, get_task, make_batch
from hywu_core.experiments.unknown_requests import unknown_request


@pytest.fixture(scope="module")
def clean() -> torch.Tensor:
    data = pytest.importorskip("skimage.data", reason="scikit-image is an optional dependency")
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float() / 255
    return torch.stack([photo[:, 40:104, 200:264], photo[:, 300:364, 300:364]])


@pytest.mark.parametrize("name", TASKS)
def test_pairs_are_images(clean, name):
    source, target = TASKS[name].make(clean, torch.Generator().manual_seed(0))
    for image in (source, target):
        assert image.shape == clean.shape
        assert image.min() >= 0
        assert image.max() <= 1
    assert torch.equal(source, target) == (name == "identity")


@pytest.mark.parametrize("name", CONFLICT)
def test_both_directions_start_from_the_same_sources(clean, name):
    pair = TASKS[name], TASKS[TASKS[name].opposite]
    assert pair[1].opposite == name
    first, second = (task.make(clean, torch.Generator().manual_seed(3)) for task in pair)
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1], atol=0.02)
    again = pair[0].make(clean, torch.Generator().manual_seed(4))
    assert not torch.equal(first[0], again[0]), "the degree of the source varies"


@pytest.mark.parametrize("name", TASKS)
def test_held_out_phrasings_share_no_template(name):
    task = TASKS[name]
    assert len(task.phrasings) >= (8 if name in CONFLICT else 6)
    assert len(set(task.phrasings)) == len(task.phrasings)

    def trigrams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return set(zip(words, words[1:], words[2:], strict=False))

    seen = set().union(*(trigrams(text) for text in task.seen))
    assert not any(trigrams(text) & seen for text in task.held_out)


def test_no_phrasing_has_two_meanings():
    texts = [text for task in TASKS.values() for text in task.phrasings]
    assert len(set(texts)) == len(texts)


def test_conflict_tasks_are_not_in_the_pretraining():
    assert not set(CONFLICT) & set(PRETRAINING)
    assert set(RELATIVES) == set(CONFLICT)
    assert set().union(*RELATIVES.values()) <= set(PRETRAINING)
    assert set(SPATIAL) < set(PRETRAINING)


#: In phrasings of the conflict pairs and elsewhere; they tell no task by themselves.
SHARED = frozenset(
    [
        "again",
        "away",
        "colour",
        "colours",
        "cover",
        "down",
        "fix",
        "increase",
        "low",
        "lower",
        "print",
        "reduce",
        "removed",
        "rid",
        "scene",
        "strong",
        "through",
        "undo",
        "without",
    ]
)


def words_of(texts) -> set[str]:
    return set(re.findall(r"[a-z]+", " ".join(texts))) - COMMON - SHARED


def test_the_base_reads_no_word_of_the_conflict_pairs():
    told = words_of(text for task in CONFLICT.values() for text in task.phrasings)
    assert {"blur", "sharpen", "fog", "scratches"} <= told
    pretrained = words_of(text for task in PRETRAINING.values() for text in task.phrasings)
    assert not told & pretrained
    generator = torch.Generator().manual_seed(0)
    asked = [unknown_request(generator) for _ in range(4000)]
    assert len(set(asked)) > 2000
    assert not told & words_of(asked)


def test_random_draws_are_the_seed_s(clean):
    for task in PRETRAINING.values():
        one, two = (task.make(clean, torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert torch.equal(one[0], clean) or torch.equal(one[1], clean), task.name


def test_a_batch_is_decided_by_its_seed(clean):
    images, names = clean.repeat(2, 1, 1, 1), ["blur", "warm", "deblur", "warm"]
    one, two = (make_batch(images, names, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one.source, two.source)
    assert one.instruction == two.instruction
    assert all(t in TASKS[n].seen for t, n in zip(one.instruction, names, strict=True))
    held = make_batch(images, names, torch.Generator().manual_seed(5), held_out=True)
    assert all(t in TASKS[n].held_out for t, n in zip(held.instruction, names, strict=True))


def test_carriers_stand_around_trained_phrasings(clean):
    images, names = clean.repeat(20, 1, 1, 1), ["blur", "deblur"] * 20
    batch = make_batch(images, names, torch.Generator().manual_seed(5), carriers=True)
    assert torch.equal(
        batch.source, make_batch(images, names, torch.Generator().manual_seed(5)).source
    )
    plain = 0
    for text, name in zip(batch.instruction, names, strict=True):
        assert any(phrase in text for phrase in TASKS[name].seen)
        plain += text in TASKS[name].seen
    assert 0 < plain < 25
    held = make_batch(images, names, torch.Generator().manual_seed(5), True, carriers=True)
    assert set(held.instruction) <= {t for n in names for t in TASKS[n].held_out}


def test_no_carrier_is_a_template_of_a_held_out_phrasing():
    for task in CONFLICT.values():
        for text in task.held_out:
            words = set(pairwise(text.split()))
            for carrier in CARRIERS:
                said = carrier.replace("{}", " ").split()
                assert not words & set(pairwise(said)), (carrier, text)


def test_an_unknown_task_is_explained():
    with pytest.raises(HYWUError, match=r"no task 'sing'.*identity"):
        get_task("sing")
