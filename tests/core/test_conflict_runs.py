"""How the conflict experiment finds its learning rates and keeps its weights, on the toy base."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import toy_base as toy

from hywu_core.errors import HYWUError
from hywu_core.experiments.conflict import runs as module
from hywu_core.experiments.conflict.plan import ConflictPlan, GeneratorSize, Run
from hywu_core.experiments.conflict.runs import Runs
from hywu_core.experiments.images import ImagePool
from hywu_core.training.trainer import STATE, Trainer

PLAN = dataclasses.replace(
    ConflictPlan(), steps=3, batch_size=4, tasks=("darken", "brighten"), main_rank=2, ranks=(1, 2), tune_steps=6,
    generator=GeneratorSize(token_dim=8, d_model=16, head_dim=8),
)  # fmt: skip
SHARED = Run("shared", 2)


@pytest.fixture
def pool() -> ImagePool:
    generator = torch.Generator().manual_seed(0)
    return ImagePool.of([torch.randint(40, 200, (3, 40, 40), generator=generator).byte()])


@pytest.fixture
def make(pool, tmp_path):
    def runs(**changes) -> Runs:
        plan = dataclasses.replace(PLAN, **changes)
        return Runs(toy.ToyBase(), pool, plan, tmp_path, {"commit": "abc"}, "cpu")

    return runs


@pytest.fixture
def trainings(monkeypatch) -> list[Trainer]:
    """Every trainer that was run."""
    started, usual = [], Trainer.run

    def run(self, *args):
        started.append(self)
        return usual(self, *args)

    monkeypatch.setattr(Trainer, "run", run)
    return started


def rates(monkeypatch, *values: float) -> None:
    monkeypatch.setattr(module, "LEARNING_RATES", {"muon": {"shared": values, "hywu": values}})


def test_the_rate_with_the_lowest_loss_is_taken_and_kept(make, monkeypatch, trainings, tmp_path):
    # one that learns nothing, one that learns, one that leaves the range of numbers
    rates(monkeypatch, 1e-9, 1e-2, 1e30)
    assert make().learning_rate(SHARED) == 1e-2
    kept = {p.name: json.loads(p.read_text())["loss"] for p in (tmp_path / "tuning").glob("*.json")}
    assert kept["shared_r2_0.01.json"] < kept["shared_r2_1e-09.json"] < math.inf
    assert kept["shared_r2_1e+30.json"] == math.inf
    assert len(trainings) == 3
    assert make().learning_rate(SHARED) == 1e-2
    # other ranks take the rate of the main one
    assert make().learning_rate(Run("shared", 1)) == 1e-2
    assert len(trainings) == 3


def test_trials_of_another_plan_do_not_count(make, monkeypatch, trainings, tmp_path):
    rates(monkeypatch, 1e-3)
    make().learning_rate(SHARED)
    for state in (tmp_path / "tuning").glob("*/state.safetensors"):
        state.unlink()
    make(seed=1).learning_rate(SHARED)
    assert [t.config.seed for t in trainings] == [0, 1]


def test_a_trial_that_lacks_its_loss_is_made_again(make, monkeypatch, tmp_path):
    rates(monkeypatch, 1e-3)
    make().learning_rate(SHARED)
    (kept,) = (tmp_path / "tuning").glob("*.json")
    whole = json.loads(kept.read_text())
    for damaged in (
        {},
        *({**whole, "loss": loss} for loss in (None, "low", True, math.nan, 10**400)),
    ):
        kept.write_text(json.dumps(damaged))
        make().learning_rate(SHARED)
        assert json.loads(kept.read_text())["loss"] == pytest.approx(whole["loss"])


def test_without_trials_it_is_the_middle_rate(make, monkeypatch, trainings):
    rates(monkeypatch, 1e-3, 2e-3, 4e-3)
    assert make(tune_steps=0).learning_rate(SHARED) == 2e-3
    assert not trainings


def test_an_interrupted_trial_leaves_no_result(make, monkeypatch, tmp_path):
    rates(monkeypatch, 1e-3)

    def interrupted(self):
        self.interrupted = True
        return False

    monkeypatch.setattr(Trainer, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make().learning_rate(SHARED)
    assert not list((tmp_path / "tuning").glob("*.json"))


def test_other_errors_of_a_trial_are_not_taken_for_divergence(make, monkeypatch):
    rates(monkeypatch, 1e-3)
    runs = make()
    runs.base.draw = lambda batch, seed: (_ for _ in ()).throw(HYWUError("no such thing"))
    with pytest.raises(HYWUError, match="no such thing"):
        runs.learning_rate(SHARED)


def test_a_stopped_training_exports_nothing(make, monkeypatch, tmp_path):
    rates(monkeypatch, 1e-3)
    monkeypatch.setattr(Trainer, "run", lambda self: False)
    with pytest.raises(KeyboardInterrupt):
        make(tune_steps=0).train(SHARED)
    assert not (tmp_path / "weights").exists()


def test_a_finished_run_is_loaded_not_trained_again(make, monkeypatch, tmp_path):
    rates(monkeypatch, 1e-3)
    said = []
    first = make(tune_steps=0).train(Run("hywu", 2), said.append)
    assert said == ["hywu_r2: learning rate 0.001"]
    weights = tmp_path / "weights" / "hywu_r2.safetensors"
    before = weights.stat().st_mtime_ns
    monkeypatch.setattr(Trainer, "_train_step", None)  # a step would fail
    again = make(tune_steps=0).train(Run("hywu", 2))
    assert again.step == 3
    for name, value in first.average.values.items():
        assert torch.equal(value, again.average.values[name]), name
    assert weights.stat().st_mtime_ns == before


def test_exported_weights_alone_say_their_rate(make, monkeypatch, trainings, tmp_path):
    """Nothing is tried anew for a run that is done."""
    rates(monkeypatch, 3e-3)
    runs = make()
    runs.train(SHARED)
    (tmp_path / "runs" / SHARED.name / STATE).unlink()
    rates(monkeypatch, 1e-4, 1e-5)
    trainings.clear()
    assert make().train(SHARED).config.lr == 3e-3
    assert not trainings
