"""`hywu eval own`: all steps on tiny weights, real photographs and real files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import make_editor, make_random

from hywu_core.bases.bundled.checkpoint import VARIABLE, editor_identity, load_editor
from hywu_core.bases.bundled.sampling import edit
from hywu_core.cli import main
from hywu_core.experiments import own as evaluation_own
from hywu_core.experiments.conflict import evaluate
from hywu_core.experiments.conflict.plan import ConflictPlan
from hywu_core.experiments.images import photographs
from hywu_core.experiments.tasks import CONFLICT, VERSION
from hywu_core.files import save_tensors
from hywu_core.formats import load_lora
from hywu_core.injection import inject

TASKS = ("blur", "deblur")
METHODS = ("hywu", "shared", "single", "sft", "base")
ITEMS = 3 * 2 * len(TASKS)  # images, crops, tasks


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Tiny bundled weights; two photographs and a drawing in place of all held-out images."""
    folder = make_random(tmp_path / "weights", TASKS)
    monkeypatch.setenv(VARIABLE, str(folder))
    chosen = {name: photographs()[name] for name in ("chelsea", "coffee")}
    drawing = torch.arange(200 * 200).reshape(1, 200, 200).expand(3, -1, -1) % 256
    chosen["drawing.png"] = drawing.to(torch.uint8)
    monkeypatch.setattr(evaluate, "held_out_images", lambda: chosen)
    return folder


@pytest.fixture
def experiment(tmp_path, weights):
    """The folder of an experiment with two tasks: its plan and its fine-tuned editor."""
    editor = load_editor(weights / "editor.safetensors")
    folder = tmp_path / "experiment"
    (folder / "weights").mkdir(parents=True)
    plan = {
        **ConflictPlan().to_json(),
        "tasks": TASKS,
        "crops": 2,
        "evaluation_size": 32,
        "sampling_steps": 1,
        "main_rank": 2,
    }
    stored = {"plan": plan, "editor": {"editor": editor_identity(editor)}, "tasks": VERSION}
    (folder / "plan.json").write_text(json.dumps(stored))
    torch.manual_seed(1)
    tensors = {n: v + 0.05 * torch.randn_like(v) for n, v in editor.state_dict().items()}
    save_tensors(folder / "weights" / "sft.safetensors", tensors, {"strategy": "sft"})
    return folder


def own(out: Path, *more: str) -> int:
    return main(["eval", "own", "--out", str(out), *more])


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def table(out: Path) -> dict[str, list[str]]:
    rows = json.loads((out / "own.json").read_text(encoding="utf-8"))["table"]["rows"]
    return {row[0]: row[1:] for row in rows}


