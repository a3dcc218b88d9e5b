"""Pretraining: an interrupted run goes on to the weights of an uninterrupted one; the loss falls."""

from __future__ import annotations

import signal
from collections import Counter

import pytest
import torch
from PIL import Image

from hywu_core.bases.bundled.checkpoint import load_editor
from hywu_core.bases.bundled.model import Editor, EditorConfig
from hywu_core.cli import main
from hywu_core.cli import pretrain as pretrain_command
from hywu_core.errors import HYWUError
from hywu_core.experiments import pretraining as module
from hywu_core.experiments.atlas import Atlas
from hywu_core.experiments.images import ImagePool
from hywu_core.training.logs import read_log
from hywu_core.training.schedule import TrainConfig

CONFIG = TrainConfig(12, 6, 3e-3, warmup=2, ema=0.9, optimizer="muon")
TINY = EditorConfig(
    widths=(4, 8, 8), encode=(0, 1, 0), decode=(1, 1, 1), steer=8, text_width=16, text_heads=2,
    text_depth=1, buckets=256,
)  # fmt: skip
STAGE = module.Stage("small", "log", size=32)


@pytest.fixture
def pool(tmp_path) -> ImagePool:
    image = Image.radial_gradient("L").resize((128, 128))
    Image.merge("RGB", (image, image.rotate(90), Image.new("L", (128, 128), 90))).save(
        tmp_path / "a.png"
    )
    return ImagePool([tmp_path / "a.png"])


def make_editor() -> Editor:
    torch.manual_seed(0)
    editor = Editor(TINY)
    editor.reset_parameters()
    return editor


def interrupting(monkeypatch, at: int) -> None:
    """SIGINT while the examples of step `at` are made."""
    usual = module.PretrainingBatches.__call__

    def call(self, step):
        if step == at:
            monkeypatch.setattr(module.PretrainingBatches, "__call__", usual)
            signal.raise_signal(signal.SIGINT)
        return usual(self, step)

    monkeypatch.setattr(module.PretrainingBatches, "__call__", call)


def test_a_resumed_run_ends_as_an_uninterrupted_one(pool, tmp_path, monkeypatch):
    assert module.pretrain(make_editor(), pool, CONFIG, tmp_path / "whole", STAGE).step == 12
    interrupting(monkeypatch, at=7)
    folder = tmp_path / "parts"
    assert module.pretrain(make_editor(), pool, CONFIG, folder, STAGE).step == 8
    trainer = module.pretrain(make_editor(), pool, CONFIG, folder, STAGE, commit="abc")
    assert (trainer.step, trainer.interrupted) == (12, False)
    whole = load_editor(tmp_path / "whole" / module.WEIGHTS).state_dict()
    parts = load_editor(folder / module.WEIGHTS)
    assert parts.provenance["steps"] == 12
    assert parts.provenance["commit"] == "abc"
    assert "shake" in parts.provenance["tasks"]
    for name, value in parts.state_dict().items():
        assert torch.equal(value, whole[name]), name
    assert [row["step"] for row in read_log(folder / "log.csv")] == list(range(1, 13))


def test_training_lowers_the_loss(pool, tmp_path):
    batches = module.PretrainingBatches(pool, 12, 32, seed=9)
    base = module.PretrainingBase(make_editor(), error="mse")

    @torch.no_grad()
    def loss(editor) -> float:
        examples = [batches(i) for i in range(6)]
        return sum(base.loss(editor, b, base.draw(b, 1)).mean().item() for b in examples)

    before = loss(make_editor())
    config = TrainConfig(100, 12, 1e-2, warmup=2, ema=0.9, optimizer="muon")
    module.pretrain(
        make_editor(), pool, config, tmp_path / "run", module.Stage("s", "mse", size=32)
    )
    assert loss(load_editor(tmp_path / "run" / module.WEIGHTS)) < 0.9 * before


def test_unknown_requests_leave_every_kind_of_image_alone(pool):
    batches = module.PretrainingBatches(pool, 400, 16)
    batch = batches(0)
    counts = Counter(batch.task)
    assert 0.03 < counts[module.UNKNOWN] / 400 < 0.1
    assert counts["identity"] < counts["shake"] + counts["median"]
    told = {text for task in module.PRETRAINING.values() for text in task.phrasings}
    for i, task in enumerate(batch.task):
        same = torch.equal(batch.source[i], batch.target[i])
        assert same or task != module.UNKNOWN
        assert task != module.UNKNOWN or batch.instruction[i] not in told
    assert torch.equal(batches(3).source, batches(3).source)
    assert batches(3).instruction == batches(3).instruction


def test_other_settings_are_refused(pool, tmp_path):
    small = TrainConfig(2, 4, 1e-3, optimizer="muon")
    module.pretrain(make_editor(), pool, small, tmp_path / "run", STAGE)
    other = TrainConfig(2, 4, 2e-3, optimizer="muon")
    with pytest.raises(HYWUError, match=r"lr 0\.001 -> 0\.002"):
        module.pretrain(make_editor(), pool, other, tmp_path / "run", STAGE)


def test_crops_of_an_atlas_are_trained_on_as_those_of_a_pool(pool):
    batches = [module.PretrainingBatches(p, 4, 32, 3) for p in (pool, Atlas(pool.images, "cpu"))]
    for step in range(3):
        ordinary, made = (b(step) for b in batches)
        assert made.source.shape == ordinary.source.shape
        assert made.source.isfinite().all()
        assert made.instruction == batches[1](step).instruction
        assert torch.equal(made.target, batches[1](step).target)


def test_the_command_goes_through_its_stages_and_on(pool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_command, "split_files", lambda side: [tmp_path / "a.png"])
    monkeypatch.setattr(pretrain_command, "EditorConfig", lambda: TINY)
    out = tmp_path / "out"
    command = [
        "pretrain", "--out", str(out), "--first-steps", "2", "--steps", "3", "--fine-steps", "0", "--last-steps", "1",
        "--batch-size", "3", "--save-every", "1",
    ]  # fmt: skip
    interrupting(monkeypatch, at=1)
    assert main(command) == 130
    assert "first: stopped after 2 of 2 steps; the same command goes on" in capsys.readouterr().out
    assert main([*command, "--commit", "abc"]) == 0
    assert "2 steps first, 3 steps main, 0 steps fine, 1 steps last" in capsys.readouterr().out
    editor = load_editor(out / module.WEIGHTS)
    assert editor.provenance["steps"] == 1
    assert editor.provenance["stage"]["name"] == "last"
    assert editor.provenance["commit"] == "abc"
    last = load_editor(out / "last" / module.WEIGHTS)
    assert torch.equal(editor.time1.weight, last.time1.weight)
    assert main([*command, "--lr", "0.5"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_half_of_the_draws_are_where_sampling_starts(pool):
    base = module.PretrainingBase(make_editor())
    batch = module.PretrainingBatches(pool, 60, 16)(0)
    t = base.draw(batch, 3)["t"]
    assert 20 <= int((t == 1).sum()) <= 40
    assert 0 < t.min() < 0.5
    assert torch.equal(t, base.draw(batch, 3)["t"])
    assert not torch.equal(t, base.draw(batch, 4)["t"])
