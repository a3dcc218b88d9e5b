"""Runs that former versions began go on with this one, to the figures that they would have given themselves.

`former_runs/` was made on a tiny editor: by commit 9222208 a `hywu train` stopped after 2 of 4 steps with what
its end gave, and the plan of a `hywu conflict`; by the commit before the conflict experiment was measured by
`hywu_core/evaluation` a `hywu conflict` on the present tasks with one run done and one half done, with the
rows and figures of the whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hywu_core.cli import main
from hywu_core.experiments import images as data
from hywu_core.experiments.conflict import degrees, evaluate, report
from hywu_core.experiments.conflict.plan import ConflictPlan, GeneratorSize
from hywu_core.files import read_header, read_tensors
from hywu_core.training.logs import read_log
from hywu_core.training.schedule import TrainConfig

FORMER = Path(__file__).with_name("former_runs")
PLAN = dataclasses.replace(
    ConflictPlan(), steps=3, sweep_steps=1, batch_size=4, tasks=("blur", "deblur"), main_rank=2,
    ranks=(2,), seeds=1,
    tune_steps=1, crop_size=32, evaluation_size=32, precision="no", sampling_steps=2,
    generator=GeneratorSize(token_dim=24, d_model=16, head_dim=8),
)  # fmt: skip
#: How far decibels and the SSIM may move: edits are made in bfloat16 where the CPU is good at it, and a LoRA's
#: product is rounded once together with the layer's since it is added in place there.
DECIBEL, SSIM = 5e-3, 1e-3


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def pixels(name: str) -> torch.Tensor:
    with Image.open(FORMER / f"{name}.png") as file:
        return torch.from_numpy(np.array(file)).permute(2, 0, 1)


def test_a_training_goes_on_to_the_weights_that_it_would_have_had(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FORMER / "train_shared", run)
    command = ["train", "--out", str(run), "--data", str(FORMER / "pairs.jsonl"), "--steps", "4",
               "--batch-size", "2", "--precision", "no", "--sample-every", "0",
               "--strategy", "shared", "--device", "cpu",
               "--editor", str(FORMER / "editor.safetensors")]  # fmt: skip
    assert main(command) == 0
    assert [row["step"] for row in read_log(run / "log.csv")] == [1, 2, 3, 4]
    found, _ = read_tensors(run / "weights.safetensors")
    wanted, _ = read_tensors(FORMER / "train_shared_expected.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-2)
    assert read_header(run / "state.safetensors")["identity"]["at_start"] == 0.5
    before = read_tensors(FORMER / "train_shared" / "state.safetensors")[0]
    after = read_tensors(run / "state.safetensors")[0]
    assert max(float((after[k] - before[k]).abs().max()) for k in before) > 1e-4


@pytest.fixture(scope="module")
def conflict(tmp_path_factory):
    """The half-done experiment's folder after the same command went on to the end."""
    out = tmp_path_factory.mktemp("former") / "conflict"
    shutil.copytree(FORMER / "conflict", out)
    images = {"coffee": "coffee", "camera": "camera", "drawing.png": "drawing"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConflictPlan, "quick", lambda: PLAN)
        patch.setattr(data, "split_files", lambda side: [FORMER / "train.png"])
        shown = {name: pixels(file) for name, file in images.items()}
        for module in (evaluate, degrees):
            patch.setattr(module, "held_out_images", lambda: shown)
        patch.setattr(degrees, "IMAGES", 1)
        patch.setattr(degrees, "SIZE", 40)
        patch.setattr(report, "photographs", lambda: {"coffee": None, "camera": None})
        command = ["conflict", "--quick", "--out", str(out), "--commit", "abc", "--device", "cpu",
                   "--editor", str(FORMER / "editor.safetensors")]  # fmt: skip
        assert main(command) == 0
    return out


def test_a_conflict_experiment_goes_on_to_the_same_rows(conflict):
    wanted = read(FORMER / "conflict_expected.json")["rows"]
    found = {path.name: read(path) for path in (conflict / "results").glob("*.json")}
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        assert_alike(found[name], rows, name)


def test_what_was_done_is_not_done_again(conflict):
    for name in ("weights/shared_r2.safetensors", "results/shared_r2.seen.json", "plan.json"):
        assert (conflict / name).read_bytes() == (FORMER / "conflict" / name).read_bytes(), name
    assert read_header(conflict / "runs" / "hywu_r2" / "state.safetensors")["step"] == 3
    assert [row["step"] for row in read_log(conflict / "runs" / "hywu_r2" / "log.csv")] == [1, 2, 3]


def test_its_report_has_the_same_figures(conflict):
    wanted, found = (
        read(FORMER / "conflict_expected.json")["figures"],
        read(conflict / "figures.json"),
    )
    found.pop("fixed_degrees")  # came later
    for run in found["trained"].values():
        run.pop("seconds")
    assert_alike({key: found[key] for key in wanted}, wanted, "figures")


def test_an_experiment_on_other_tasks_is_refused(tmp_path, capsys):
    shutil.copytree(FORMER / "conflict_other_tasks", tmp_path / "out")
    command = ["conflict", "--out", str(tmp_path / "out"), "--device", "cpu", "--precision", "no",
               "--editor", str(FORMER / "editor.safetensors")]  # fmt: skip
    assert main(command) == 1
    assert "tasks are of version 1, this program's of 2" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]


def assert_alike(found, wanted, where: str) -> None:
    """Equal structures whose numbers agree but for rounding."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_alike(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for i, value in enumerate(wanted):
            assert_alike(found[i], value, f"{where}[{i}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=SSIM if "ssim" in where else DECIBEL), where
    else:
        assert found == wanted, where


def test_settings_are_stored_as_ever():
    assert json.dumps(TrainConfig(7).to_json()) == (
        '{"steps": 7, "batch_size": 24, "lr": 0.0004, "warmup": 20, "final_lr": 0.02, '
        '"weight_decay": 0.0, "clip": 1.0, "ema": 0.98, "accumulation": 1, "precision": "no", '
        '"seed": 0, "optimizer": "adamw"}'
    )
    assert json.dumps(ConflictPlan().to_json()) == (
        '{"steps": 4000, "precision": "bf16", "optimizer": "muon", "error": "log", "at_start": 0.5, '
        '"written_steps": 600, "sweep_steps": 600, "seeds": 3, "seed_steps": 1000, "batch_size": 24, "tasks": ["blur", "deblur", '
        '"age", "restore", "darken", "brighten", "fog", "dehaze"], "main_rank": 4, "ranks": [1, 2, '
        '4, 8], "generator": {"token_dim": 192, "d_model": 384, "head_dim": 64, "num_blocks": 1, '
        '"lora_a_scale": 0.05, "lora_b_scale": 0.6}, "tune_steps": 120, "crop_size": 64, '
        '"crops": 1, "evaluation_size": 128, "sampling_steps": 4, "max_images": 0, "seed": 0}'
    )