def test_from_weights_to_the_table(experiment, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert own(out, "--experiment", str(experiment)) == 0
    items = {}
    for phrasing in ("seen", "held_out"):
        lines = (out / "items" / f"{phrasing}.jsonl").read_text(encoding="utf-8").splitlines()
        items[phrasing] = [json.loads(line) for line in lines]
        assert len(items[phrasing]) == ITEMS
        for method in METHODS:
            keys = {path.stem for path in (out / phrasing / method).glob("*.png")}
            assert keys == {row["key"] for row in items[phrasing]}
    for seen, held_out in zip(items["seen"], items["held_out"], strict=True):
        task = CONFLICT[seen["task"]]
        assert seen["instruction"] in task.seen
        assert held_out["instruction"] in task.held_out
        assert {**seen, "instruction": ""} == {**held_out, "instruction": ""}
    check_edits(out, weights, items["seen"][1])
    page = (out / "own.md").read_text(encoding="utf-8")
    for text in ("reference, version pixels-1", "synthetic", "32x32 pixels", "million parameters"):
        assert text in page
    assert "3 held-out images, of which 2 photographs" in page
    assert list(table(out)) == [
        "HY-WU", "Shared LoRA", "Single LoRA (one per task)", "SFT", "editor alone",
    ]  # fmt: skip
    for phrasing in ("seen", "held_out"):
        report = (out / f"report_{phrasing}.md").read_text(encoding="utf-8")
        assert all(f"{method}: {ITEMS} scored of {ITEMS} items" in report for method in METHODS)
        assert "data:image/jpeg" in (out / f"report_{phrasing}.html").read_text(encoding="utf-8")
    resumes(out, experiment, capsys)


def check_edits(out: Path, weights: Path, row: dict[str, str]) -> None:
    """An item's edits are those of the method's weights, on the source that lies there."""
    assert row["task"] == "deblur"
    results = {method: read(out / "seen" / method / f"{row['key']}.png") for method in METHODS}
    source = torch.from_numpy(read(out / "items" / row["source"])).permute(2, 0, 1)[None] / 255
    editor = load_editor(weights / "editor.safetensors")

    def edited() -> np.ndarray:
        image = edit(editor, source, [row["instruction"]], steps=1, seed=0)[0]
        return (image * 255).round().byte().permute(1, 2, 0).numpy()

    np.testing.assert_array_equal(results["base"], edited())
    with inject(editor, load_lora(weights / "single_deblur.safetensors")):
        np.testing.assert_array_equal(results["single"], edited())
    pairs = [(a, b) for a in METHODS for b in METHODS if a < b]
    assert all((results[a] != results[b]).any() for a, b in pairs)


def resumes(out: Path, experiment: Path, capsys) -> None:
    """What is there stays, and an image that is gone is made and judged again."""
    before = (out / "own.md").read_bytes()
    gone = next((out / "seen" / "single").glob("*.png"))
    pixels = gone.read_bytes()
    gone.unlink()
    capsys.readouterr()
    assert own(out, "--experiment", str(experiment)) == 0
    said = capsys.readouterr().out
    assert said.count(f"0 made, {ITEMS} kept, 0 failed") == 2 * len(METHODS) - 1
    assert f"1 made, {ITEMS - 1} kept, 0 failed" in said
    assert gone.read_bytes() == pixels
    assert (out / "own.md").read_bytes() == before


def test_the_target_is_five_and_the_source_one(experiment, tmp_path):
    out = tmp_path / "out"
    arguments = ("--experiment", str(experiment), "--methods", "hywu", "base")
    assert own(out, *arguments) == 0
    for phrasing in ("seen", "held_out"):
        lines = (out / "items" / f"{phrasing}.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, lines):
            for method, given in (("hywu", "target"), ("base", "source")):
                image = (out / "items" / row[given]).read_bytes()
                (out / phrasing / method / f"{row['key']}.png").write_bytes(image)
    assert own(out, *arguments) == 0
    five = "5.00 [5.00, 5.00]"
    same = "+0.00 [+0.00, +0.00]"
    assert table(out) == {
        "HY-WU": [five, "–", *["5.00"] * 4, five, same],
        "editor alone": [
            "1.00 [1.00, 1.00]", "-4.00 [-4.00, -4.00]", *["1.00"] * 4, "1.00 [1.00, 1.00]", same,
        ],
    }  # fmt: skip
    assert "SFT is left out" in (out / "own.md").read_text(encoding="utf-8")


def test_an_experiments_own_edits_are_judged(experiment, tmp_path):
    """Those that it was measured with in dB: no weights of the methods are needed, nor is anything edited."""
    for run in ("hywu_r2", "shared_r2", "single_blur_r2", "single_deblur_r2", "sft"):
        for number, phrasing in enumerate(("", ".held_out")):
            path = experiment / "edits" / f"{run}{phrasing}.safetensors"
            edits = torch.full((ITEMS, 3, 64, 64), 10 * len(run) + number, dtype=torch.uint8)
            edits[:, 0, 0, 0] = torch.arange(ITEMS)
            save_tensors(path, {"edits": edits}, {})
    out, more = tmp_path / "out", ("--methods", "single", "sft", "hywu")
    assert own(out, "--experiment", str(experiment), *more) == 0
    keys = [json.loads(x)["key"] for x in (out / "items" / "seen.jsonl").read_text().splitlines()]
    for number, key in enumerate(keys):
        for phrasing, added in (("seen", 0), ("held_out", 1)):
            task = f"single_{key.split('_')[-1]}_r2"
            for method, run in (("single", task), ("sft", "sft"), ("hywu", "hywu_r2")):
                image = read(out / phrasing / method / f"{key}.png")
                assert image[1, 1, 0] == 10 * len(run) + added
                assert image[0, 0, 0] == number
    manifest = json.loads((out / "seen" / "sft" / "hywu_run.json").read_text())
    assert manifest["editor"]["kind"] == "conflict"
    # results that were begun by editing go on so
    other = tmp_path / "other"
    (experiment / "edits" / "hywu_r2.safetensors").rename(tmp_path / "away.safetensors")
    assert own(other, "--experiment", str(experiment), "--methods", "hywu") == 0
    (tmp_path / "away.safetensors").rename(experiment / "edits" / "hywu_r2.safetensors")
    assert own(other, "--experiment", str(experiment), "--methods", "hywu") == 0
    manifest = json.loads((other / "seen" / "hywu" / "hywu_run.json").read_text())
    assert manifest["editor"]["kind"] == "bundled"


def test_an_experiment_on_other_tasks_is_refused(experiment, tmp_path, capsys):
    stored = json.loads((experiment / "plan.json").read_text())
    del stored["tasks"]
    (experiment / "plan.json").write_text(json.dumps(stored))
    assert own(tmp_path / "out", "--experiment", str(experiment)) == 1
    assert "tasks are of version 1" in capsys.readouterr().err


def test_intervals_are_over_photographs_not_crops(experiment, tmp_path):
    out = tmp_path / "out"
    arguments = ("--experiment", str(experiment), "--methods", "base")
    assert own(out, *arguments, "--images", "1") == 0
    # 4 items of a single photograph are one observation, which has no interval
    assert "[" not in table(out)["editor alone"][0]
    assert own(out, *arguments) == 1
    assert own(tmp_path / "more", *arguments, "--images", "2") == 0
    assert "[" in table(tmp_path / "more")["editor alone"][0]


def test_without_an_experiment_sft_is_left_out_and_said_so(weights, tmp_path, capsys, monkeypatch):
    smaller = partial(ConflictPlan, tasks=TASKS, crops=1, evaluation_size=32)
    monkeypatch.setattr(evaluation_own, "ConflictPlan", smaller)
    out = tmp_path / "out"
    assert own(out, "--images", "1") == 0
    said = capsys.readouterr().out
    assert "SFT is left out: --experiment DIR" in said
    assert sorted(p.name for p in (out / "seen").iterdir() if p.is_dir()) == [
        "base", "hywu", "shared", "single",
    ]  # fmt: skip
    assert own(out, "--images", "1", "--methods", "sft") == 1
    assert "--experiment" in capsys.readouterr().err


def test_weights_that_do_not_belong_together_are_refused(experiment, weights, tmp_path, capsys):
    path = experiment / "weights" / "sft.safetensors"
    arguments = ("--experiment", str(experiment), "--images", "1")
    other = make_editor(tmp_path / "wide.safetensors", width=16)
    save_tensors(path, dict(other.state_dict()), {"strategy": "sft"}, overwrite=True)
    assert own(tmp_path / "out", *arguments) == 1
    assert "was not made from this editor" in capsys.readouterr().err
    save_tensors(path, dict(other.state_dict()), {}, overwrite=True)
    assert own(tmp_path / "out", *arguments) == 1
    assert "not a fine-tuned editor" in capsys.readouterr().err
    make_editor(weights / "editor.safetensors", seed=3)
    assert own(tmp_path / "out", *arguments) == 1
    assert "the experiment was made with the editor" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_set_stopped_half_way_is_begun_anew_and_another_set_refused(
    experiment, tmp_path, capsys, monkeypatch
):
    out, arguments = tmp_path / "out", ("--experiment", str(experiment), "--methods", "base")
    count = 0

    def stops(image, path):
        nonlocal count
        count += 1
        if count > 5:
            raise KeyboardInterrupt
        write_image(image, path)

    write_image = evaluation_own.write_image
    monkeypatch.setattr(evaluation_own, "write_image", stops)
    assert own(out, *arguments) == 130
    assert not list((out / "items").glob("*.json*"))
    monkeypatch.setattr(evaluation_own, "write_image", write_image)
    assert own(out, *arguments) == 0
    assert len(list((out / "items" / "sources").iterdir())) == ITEMS
    assert own(out, *arguments, "--images", "2") == 1
    assert (
        "another set of items (max_images 0 and not 2); choose another --out"
        in capsys.readouterr().err
    )
