"""Producing results: layouts, failures, and runs killed with SIGKILL at random points."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hywu_core.cli import main
from hywu_core.errors import HYWUError
from hywu_core.evaluation.comfy_editor import ComfyEditor
from hywu_core.evaluation.editors import CommandEditor, CopyEditor
from hywu_core.evaluation.generate import generate_results, read_failures
from hywu_core.evaluation.items import read_items
from hywu_core.evaluation.locking import exclusive
from hywu_core.evaluation.results import Results

ROOT = Path(read_items.__code__.co_filename).parents[2]

PROGRAM = """
import sys
from PIL import Image, ImageFilter
source, out, instruction, seed = sys.argv[1:]
if "fail" in instruction:
    sys.exit("it is too hard")
if "nothing" not in instruction:
    Image.open(source).filter(ImageFilter.GaussianBlur(1 + len(instruction) % 3)).save(out)
"""


def make_data(folder: Path, instructions: list[str]) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = []
    for number, instruction in enumerate(instructions):
        Image.fromarray(rng.integers(0, 256, (20, 28, 3), np.uint8)).save(folder / f"{number}.png")
        source = f"{number}.png"
        rows.append(
            {
                "source": source,
                "target": source,
                "instruction": instruction,
                "task": f"t{number % 3}",
            }
        )
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def command(tmp_path):
    program = tmp_path / "edit.py"
    program.write_text(PROGRAM)
    return f"'{sys.executable}' '{program}' {{source}} {{out}} {{instruction}} {{seed}}"


def test_failures_are_listed_and_retried(tmp_path, command):
    data = make_data(tmp_path / "data", ["blur {out}; rm -rf $HOME", "fail", "nothing", "more"])
    items = read_items("folder", data)
    results = Results(tmp_path / "out" / "mine", "folder")
    editor = CommandEditor(command, parallel=2)
    count = generate_results(results, items, editor, data, progress=False)
    assert (count.made, count.kept) == (2, 0)
    assert read_failures(results.root) == {
        "t1/en/00001": "the command ended with 1: it is too hard",
        "t2/en/00002": "the command wrote no picture",
    }
    (tmp_path / "edit.py").write_text(
        PROGRAM.replace('"fail" in', '"x" in').replace("nothing", "-")
    )
    count = generate_results(results, items, editor, data, progress=False)
    assert (count.made, count.kept, count.failed) == (2, 2, {})
    assert read_failures(results.root) == {}
    assert not results.missing(items)


def test_another_editors_results_are_not_mixed_in(tmp_path, command):
    data = make_data(tmp_path / "data", ["a", "b"])
    items = read_items("folder", data)
    results = Results(tmp_path / "out" / "mine", "folder")
    generate_results(results, items, CopyEditor(), data, progress=False)
    with pytest.raises(HYWUError, match="holds results with editor"):
        generate_results(results, items, CommandEditor(command), data, progress=False)
    with pytest.raises(HYWUError, match="holds results with seed 0, now it is 1"):
        generate_results(results, items, CopyEditor(), data, seed=1, progress=False)


def test_two_runs_do_not_work_on_one_folder(tmp_path):
    with exclusive(tmp_path), pytest.raises(HYWUError, match="another run"), exclusive(tmp_path):
        pass


def test_command_needs_its_placeholders():
    with pytest.raises(HYWUError, match=r"lacks \{instruction\}, \{out\}"):
        CommandEditor("edit {source}")


def test_workflow_inputs_are_checked(tmp_path):
    path = tmp_path / "w.json"
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "x.png"}}}
    path.write_text(json.dumps(graph))
    with pytest.raises(HYWUError, match="has no input text"):
        ComfyEditor("http://127.0.0.1:9", path, "LoadImage.image", "1.text")


def test_gedit_tree_is_the_authors(tmp_path):
    out = tmp_path / "out"
    arguments = ["eval", "generate", "--benchmark", "gedit", "--data", "samples", "--out", str(out)]
    assert main([*arguments, "--editor", "copy"]) == 0
    pictures = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png"))
    assert pictures == [
        "copy/fullset/style_change/en/sample_astronaut.png",
        "copy/fullset/style_change/en/sample_astronaut_SRCIMG.png",
        "copy/fullset/tone_transfer/en/sample_rocket.png",
        "copy/fullset/tone_transfer/en/sample_rocket_SRCIMG.png",
    ]
    with Image.open(out / pictures[0]) as edited, Image.open(out / pictures[1]) as source:
        assert edited.size == (512, 512)
        assert source.size == (160, 160)


@pytest.mark.parametrize("benchmark", ["gedit", "imgedit", "folder"])
def test_command_line_from_items_to_an_offline_report(tmp_path, benchmark, command, capsys):
    out = tmp_path / "out"
    common = ["eval", "generate", "--benchmark", benchmark, "--data", "samples", "--out", str(out)]
    assert main([*common, "--editor", "copy"]) == 0
    assert main([*common, "--editor", "command", "--command", command]) == 0
    methods = [str(out / "command"), str(out / "copy")]
    assert main(["eval", "judge", *methods]) == 0
    assert main(["eval", "score", *methods]) == 0
    assert main(["eval", "report", *methods, "--out", str(out / "report.html")]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "http" not in page
    assert "<script" not in page
    assert "url(" not in page
    assert page.count("data:image/jpeg;base64,") == 8
    assert "Judge: reference, version pixels-1." in page
    assert "2 scored of 2 items" in (out / "report.md").read_text(encoding="utf-8")
    assert "2 scored of 2 items" in capsys.readouterr().out


def snapshot(root: Path) -> dict[str, bytes]:
    """Everything a run leaves, but the lock and the order in which parallel answers came."""
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != ".hywu.lock"):
        data = path.read_bytes()
        if path.suffix == ".jsonl":
            data = b"\n".join(sorted(data.splitlines()))
        found[path.relative_to(root).as_posix()] = data
    return found


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is what is tested; Windows has none")
def test_killed_and_resumed_equals_uninterrupted(tmp_path, command):
    """Both steps, killed again and again until they get through: same files, same scores."""
    data = make_data(tmp_path / "data", [f"blur {'x' * n}" for n in range(10)])

    def steps(out: Path) -> list[list[str]]:
        hywu = [sys.executable, "-m", "hywu_core.cli", "eval"]
        given = ["--benchmark", "folder", "--data", str(data), "--out", str(out), "--workers", "2"]
        editor = ["--editor", "command", "--command", command]
        return [
            [*hywu, "generate", *given, "--method", "m", *editor],
            [*hywu, "judge", str(out / "m")],
            [*hywu, "score", str(out / "m")],
        ]

    for step in steps(tmp_path / "whole"):
        subprocess.run(step, check=True, cwd=ROOT, capture_output=True)
    rng = random.Random(1)
    kills = 0
    for step in steps(tmp_path / "killed"):
        limit = 1.0
        while True:
            process = subprocess.Popen(
                step,
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            deadline = time.monotonic() + rng.uniform(0.4, 1) * limit
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if process.poll() is not None:
                assert process.returncode == 0
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            limit *= 1.25
    assert kills >= 3
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")
