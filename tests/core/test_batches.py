"""Sources of training examples: equal shares of the tasks, one task's items of them, a user's pairs."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from PIL import Image

from hywu_core.errors import HYWUError
from hywu_core.experiments.images import ImagePool
from hywu_core.experiments.phrasings import CARRIERS, OBJECTS, WRITTEN
from hywu_core.experiments.tasks import CONFLICT, TaskBatches, get_task
from hywu_core.training.data import PairBatches
from hywu_core.training.pairs import read_pairs

TASKS = ("blur", "deblur", "darken", "brighten")


@pytest.fixture
def pool() -> ImagePool:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, 100, 120), generator=generator, dtype=torch.uint8)
    return ImagePool.of(list(images))


def test_every_task_has_an_equal_share(pool):
    batch = TaskBatches(pool, TASKS, 8, 32)(5)
    assert Counter(batch.task) == dict.fromkeys(TASKS, 2)
    assert batch.source.shape == (8, 3, 32, 32)


def test_a_step_is_a_function_of_seed_and_step(pool):
    one, two = TaskBatches(pool, TASKS, 8, 32, seed=1), TaskBatches(pool, TASKS, 8, 32, seed=1)
    assert torch.equal(one(3).source, two(3).source)
    assert one(3).instruction == two(3).instruction
    assert not torch.equal(one(3).source, one(4).source)
    assert not torch.equal(one(3).source, TaskBatches(pool, TASKS, 8, 32, seed=2)(3).source)


def test_one_task_sees_its_items_of_the_same_batches(pool):
    whole = TaskBatches(pool, TASKS, 8, 32)(7)
    alone = TaskBatches(pool, TASKS, 8, 32, only="darken")(7)
    items = [i for i, task in enumerate(whole.task) if task == "darken"]
    assert torch.equal(alone.source, whole.source[items])
    assert torch.equal(alone.target, whole.target[items])
    assert set(alone.task) == {"darken"}


def test_composed_phrasings_come_in_over_the_first_steps(pool):
    """At the start only the sentences that a task's list begins with, later all."""
    gradual, usual = (
        TaskBatches(pool, TASKS, 80, 32, written_steps=100),
        TaskBatches(pool, TASKS, 80, 32),
    )

    frames = ("{}", *CARRIERS)

    def written(batch) -> int:
        first = {
            t: {f.format(s) for f in frames for s in get_task(t).seen[:WRITTEN]} for t in TASKS
        }
        return sum(
            said in first[task] for said, task in zip(batch.instruction, batch.task, strict=True)
        )

    assert written(gradual(0)) == 80
    assert 80 > written(gradual(50)) > written(usual(50))
    assert gradual(100).instruction == usual(100).instruction


@pytest.mark.parametrize("task", CONFLICT)
def test_the_composed_phrasings_begin_after_the_written_ones(task):
    seen = get_task(task).seen
    assert seen[WRITTEN].split(" ", 1)[1] in OBJECTS
    assert len(seen) > 80


def test_uneven_shares_are_refused(pool):
    with pytest.raises(HYWUError, match="multiple of 4"):
        TaskBatches(pool, TASKS, 6, 32)


def test_pairs_are_cropped_at_one_place(tmp_path, write_pairs):
    batches = PairBatches(read_pairs(write_pairs(tmp_path, 3))[0], 2, 32)
    for step in range(4):
        batch = batches(step)
        assert batch.source.shape == (2, 3, 32, 32)
        assert torch.allclose(batch.source, 1 - batch.target, atol=1e-6)
    assert torch.equal(batches(2).source, batches(2).source)


def test_an_epoch_shows_each_pair_once(tmp_path, write_pairs):
    batches = PairBatches(read_pairs(write_pairs(tmp_path, 6))[0], 3, 32)
    for epoch in range(2):
        texts = [t for step in (2 * epoch, 2 * epoch + 1) for t in batches(step).instruction]
        assert sorted(texts) == sorted({f"negate {i}" for i in range(6)})


def test_references_are_whole_and_stay_with_their_pairs(tmp_path, write_pairs):
    path = write_pairs(tmp_path, 3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        for size in ((90, 10 + i), (6, 24)):
            name = f"further_{i}_{size[0]}.png"
            Image.new("RGB", size, (i, 0, 0)).save(tmp_path / name)
            row.setdefault("references", []).append(name)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    batch = PairBatches(read_pairs(path)[0], 3, 32)(1)
    for text, (wide, tall) in zip(batch.instruction, batch.references, strict=True):
        i = int(text.split()[1])
        zoom = 32 / (90 * (10 + i)) ** 0.5
        assert wide.shape == (3, round((10 + i) * zoom), round(90 * zoom))
        assert tall.shape == (3, 64, 16)
        assert torch.allclose(wide[0], torch.tensor(i / 255))
    assert batch.asked[2] is batch.references
    assert batch.select([2]).references == batch.references[2:]
    assert batch.to("cpu").references == batch.references
    rows[1]["references"].pop()
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(HYWUError, match=r"2 references and .*1.png has 1; give every row"):
        PairBatches(read_pairs(path)[0], 3, 32)


def test_without_references_a_base_is_asked_as_ever(tmp_path, write_pairs):
    batch = PairBatches(read_pairs(write_pairs(tmp_path, 2))[0], 2, 32)(0)
    assert (batch.references, batch.select([1]).references) == ((), ())
    assert batch.asked == (batch.source, batch.instruction)


def test_small_images_are_enlarged(tmp_path, write_pairs):
    pairs = read_pairs(write_pairs(tmp_path, 1, size=(20, 9)))[0]
    batch = PairBatches(pairs, 2, 32)(0)
    assert batch.source.shape == (2, 3, 32, 32)
    assert torch.isfinite(batch.source).all()
