"""Controls, gradient cosines and intervals of the conflict experiment, on the toy base."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy_base as toy

from hywu_core.errors import HYWUError
from hywu_core.experiments.conflict.analysis import (
    bootstrap,
    cosine_matrix,
    paired_bootstrap,
    task_gradients,
)
from hywu_core.experiments.conflict.evaluate import MeanChange, changed, derangement
from hywu_core.injection import inject, merge, unmerge


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A generator that tells brighten from darken; the tests leave the base as it was."""
    trainer = toy.make_trainer(tmp_path_factory.mktemp("trained"), steps=60, lr=1e-2)
    trainer.run()
    return trainer


def test_derangement_moves_every_item():
    for count in (2, 3, 24):
        order = derangement(count, seed=count)
        assert sorted(order) == list(range(count))
        assert all(i != j for i, j in enumerate(order))
    with pytest.raises(HYWUError, match="among 1"):
        derangement(1)


@torch.no_grad()
def test_mean_change_of_one_lora_equals_its_merge(trained):
    base, batch = trained.base, toy.batches(5)
    lora = trained.strategy.generate(base.encode(batch.source, batch.instruction)).select(0)
    mean = MeanChange()
    mean.add(lora)
    with changed(base.module, mean.mean()) as module:
        ours = base.edit(module, batch, 0)
    merged = merge(base.module, lora)
    assert torch.allclose(ours, base.edit(base.module, batch, 0), atol=1e-6)
    unmerge(merged)


@torch.no_grad()
def test_mean_change_is_the_mean_of_products_and_is_undone(trained):
    base, batch = trained.base, toy.batches(5)
    lora = trained.strategy.generate(base.encode(batch.source, batch.instruction))
    mean = MeanChange()
    mean.add(lora.select([0, 1, 2]))
    mean.add(lora.select([3, 4, 5, 6, 7]))
    path, (a, b) = next(iter(lora.items()))
    products = torch.stack([lora.scale * b[i] @ a[i] for i in range(8)])
    assert torch.allclose(mean.mean()[path], products.mean(0), atol=1e-6)
    before = {k: v.clone() for k, v in base.module.state_dict().items()}
    with pytest.raises(RuntimeError), changed(base.module, mean.mean()):
        raise RuntimeError
    assert all(torch.equal(v, before[k]) for k, v in base.module.state_dict().items())


@torch.no_grad()
def test_shuffled_conditions_and_the_mean_are_worse(trained):
    base, batch = trained.base, toy.batches(7)
    condition = base.encode(batch.source, batch.instruction)

    def error(edits):
        return float((edits - batch.target).square().mean())

    lora = trained.strategy.generate(condition)
    with inject(base.module, lora) as module:
        own = error(base.edit(module, batch, 0))
    # moved by one, every item gets the LoRA of the opposite task
    with inject(base.module, lora.select([*range(1, 8), 0])) as module:
        shuffled = error(base.edit(module, batch, 0))
    mean = MeanChange()
    mean.add(lora)
    with changed(base.module, mean.mean()) as module:
        averaged = error(base.edit(module, batch, 0))
    assert own < averaged < shuffled


def test_opposite_tasks_have_opposed_gradients():
    base = toy.ToyBase()
    strategy = toy.make_strategy(base, "shared")
    batch = toy.batches(3)
    tasks = {
        task: batch.select([i for i, t in enumerate(batch.task) if t == task])
        for task in ("brighten", "darken")
    }
    before = {k: v.clone() for k, v in strategy.trained.state_dict().items()}
    matrix = cosine_matrix(task_gradients(base, strategy, tasks))
    assert torch.allclose(matrix.diagonal(), torch.ones(2), atol=1e-5)
    same = cosine_matrix(task_gradients(base, strategy, {"a": batch, "b": batch}))
    assert matrix[0, 1] < same[0, 1] == pytest.approx(1.0, abs=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in strategy.trained.state_dict().items())
    assert all(p.grad is None for p in strategy.trained.parameters())


def test_interval_is_over_photographs_not_crops():
    rng = np.random.default_rng(0)
    photos = {f"p{i}": [value] for i, value in enumerate(rng.normal(2, 1, 30))}
    repeated = {name: values * 50 for name, values in photos.items()}
    assert bootstrap(photos) == pytest.approx(bootstrap(repeated))
    interval = bootstrap(photos)
    assert interval.low < interval.mean < interval.high
    # about the normal interval of a mean of 30
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 30**0.5, rel=0.35)


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(1)
    level = rng.normal(25, 6, 40)
    one = {f"p{i}": [v + 1.0, v + 1.2] for i, v in enumerate(level)}
    two = {f"p{i}": [v, v] for i, v in enumerate(level)}
    interval = paired_bootstrap(one, two)
    assert interval.mean == pytest.approx(1.1)
    assert interval.high - interval.low < 1e-9
    with pytest.raises(HYWUError, match="p0"):
        paired_bootstrap({k: v for k, v in one.items() if k != "p0"}, two)
    with pytest.raises(HYWUError, match="not finite for p1"):
        bootstrap({"p0": [1.0], "p1": [float("nan")]})
