"""`hywu conflict` from its command line: all of it on a tiny editor, parts of it, interrupted, reported."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_editor import random_editor

from hywu_core.bases.bundled.checkpoint import save_editor
from hywu_core.cli import main
from hywu_core.experiments import images as data
from hywu_core.experiments.conflict import degrees, evaluate, experiment, report, runs
from hywu_core.experiments.conflict.analysis import learning_curves
from hywu_core.experiments.conflict.plan import ConflictPlan, GeneratorSize
from hywu_core.files import read_header, read_tensors, save_tensors
from hywu_core.formats import load_lora
from hywu_core.generator.checkpoints import load_generator
from hywu_core.training.logs import FIELDS, Log

TASKS = ("blur", "deblur")
PLAN = dataclasses.replace(
    ConflictPlan(), steps=2, sweep_steps=1, batch_size=4, tasks=TASKS, main_rank=2, ranks=(1, 2),
    tune_steps=0, crop_size=32, evaluation_size=32, seeds=2, seed_steps=1,
    generator=GeneratorSize(token_dim=24, d_model=16, head_dim=8), sampling_steps=1,
)  # fmt: skip
#: The order in which the plan does them.
RUNS = ["hywu_r2", "shared_r2", "single_blur_r2", "single_deblur_r2", "shared_large", "sft",
        "hywu_r2_s1", "shared_r2_s1", "single_blur_r2_s1", "single_deblur_r2_s1",
        "hywu_r2_sweep", "shared_r2_sweep", "hywu_r1_sweep", "shared_r1_sweep"]  # fmt: skip


def image(seed: int) -> torch.Tensor:
    """Smooth noise, uint8 ``[3, 100, 120]``."""
    coarse = torch.rand(1, 3, 10, 12, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (100, 120), mode="bicubic")[0].mul(255).byte()


@pytest.fixture(scope="module")
def hywu(tmp_path_factory):
    """(folder, further arguments) -> exit code of ``hywu conflict --quick`` on a tiny plan and editor."""
    folder = tmp_path_factory.mktemp("base")
    save_editor(random_editor(), folder / "editor.safetensors", {"steps": 7})
    Image.fromarray(image(9).permute(1, 2, 0).numpy()).save(folder / "train.png")
    images = {"coffee": image(1), "camera": image(2), "drawing.png": image(3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConflictPlan, "quick", lambda: PLAN)
        patch.setattr(data, "split_files", lambda side: [folder / "train.png"])
        for module in (evaluate, degrees):
            patch.setattr(module, "held_out_images", lambda: images)
        patch.setattr(degrees, "IMAGES", 2)
        patch.setattr(degrees, "SIZE", 48)
        patch.setattr(report, "photographs", lambda: {"coffee": None, "camera": None})

        def run(out, *more: str) -> int:
            given = ["--editor", str(folder / "editor.safetensors"), "--device", "cpu"]
            return main(["conflict", "--quick", "--out", str(out), *given, *more])

        yield run


@pytest.fixture(scope="module")
def done(hywu, tmp_path_factory):
    """The folder of an experiment that was done in two parts, by two calls, and reported."""
    out = tmp_path_factory.mktemp("whole") / "experiment"
    assert hywu(out, "--commit", "abc", "--only", "*_r2") == 0
    assert not (out / "report.md").exists()
    assert hywu(out, "--commit", "abc") == 0
    return out


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_run_leaves_weights_and_rows(done):
    for run in RUNS:
        header = read_header(done / "runs" / run / "state.safetensors")
        aside = run.endswith(("_sweep", "_s1"))
        assert header["step"] == (1 if aside else 2)
        assert header["config"]["seed"] == (1 if run.endswith("_s1") else 0)
        for phrasing in ("seen",) if aside else ("seen", "held_out"):
            rows = read(done / "results" / f"{run}.{phrasing}.json")
            assert [(r["image"], r["task"]) for r in rows] == [
                (image, task) for image in ("coffee", "camera", "drawing.png") for task in TASKS
            ]
            assert all(np.isfinite(r["psnr"]) and -1 <= r["ssim"] <= 1 for r in rows)
    generator = load_generator(done / "weights" / "hywu_r2.safetensors")
    assert generator.config.layout.rank == 2
    provenance = generator.config.provenance
    assert provenance["commit"] == "abc"
    assert provenance["editor"]["steps"] == 7
    assert list(provenance["phrasings"]) == list(TASKS)
    single = load_lora(done / "weights" / "single_blur_r2.safetensors")
    assert single.rank == 2
    assert list(single.provenance["phrasings"]) == ["blur"]


def test_whole_images_are_edited_at_fixed_degrees(done):
    found = {path.stem: read(path) for path in (done / "degrees").glob("*.json")}
    singles = {f"single_{task}_r2" for task in TASKS}
    assert (
        found.keys()
        == {"hywu_r2", "shared_r2", "shared_large", "sft", "base", "hywu_task_mean"} | singles
    )
    names = [
        "blur, sharp source",
        "blur, sigma 1",
        "blur, sigma 2",
        "deblur, sigma 1",
        "deblur, sigma 2",
    ]
    assert list(dict.fromkeys(row["case"] for row in found["hywu_r2"]["tasks"])) == names
    assert {row["task"] for row in found["single_blur_r2"]["tasks"]} == {"blur"}
    assert [row["image"] for row in found["base"]["tasks"]] == [0, 1] * 5
    assert all(row["psnr"] > 5 and row["sharpness_of_source"] > 0 for row in found["sft"]["tasks"])
    about = read(done / "figures.json")["fixed_degrees"]["hywu_r2"]
    assert set(about) == {"cases", "short", "unknown", "flat"}
    gains = [row["gain"] for row in found["hywu_r2"]["tasks"] if row["case"] == names[3]]
    assert about["cases"][names[3]]["gain"] == pytest.approx(np.mean(gains), abs=0.006)
    assert about["flat"]["blur"]["gray card"] < 0.2
    page = (done / "report.md").read_text(encoding="utf-8")
    assert "| deblur, sigma 2 |" in page
    assert "“add a red hat”" in page


def test_the_large_shared_lora_has_about_the_generators_size(done):
    trained = read(done / "figures.json")["trained"]
    assert list(trained) == RUNS
    one = trained["shared_r1_sweep"]["trained_values"]
    assert trained["shared_r2_sweep"]["trained_values"] == 2 * one
    assert trained["shared_r2"]["trained_values"] == 2 * one
    gap = trained["shared_large"]["trained_values"] - trained["hywu_r2"]["trained_values"]
    assert abs(gap) <= one


def test_the_report_shows_what_the_rows_say(done):
    figures = read(done / "figures.json")
    assert figures["missing"] == []
    assert figures["photographs"] == ["coffee", "camera"]
    rows = read(done / "results" / "hywu_r2.seen.json")
    means = figures["all_images"]["psnr"]["HY-WU"]
    for task in (*TASKS, "all"):
        values = [r["psnr"] for r in rows if task in ("all", r["task"])]
        assert means[task]["mean"] == pytest.approx(np.mean(values), abs=1e-4)
    photos = [r["psnr"] for r in rows if r["image"] != "drawing.png"]
    found = figures["photographs_only"]["psnr"]["HY-WU"]["all"]["mean"]
    assert found == pytest.approx(np.mean(photos), abs=1e-4)
    assert list(figures["all_images"]["ranks"]) == ["1", "2"]
    assert set(figures["all_images"]["controls"]) == {
        "unchanged", "hywu_shuffled", "hywu_mean", "hywu_task_mean", "base",
    }  # fmt: skip
    cosine = figures["gradients"]["cosines"][0][1]
    assert figures["gradients"]["mean_of_opposite_tasks"] == pytest.approx(cosine, abs=1e-4)
    page = (done / "report.md").read_text(encoding="utf-8")
    assert f"of opposite tasks {cosine:.2f}." in page
    assert "Not done yet" not in page
    for run in RUNS:
        assert f"\n| {run} | " in page


def test_learning_curves_are_the_logs_and_single_is_the_mean_of_its_tasks(done):
    def losses(run):
        with (done / "runs" / run / "log.csv").open(newline="") as file:
            return np.array([float(row["loss"]) for row in csv.DictReader(file)])

    learning = read(done / "figures.json")["learning"]
    assert learning["steps"] == [1, 2]
    assert list(learning["loss"]) == ["HY-WU", "Shared", "Single", "Shared large", "SFT"]
    assert learning["loss"]["HY-WU"] == pytest.approx(losses("hywu_r2"), abs=1e-5)
    singles = [losses(f"single_{task}_r2") for task in TASKS]
    assert learning["loss"]["Single"] == pytest.approx(sum(singles) / len(TASKS), abs=1e-5)
    shown = " | ".join(f"{learning['loss']['SFT'][i]:.4f}" for i in (0, 0, 0, 1))
    assert f"| SFT | {shown} |" in (done / "report.md").read_text(encoding="utf-8")


def test_a_run_whose_log_lacks_steps_has_no_curve(tmp_path):
    plan = ConflictPlan(steps=80)
    for run, steps in (("hywu_r2", range(1, 81)), ("shared_r2", range(3, 81))):
        (tmp_path / "runs" / run).mkdir(parents=True)
        log = Log(tmp_path / "runs" / run, 0)
        for step in steps:
            log.add(dict.fromkeys(FIELDS, step))
    learning = learning_curves(
        tmp_path, plan, {"HY-WU": "hywu_r2", "Shared": "shared_r2", "Single": "single"}
    )
    assert learning == {
        "steps": list(range(2, 81, 2)),
        "loss": {"HY-WU": [i - 0.5 for i in range(2, 81, 2)]},
    }


def test_the_images_show_edits_and_figures(done):
    for name in ("edits", "ranks", "learning", "gradients"):
        with Image.open(done / f"{name}.png") as image:
            assert image.format == "PNG"
            assert min(image.size) > 100
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_other_seeds_stand_beside_the_main_runs(done):
    seeds = read(done / "figures.json")["all_images"]["seeds"]
    assert [(seed, v["steps"]) for seed, v in seeds.items()] == [("0", 2), ("1", 1)]
    for seed, end in (("0", ""), ("1", "_s1")):
        rows = {
            run: read(done / "results" / f"{run}_r2{end}.seen.json") for run in ("hywu", "shared")
        }
        rows["single"] = [
            row
            for task in TASKS
            for row in read(done / "results" / f"single_{task}_r2{end}.seen.json")
            if row["task"] == task
        ]
        means = {run: np.mean([row["psnr"] for row in found]) for run, found in rows.items()}
        for label, run in (("HY-WU", "hywu"), ("Shared", "shared"), ("Single", "single")):
            assert seeds[seed][label]["mean"] == pytest.approx(means[run], abs=1e-6)
        gap = means["hywu"] - means["shared"]
        assert seeds[seed]["HY-WU - Shared"]["mean"] == pytest.approx(gap, abs=1e-6)
    assert seeds["0"]["HY-WU"] != seeds["1"]["HY-WU"]
    assert "## Seeds" in (done / "report.md").read_text(encoding="utf-8")


def test_only_a_part_then_a_report_says_what_is_missing(hywu, tmp_path, capsys):
    out = tmp_path / "part"
    assert hywu(out, "--only", "single_*", "shared_r2") == 0
    later = [run for run in RUNS[6:] if not run.startswith("single")]
    lacking = ", ".join(["shared_large", "sft", *later])
    assert f"not done yet: hywu_r2, {lacking}" in capsys.readouterr().out
    assert hywu(out, "--report") == 1
    assert "rank 2, and hywu_r2 must be done first" in capsys.readouterr().err
    assert not list(out.glob("report.md*"))
    assert hywu(out, "--only", "hywu_r2") == 0
    assert hywu(out, "--report") == 0
    page = (out / "report.md").read_text(encoding="utf-8")
    assert f"**Not done yet:** {lacking}." in page
    assert "## Ranks" not in page
    assert not (out / "ranks.png").exists()
    assert "SFT" not in page


def test_an_interrupted_experiment_goes_on_to_the_same_rows(
    hywu, done, tmp_path, monkeypatch, capsys
):
    usual, calls = experiment.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(experiment, "evaluate", interrupted)
    out = tmp_path / "cut"
    assert hywu(out, "--only", "hywu_r2") == 130
    assert "the same command goes on" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in (out / "weights").iterdir()}
    monkeypatch.setattr(experiment, "evaluate", usual)
    assert hywu(out, "--only", "hywu_r2") == 0
    assert before == {p: p.stat().st_mtime_ns for p in (out / "weights").iterdir()}
    names = {p.name for p in (out / "results").iterdir()}
    assert names > {"hywu_r2.seen.json", "hywu_r2.held_out.json", "hywu_task_mean.seen.json"}
    for name in names:
        assert read(out / "results" / name) == read(done / "results" / name), name


def test_another_plan_or_editor_is_refused(hywu, done, tmp_path, capsys):
    before = (done / "plan.json").read_bytes()
    assert hywu(done, "--steps", "3") == 1
    assert hywu(done, "--ranks", "2", "4") == 1
    save_editor(random_editor(seed=9), tmp_path / "other.safetensors", {})
    assert hywu(done, "--editor", str(tmp_path / "other.safetensors")) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all("another plan or editor" in line and "plan.json" in line for line in errors)
    assert (done / "plan.json").read_bytes() == before


def test_precision_is_the_machines_and_stays_the_experiments(hywu, tmp_path, monkeypatch):
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for here, capable in (("slow", False), ("fast", True)):
        for name in names:
            monkeypatch.setattr(torch.cpu, name, lambda capable=capable: capable, raising=False)
        assert hywu(tmp_path / here, "--only", "none") == 0
    found = [read(tmp_path / here / "plan.json")["plan"]["precision"] for here in ("slow", "fast")]
    assert found == ["no", "bf16"]
    assert hywu(tmp_path / "slow", "--only", "none") == 0  # as it was begun, on another machine
    assert hywu(tmp_path / "slow", "--precision", "bf16") == 1


def test_a_whole_experiment_with_the_other_loss_and_gradual_phrasings(hywu, tmp_path):
    out = tmp_path / "out"
    assert hywu(out, "--error", "log", "--written-steps", "2", "--only", "hywu_r2") == 0
    assert read(out / "plan.json")["plan"]["error"] == "log"
    header = read_header(out / "runs" / "hywu_r2" / "state.safetensors")
    assert (header["plan"]["error"], header["plan"]["written_steps"]) == ("log", 2)
    assert (out / "results" / "hywu_r2.seen.json").exists()


def test_list_names_the_runs_and_does_nothing(hywu, tmp_path, capsys):
    assert hywu(tmp_path / "out", "--list") == 0
    assert capsys.readouterr().out.split() == RUNS
    assert not (tmp_path / "out").exists()


def test_plans_that_cannot_be(hywu, tmp_path, capsys):
    assert hywu(tmp_path / "out", "--ranks", "1", "4") == 1
    assert "the main rank 2 must be among (1, 4)" in capsys.readouterr().err


def test_bundled_weights_are_the_runs_of_the_main_rank(hywu, done, tmp_path):
    assert hywu(done, "--bundle", str(tmp_path / "weights")) == 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()}
    assert set(found) == {
        "editor.safetensors", "generator.safetensors", "shared.safetensors",
        "single_blur.safetensors", "single_deblur.safetensors", "figures.json",
    }  # fmt: skip
    assert found["generator.safetensors"] == (done / "weights/hywu_r2.safetensors").read_bytes()
    assert (
        found["single_blur.safetensors"]
        == (done / "weights/single_blur_r2.safetensors").read_bytes()
    )


def test_nothing_is_bundled_before_all_is_there(hywu, done, tmp_path, capsys):
    (tmp_path / "part").mkdir()
    assert hywu(tmp_path / "part", "--bundle", str(tmp_path / "weights")) == 1
    assert "hywu_r2.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "weights").exists()


def test_weights_too_large_for_a_checkout_are_not_bundled(
    hywu, done, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(runs, "FILE_LIMIT", 1000)
    assert hywu(done, "--bundle", str(tmp_path / "weights")) == 1
    assert "at most 1,000 a file" in capsys.readouterr().err
    assert not (tmp_path / "weights").exists()


def test_another_experiment_stands_beside_and_is_bundled_too(hywu, done, tmp_path, capsys):
    """Kept by the command, not by hand: the report and --bundle have it every time."""
    mine, other = tmp_path / "mine", tmp_path / "adamw"
    shutil.copytree(done, mine)
    assert hywu(other, "--optimizer", "adamw") == 0
    assert hywu(mine, "--beside", "AdamW", str(other)) == 0
    theirs = read(other / "figures.json")
    kept = read(mine / "figures.json")["apart"]["AdamW"]
    assert kept["differs"] == {"optimizer": "adamw"}
    assert kept["psnr"] == theirs["all_images"]["psnr"]
    assert kept["trained"] == theirs["trained"]
    assert hywu(mine) == 0
    assert hywu(mine, "--bundle", str(tmp_path / "weights")) == 0
    assert read(tmp_path / "weights" / "figures.json")["apart"]["AdamW"] == kept
    assert "apart" not in read(done / "figures.json")
    capsys.readouterr()
    assert hywu(tmp_path / "seed", "--seed", "1", "--only", "none") == 0
    assert hywu(tmp_path / "seed", "--seed", "1", "--beside", "x", str(other)) == 1
    assert "in seed" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ["{}", '{"plan": ["steps"]}', '{"plan": null}', "[]"])
def test_a_plan_without_its_plan_is_named(hywu, tmp_path, capsys, damaged):
    whole, mine = tmp_path / "whole", tmp_path / "mine"
    for folder in (whole, mine):
        assert hywu(folder, "--only", "none") == 0
    capsys.readouterr()
    (mine / "plan.json").write_text(damaged)
    assert hywu(mine, "--only", "none") == 1
    assert hywu(whole, "--only", "none", "--beside", "x", str(mine)) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(str(mine / "plan.json") in line for line in errors)
    assert (mine / "plan.json").read_text() == damaged


def test_figures_without_their_fields_are_named(hywu, tmp_path, capsys):
    whole, mine = tmp_path / "whole", tmp_path / "mine"
    for folder in (whole, mine):
        assert hywu(folder, "--only", "none") == 0
    for damaged in ("{}", '{"trained": {}, "all_images": []}', '{"all_images": {"psnr": {}}}'):
        (mine / "figures.json").write_text(damaged)
        capsys.readouterr()
        assert hywu(whole, "--only", "none", "--beside", "x", str(mine)) == 1
        assert str(mine / "figures.json") in capsys.readouterr().err
    stored = read(mine / "plan.json")
    del stored["plan"]["crops"]
    (mine / "plan.json").write_text(json.dumps(stored))
    assert hywu(whole, "--only", "none", "--beside", "x", str(mine)) == 1
    assert "in crops" in capsys.readouterr().err


def _rows(change):
    def write(path):
        rows = read(path)
        change(rows)
        path.write_text(json.dumps(rows))

    return write


RESULTS, GRADIENTS, DEGREES = "results/shared_r2.seen.json", "results/gradients.json", "degrees/base.json"  # fmt: skip


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        (RESULTS, _rows(lambda rows: rows.pop()), "has 1 of the 6 items not and 0 that are none"),
        (RESULTS, _rows(lambda rows: rows.append(rows[0])), "has 0 of the 6 items not and 1"),
        (RESULTS, _rows(lambda rows: rows[2].update(image="moon")), "1 of the 6 items not and 1"),
        (RESULTS, _rows(lambda rows: rows[2].pop("psnr")), "row 3: lacks 'psnr'"),
        (RESULTS, _rows(lambda rows: rows[0].update(psnr="30")), "row 1: 'psnr' is a text"),
        (RESULTS, _rows(lambda rows: rows[0].update(ssim=True)), "row 1: 'ssim' is true or false"),
        (RESULTS, _rows(lambda rows: rows.insert(1, None)), "row 2: is no object"),
        (RESULTS, _rows(list.clear), "is empty"),
        (GRADIENTS, _rows(dict.clear), "not the cosines between the gradients of blur, deblur"),
        (GRADIENTS, _rows(lambda found: found["cosines"].pop()), "not the cosines"),
        (GRADIENTS, _rows(lambda found: found["cosines"][0].append(1)), "not the cosines"),
        (GRADIENTS, _rows(lambda found: found["cosines"][0].__setitem__(1, None)), "not the cosines"),
        (GRADIENTS, _rows(lambda found: found["tasks"].reverse()), "not the cosines"),
        (DEGREES, _rows(lambda found: found.pop("tasks")), "lacks 'tasks'"),
        (DEGREES, _rows(lambda found: found.update(flat={})), "'flat' is an object"),
        (DEGREES, _rows(lambda found: found["short"][0].pop("gain")), "'short', row 1: lacks 'gain'"),
        (DEGREES, _rows(lambda found: found["short"][0].update(case="x")), "'short' has the case 'x'"),
        (DEGREES, _rows(lambda found: found["unknown"][0].update(psnr=[])), "'psnr' is a list"),
        ("edits/hywu_r2.safetensors", lambda path: save_file({}, path), "holds no edits"),
        (
            "edits/hywu_r2.safetensors",
            lambda path: save_file({"edits": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, path),
            "holds 2 edits of 6 items",
        ),
        ("edits/hywu_r2.safetensors", lambda path: path.write_bytes(b"x" * 40), "not a whole"),
        ("runs/shared_r2/log.csv", lambda path: path.write_text("step,loss"), "has no rows or is"),
        ("runs/shared_r2/log.csv", lambda path: path.unlink(), "has no rows or is gone"),
    ],
)  # fmt: skip
def test_what_was_measured_is_read_whole_or_named(hywu, done, tmp_path, capsys, file, damage, said):
    out = tmp_path / "experiment"
    shutil.copytree(done, out)
    (out / "report.md").unlink()
    damage(out / file)
    capsys.readouterr()
    assert hywu(out, "--report") == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert str(out / file) in error
    assert said in error
    assert not (out / "report.md").exists()


@pytest.mark.parametrize("by", ["hywu_r1_sweep", "sft", "shared_r2"])
@pytest.mark.parametrize("run", ["hywu_r2", "sft", "shared_r2"])
def test_weights_of_another_run_are_named(hywu, done, tmp_path, capsys, run, by):
    """Of a run whose state is gone and one of whose results must be measured anew."""
    out = tmp_path / "experiment"
    shutil.copytree(done, out)
    if run == by:
        tensors, header = read_tensors(out / "weights" / f"{run}.safetensors")
        tensors.pop(min(tensors))
        save_tensors(out / "weights" / f"{run}.safetensors", tensors, header, overwrite=True)
    else:
        shutil.copy(out / "weights" / f"{by}.safetensors", out / "weights" / f"{run}.safetensors")
    (out / "runs" / run / "state.safetensors").unlink()
    (out / "results" / f"{run}.seen.json").unlink()
    capsys.readouterr()
    assert hywu(out, "--only", run) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(out / "weights" / f"{run}.safetensors") in error


def test_the_last_step_judges_the_edits_that_were_measured(done, capsys):
    for run in ("hywu_r2", "shared_r2", "single_blur_r2", "sft"):
        for phrasing, rows in (("", "seen"), (".held_out", "held_out")):
            edits = read_tensors(done / "edits" / f"{run}{phrasing}.safetensors")[0]["edits"]
            assert len(edits) == len(read(done / "results" / f"{run}.{rows}.json"))


def test_the_sweep_alone_gives_its_figure(hywu, tmp_path, capsys):
    out = tmp_path / "sweep"
    assert hywu(out, "--only", "*_r1_sweep") == 0
    assert str(out / "ranks.png") in capsys.readouterr().out
    found = read(out / "ranks.json")
    assert list(found["ranks"]) == ["1"]
    rows = read(out / "results" / "shared_r1_sweep.seen.json")
    mean = np.mean([row["psnr"] for row in rows])
    assert found["ranks"]["1"]["Shared"]["mean"] == pytest.approx(mean, abs=1e-4)
    assert hywu(out, "--report") == 1
    assert "must be done first" in capsys.readouterr().err
