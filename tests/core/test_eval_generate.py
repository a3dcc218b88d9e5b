"""Producing results: layouts, failures, and runs killed with SIGKILL at random points."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fake_comfyui import DONE, FakeComfyUI
from PIL import Image

from hywu_core.cli import main
from hywu_core.errors import HYWUError
from hywu_core.evaluation.benchmarks import BENCHMARKS, read_items
from hywu_core.evaluation.editors.base import EditFailed
from hywu_core.evaluation.editors.comfy import ComfyEditor
from hywu_core.evaluation.editors.command import CommandEditor
from hywu_core.evaluation.editors.copy import CopyEditor
from hywu_core.evaluation.results import Results, read_failures
from hywu_core.evaluation.run import generate
from hywu_core.files import folder_lock

ROOT = Path(__file__).parents[2]

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
    results = Results(tmp_path / "out" / "mine", BENCHMARKS["folder"])
    editor = CommandEditor(command, parallel=2)
    count = generate(results, items, editor, data, progress=False)
    assert (count.made, count.kept) == (2, 0)
    assert read_failures(results.root) == {
        "t1/en/00001": "the command ended with 1: it is too hard",
        "t2/en/00002": "the command wrote no image",
    }
    (tmp_path / "edit.py").write_text(
        PROGRAM.replace('"fail" in', '"x" in').replace("nothing", "-")
    )
    count = generate(results, items, editor, data, progress=False)
    assert (count.made, count.kept, count.failed) == (2, 2, {})
    assert read_failures(results.root) == {}
    assert not results.missing(items)


def test_another_editors_results_are_not_mixed_in(tmp_path, command):
    data = make_data(tmp_path / "data", ["a", "b"])
    items = read_items("folder", data)
    results = Results(tmp_path / "out" / "mine", BENCHMARKS["folder"])
    generate(results, items, CopyEditor(), data, progress=False)
    with pytest.raises(HYWUError, match="holds results with editor"):
        generate(results, items, CommandEditor(command), data, progress=False)
    with pytest.raises(HYWUError, match="holds results with seed 0, now it is 1"):
        generate(results, items, CopyEditor(), data, seed=1, progress=False)


def test_two_runs_do_not_work_on_one_folder(tmp_path):
    with (
        folder_lock(tmp_path),
        pytest.raises(HYWUError, match="another run"),
        folder_lock(tmp_path),
    ):
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


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"events": DONE, "running": False}, "record of it was cleared"),
        ({"events": [], "running": False}, "removed from the queue"),
        ({"events": [], "running": False, "closes": True}, "was restarted"),
    ],
)
def test_an_edit_whose_prompt_is_nowhere_any_more_has_failed(tmp_path, how, words):
    """And is no result without an image."""
    path = tmp_path / "w.json"
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "x.png", "text": ""}}}
    path.write_text(json.dumps(graph))
    with FakeComfyUI() as server:
        server.lost = True
        for name, value in how.items():
            setattr(server, name, value)
        editor = ComfyEditor(server.url, path, "LoadImage.image", "1.text")
        items = read_items("folder", BENCHMARKS["folder"].sample, tmp_path)
        with pytest.raises(EditFailed, match=words):
            editor.edit(Image.new("RGB", (8, 8)), items.items[0], 0)


def test_gedit_tree_is_the_authors(tmp_path):
    out = tmp_path / "out"
    arguments = ["eval", "generate", "--benchmark", "gedit", "--data", "samples", "--out", str(out)]
    assert main([*arguments, "--editor", "copy"]) == 0
    images = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png"))
    assert images == [
        "copy/fullset/style_change/en/sample_astronaut.png",
        "copy/fullset/style_change/en/sample_astronaut_SRCIMG.png",
        "copy/fullset/tone_transfer/en/sample_rocket.png",
        "copy/fullset/tone_transfer/en/sample_rocket_SRCIMG.png",
    ]
    with Image.open(out / images[0]) as edited, Image.open(out / images[1]) as source:
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
    for place in ("best", "worst"):
        assert f'<span class="place">{place}</span>' in page
    assert page.count("<svg") == (2 if benchmark == "folder" else 1)
    theirs = page.partition("Published by others")[2]
    assert (
        "Published by the authors of HY-WU, with their judge and data; not measured here" in theirs
    )
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


#: Forks `hywu` for each line of arguments, so that a kill comes while it works, not while it imports.
FORK = (
    "import json, os, sys\n"
    "from hywu_core.cli import main\n"
    "import hywu_core.evaluation.judges.reference, skimage.metrics\n"
    "for line in sys.stdin:\n"
    "    child = os.fork()\n"
    "    if child == 0:\n"
    "        os.setsid()\n"
    "        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n"
    "        sys.exit(main(json.loads(line)))\n"
    "    print(child, flush=True)\n"
    "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
)


class Forked:
    """Runs of `hywu`, each a process with a group of its own."""

    def __init__(self) -> None:
        quiet = {"stderr": subprocess.DEVNULL, "text": True, "cwd": ROOT}
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **quiet
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)

    def run(self, arguments: list[str], kill_after: float | None = None) -> int:
        """The exit code; -SIGKILL where it still ran after that many seconds."""
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        pid = int(self.lines.get(timeout=300))
        try:
            return int(self.lines.get(timeout=kill_after or 300))
        except queue.Empty:
            with contextlib.suppress(
                ProcessLookupError
            ):  # it is not a group of its own yet, or ended
                os.killpg(pid, signal.SIGKILL)
            return int(self.lines.get(timeout=300))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stdin.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX's")
def test_killed_and_resumed_equals_uninterrupted(tmp_path, command):
    """Every step, killed again and again at random points: the same files, the same scores."""
    data = make_data(tmp_path / "data", [*(f"blur {'x' * n}" for n in range(10)), "fail"])

    def steps(out: Path) -> list[list[str]]:
        given = ["--benchmark", "folder", "--data", str(data), "--out", str(out), "--workers", "2"]
        editor = ["--editor", "command", "--command", command]
        return [
            ["eval", "generate", *given, "--method", "m", *editor],
            ["eval", "judge", str(out / "m")],
            ["eval", "score", str(out / "m")],
        ]

    rng, kills, forked = random.Random(1), 0, Forked()
    try:
        for whole, killed in zip(
            steps(tmp_path / "whole"), steps(tmp_path / "killed"), strict=True
        ):
            start = time.monotonic()
            code = forked.run(whole)
            assert code == (3 if whole[1] == "generate" else 0)  # one item has no result
            seconds = time.monotonic() - start
            for _ in range(8):
                ended = forked.run(killed, rng.uniform(0, seconds / 3))
                assert ended in (code, -signal.SIGKILL)
                kills += ended == -signal.SIGKILL
            assert forked.run(killed) == code
    finally:
        forked.close()
    assert kills >= 8
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")
