"""Pretraining: an interrupted run goes on to the weights of an uninterrupted one; the loss falls."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from PIL import Image

from hywu_core.bases.bundled.checkpoint import load_editor
from hywu_core.bases.bundled.transformer import TransformerConfig as EditorConfig
from hywu_core.bases.bundled.transformer import TransformerEditor as Editor
from hywu_core.cli import main
from hywu_core.cli import pretrain as pretrain_command
from hywu_core.errors import HYWUError
from hywu_core.experiments import pretraining as module
from hywu_core.experiments.images import ImagePool
from hywu_core.training.logs import read_log
from hywu_core.training.schedule import TrainConfig

CONFIG = TrainConfig(20, 8, 3e-3, warmup=2, ema=0.9, precision="no")


@pytest.fixture
def pool(tmp_path) -> ImagePool:
    picture = Image.radial_gradient("L").resize((128, 128))
    Image.merge("RGB", (picture, picture.rotate(90), Image.new("L", (128, 128), 90))).save(
        tmp_path / "a.png"
    )
    return ImagePool([tmp_path / "a.png"])


def make_editor() -> Editor:
    torch.manual_seed(0)
    editor = Editor(EditorConfig(width=32, depth=2, heads=2, text_depth=1, train_size=16))
    editor.reset_parameters()
    return editor


def test_a_resumed_run_ends_as_an_uninterrupted_one(pool, tmp_path, monkeypatch):
    assert module.pretrain(make_editor(), pool, CONFIG, tmp_path / "whole") == 20
    usual = module.PretrainingBatches.__call__

    def interrupted(self, step):
        if step == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(self, step)

    monkeypatch.setattr(module.PretrainingBatches, "__call__", interrupted)
    folder = tmp_path / "parts"
    # the step in progress is ended
    assert module.pretrain(make_editor(), pool, CONFIG, folder, save_every=5) == 12
    monkeypatch.setattr(module.PretrainingBatches, "__call__", usual)
    assert module.pretrain(make_editor(), pool, CONFIG, folder, save_every=5) == 20
    whole = load_editor(tmp_path / "whole" / module.WEIGHTS).state_dict()
    parts = load_editor(folder / module.WEIGHTS)
    assert parts.provenance["steps"] == 20
    for name, value in parts.state_dict().items():
        assert torch.equal(value, whole[name]), name
    assert [row["step"] for row in read_log(folder / "log.csv")] == list(range(1, 21))


def test_training_lowers_the_loss(pool, tmp_path):
    editor = make_editor()
    base, batches = module.Pretraining(editor), module.PretrainingBatches(pool, 8, 16)
    steps = [(batches(990 + i), base.draw(batches(990 + i), i)) for i in range(6)]

    @torch.no_grad()
    def loss() -> float:
        return sum(base.loss(editor, *step).mean().item() for step in steps)

    before = loss()
    module.pretrain(editor, pool, TrainConfig(25, 8, 3e-3, warmup=2), tmp_path / "run")
    assert loss() < 0.9 * before


def test_other_settings_are_refused(pool, tmp_path):
    module.pretrain(make_editor(), pool, TrainConfig(2, 4, 1e-3), tmp_path / "run")
    with pytest.raises(HYWUError, match=r"lr 0\.001 -> 0\.002"):
        module.pretrain(make_editor(), pool, TrainConfig(2, 4, 2e-3), tmp_path / "run")


def test_the_command_trains_says_where_and_goes_on(pool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_command, "split_files", lambda side: [tmp_path / "a.png"])
    monkeypatch.setattr(pretrain_command, "EditorConfig", lambda: make_editor().config)
    out = tmp_path / "out"
    command = ["pretrain", "--out", str(out), "--steps", "3", "--batch-size", "4",
               "--device", "cpu"]  # fmt: skip
    usual = module.PretrainingBatches.__call__

    def interrupted(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(self, step)

    monkeypatch.setattr(module.PretrainingBatches, "__call__", interrupted)
    assert main([*command, "--save-every", "1"]) == 130
    assert "interrupted after 2 steps; the same command goes on" in capsys.readouterr().out
    monkeypatch.setattr(module.PretrainingBatches, "__call__", usual)
    assert main([*command, "--commit", "abc"]) == 0
    assert f"{out / module.WEIGHTS}: 3 steps" in capsys.readouterr().out
    editor = load_editor(out / module.WEIGHTS)
    assert editor.provenance["steps"] == 3
    assert editor.provenance["commit"] == "abc"
    assert "identity" in editor.provenance["tasks"]
    with Image.open(out / "samples" / "step_000001.png") as grid:
        # source, target and edit of each task, at twice their size
        assert grid.size == (3 * 16 * 2, len(module.PRETRAINING) * 16 * 2)
    assert main([*command, "--lr", "0.5"]) == 1
    assert "other settings" in capsys.readouterr().err
