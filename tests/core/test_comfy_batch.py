"""`hywu comfy batch`: every image once, whatever dies; servers of any speed; what failed is said."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from hywu_core.cli import main
from hywu_core.evaluation.editors.base import EditFailed
from hywu_core.evaluation.editors.comfy import ComfyEditor
from hywu_core.evaluation.items import Item
from hywu_core.evaluation.run import in_threads
from hywu_core.headless.batch import Batch, items_of
from hywu_core.headless.local import free_port, get_json
from hywu_core.headless.pool import Pool

pytest.importorskip("aiohttp", reason="the client needs the `headless` extra")

import fake_queue as fake

ROOT = Path(__file__).parents[2]


class Servers:
    """Fake servers, each a process of its own; `logs` have a line for each prompt that was finished."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports, self.seconds, self.processes = folder, [], [], []

    def start(self, seconds: float) -> str:
        self.ports.append(free_port())
        self.seconds.append(seconds)
        self.processes.append(None)
        self.again(len(self.ports) - 1)
        return self.urls[-1]

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def again(self, i: int) -> None:
        log = self.folder / f"server{i}.log"
        command = [
            sys.executable,
            fake.__file__,
            str(self.ports[i]),
            str(self.seconds[i]),
            str(log),
        ]
        self.processes[i] = subprocess.Popen(command)
        wait_for(lambda: self.answers(i))

    def answers(self, i: int) -> bool:
        try:
            return get_json(self.urls[i] + "/queue") is not None
        except OSError:
            return False

    def kill(self, i: int) -> None:
        self.processes[i].kill()
        self.processes[i].wait()

    def finished(self) -> Counter[str]:
        return Counter(
            line for log in self.folder.glob("*.log") for line in log.read_text().split()
        )


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def servers(tmp_path):
    (tmp_path / "logs").mkdir()
    running = Servers(tmp_path / "logs")
    yield running
    for i in range(len(running.processes)):
        running.kill(i)


@pytest.fixture
def command(tmp_path):
    """The arguments of a batch of so many images, and folder `out`."""

    def make(count: int, servers: Servers, *more: str) -> list[str]:
        (tmp_path / "graph.json").write_text(json.dumps(fake.GRAPH))
        sources = tmp_path / "sources"
        sources.mkdir(exist_ok=True)
        for i in range(count):
            (sources / f"photo{i:03}.png").write_bytes(b"image %d" % i)
        given = [word for url in servers.urls for word in ("--server", url)]
        inputs = [] if "--items" in more else [str(sources)]
        return ["comfy", "batch", *inputs, "--workflow", str(tmp_path / "graph.json"), *given,
                "--out", str(tmp_path / "out"), *more]  # fmt: skip

    return make


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def check_results(out: Path, count: int, instruction: str) -> list[dict]:
    """Each image has one line and one file, with its own edit."""
    found = rows(out / "results.jsonl")
    assert Counter(row["name"] for row in found) == {f"photo{i:03}": 1 for i in range(count)}
    for row in found:
        source = Path(row["source"]).read_bytes()
        assert row["files"] == [row["name"] + ".png"]
        assert (out / row["files"][0]).read_bytes() == fake.edited(source, instruction)
    assert len(list(out.glob("*.png"))) == count
    return found


def test_200_images_over_three_servers_that_die_and_a_client_that_is_killed(
    servers, command, tmp_path
):
    for seconds in (0.02, 0.04, 0.08):
        servers.start(seconds)
    out, count = tmp_path / "out", 200
    given = command(count, servers, "--instruction", "blur")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def done() -> int:
        file = out / "results.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    for killed_at in (40, 90):
        client = subprocess.Popen([sys.executable, "-m", "hywu_core.cli", *given], env=environment)
        wait_for(lambda least=killed_at: done() >= least)
        client.kill()
        client.wait()
        assert done() < count
    with (out / "results.jsonl").open("a") as file:
        file.write('{"name": "photo1')  # as a kill within a line leaves it
    client = subprocess.Popen([sys.executable, "-m", "hywu_core.cli", *given], env=environment)
    wait_for(lambda: done() >= 110)
    servers.kill(0)
    wait_for(lambda: done() >= 125)
    servers.kill(1)
    servers.again(1)
    assert client.wait(240) == 0
    whole = (out / "results.jsonl").read_text().replace('{"name": "photo1\n', "")
    (out / "results.jsonl").write_text(whole)
    found = check_results(out, count, "blur")
    # what a server that died had finished, and nobody fetched, is all that was made twice
    finished = servers.finished()
    assert set(finished.values()) == {1}
    assert {row["prompt"] for row in found} <= set(finished)
    assert len(finished) - count <= 4
    for url in servers.urls[1:]:
        assert set(get_json(url + "/uploads").values()) <= {0}
    assert main(given) == 0  # nothing is left to do
    assert servers.finished() == finished


def test_a_fast_server_takes_what_waits_at_a_slow_one(servers, command, tmp_path):
    servers.start(4)
    servers.start(0.01)
    assert main(command(12, servers, "--instruction", "x", "--ahead", "3")) == 0
    found = check_results(tmp_path / "out", 12, "x")
    counts = Counter(row["server"] for row in found)
    assert counts[servers.urls[0]] <= 3  # it was given four at first
    assert set(servers.finished().values()) == {1}


def refusals(servers: Servers, i: int) -> list[float]:
    """When a server said that it is full."""
    return list(map(float, (servers.folder / f"server{i}.log.refused").read_text().split()))


def test_a_server_whose_queue_is_full_is_asked_again(servers, command, tmp_path):
    servers.start(0.3)
    # one runs and four wait at most, eight are sent at once
    assert main(command(10, servers, "--instruction", "x", "--ahead", "7")) == 0
    check_results(tmp_path / "out", 10, "x")
    assert set(servers.finished().values()) == {1}
    assert len(servers.finished()) == 10
    assert refusals(servers, 0)
    assert not (tmp_path / "out" / "failures.jsonl").exists()


def test_a_server_that_stays_full_is_asked_more_and_more_rarely_and_others_go_on(
    servers, command, tmp_path
):
    urls = [servers.start(0.05), servers.start(0.6)]
    full = servers.folder / "server0.log.full"
    full.touch()
    command(16, servers)
    items = items_of([tmp_path / "sources"], "x")
    batch = Batch(
        tmp_path / "out", items, fake.GRAPH, (fake.IMAGE, "image"), (fake.TEXT, "instruction")
    )

    def show(done: int, failed: int) -> None:
        if done and len(refusals(servers, 0)) >= 3:
            full.unlink(missing_ok=True)

    # no patience: the pool's own pauses of 1, 2, 4 s, not those of a request
    asyncio.run(batch.run(Pool(urls, ahead=0, patience=0), show))
    found = check_results(tmp_path / "out", 16, "x")
    assert {row["server"] for row in found[:4]} == {urls[1]}
    assert {row["server"] for row in found} == set(urls)
    assert not batch.failed
    assert set(servers.finished().values()) == {1}
    times = refusals(servers, 0)
    pauses = [after - before for before, after in pairwise(times)]
    assert len(pauses) >= 2
    assert pauses[0] >= 1
    assert pauses[1] >= 2
    # what was uploaded for a prompt that was refused is taken back, too
    assert set(get_json(urls[0] + "/uploads").values()) <= {0}


def test_what_fails_is_listed_and_tried_again(servers, command, tmp_path, capsys):
    servers.start(0.01)
    given = command(2, servers, "--items", str(tmp_path / "items.jsonl"))
    sources = ["sources/photo000.png", "sources/photo001.png", "sources/photo000.png"]
    items = [
        {"source": s, "instruction": t} for s, t in zip(sources, ["a", "fail", "b"], strict=True)
    ]
    items[2]["set"] = {"Edit.seed": 7}
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    assert main(given) == 5
    assert "1 failed" in capsys.readouterr().out
    out = tmp_path / "out"
    assert [row["name"] for row in rows(out / "failures.jsonl")] == ["photo001"]
    assert sorted(row["name"] for row in rows(out / "results.jsonl")) == ["photo000", "photo000-2"]
    assert (out / "photo000-2.png").read_bytes() == fake.edited(b"image 0", "b", 7)
    items[1]["instruction"] = "c"
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    assert main(given) == 0
    assert (out / "failures.jsonl").read_text() == ""
    items[0]["instruction"] = "other"
    (tmp_path / "items.jsonl").write_text(json.dumps(items[0]))
    assert main(given) == 1
    assert "'photo000' was made of another image, instruction" in capsys.readouterr().err


def test_parts_share_a_folder_and_make_everything_once(servers, command, tmp_path, capsys):
    servers.start(0.01)
    for part in ("1/2", "2/2"):
        assert main(command(5, servers, "--instruction", "x", "--shard", part)) == 0
    out = tmp_path / "out"
    made = [row["name"] for i in (1, 2) for row in rows(out / f"results-{i}-of-2.jsonl")]
    assert sorted(made) == [f"photo{i:03}" for i in range(5)]
    assert main(command(5, servers, "--instruction", "x")) == 1
    assert "was begun as the part 1-of-2" in capsys.readouterr().err


@pytest.fixture
def four_jobs(tmp_path) -> Path:
    """A folder as docs/headless.md has it: ten photos, `workflow.json`, the script as `part.sh`, and a `python` that
    starts a fake server in place of ComfyUI; the second entry of PATH.
    """
    if shutil.which("bash") is None:
        pytest.skip("the script is bash's")
    text = (ROOT / "docs" / "headless.md").read_text(encoding="utf-8")
    script = re.search(r"```bash\n(#SBATCH .*?)```", text, re.DOTALL)[1]
    assert "port=$((8188 + SLURM_ARRAY_TASK_ID))" in script
    (tmp_path / "part.sh").write_text(script.replace("8188", str(free_port())), encoding="utf-8")
    (tmp_path / "workflow.json").write_text(json.dumps(fake.GRAPH))
    for name in ("photos", "bin"):
        (tmp_path / name).mkdir()
    for i in range(10):
        (tmp_path / "photos" / f"{i}.png").write_bytes(b"image %d" % i)
    programs = {
        # python ComfyUI/main.py --port PORT
        "python": f'test "$1" = ComfyUI/main.py && exec "{sys.executable}" "{fake.__file__}" "$3" 0.02 "$3.log"',
        "hywu": f'exec "{sys.executable}" -m hywu_core.cli "$@"',
    }
    for name, line in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def surroundings(folder: Path, **more: str) -> dict[str, str]:
    """Environment variables by which the folder's programs are found."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return (
        os.environ
        | {"PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        | more
    )


def made_in(folder: Path) -> int:
    return sum(len(log.read_text().split()) for log in folder.glob("*.log"))


def check_parts(folder: Path) -> None:
    """Each image has one line in the four parts' files, and its own edit; nothing was made twice."""
    out = folder / "results"
    found = [row for i in range(1, 5) for row in rows(out / f"results-{i}-of-4.jsonl")]
    assert sorted(row["name"] for row in found) == [str(i) for i in range(10)]
    assert len({row["server"] for row in found}) == 4
    for i in range(10):
        assert (out / f"{i}.png").read_bytes() == fake.edited(b"image %d" % i, "…")
    assert made_in(folder) == 10


def test_the_documented_array_of_jobs_makes_every_image_once(four_jobs):
    """Four jobs at once, each with a server of its own."""

    def job(i: int) -> subprocess.Popen[bytes]:
        environment = surroundings(four_jobs, SLURM_ARRAY_TASK_ID=str(i))
        return subprocess.Popen(["bash", "part.sh"], cwd=four_jobs, env=environment)

    jobs = [job(i) for i in range(1, 5)]
    assert [one.wait(120) for one in jobs] == [0] * 4
    check_parts(four_jobs)
    assert job(2).wait(120) == 0  # requeued: nothing is left to do
    assert made_in(four_jobs) == 10


def test_the_documented_tasks_of_ray_make_every_image_once(four_jobs):
    pytest.importorskip("ray", reason="not a dependency: the documentation's recipe")
    text = (ROOT / "docs" / "headless.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(import os, subprocess, ray\n.*?)```", text, re.DOTALL)[1]
    # as many cards as it wants, which nothing here uses
    program = program.replace("\nfolder =", "\nray.init(num_cpus=4, num_gpus=4)\nfolder =")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=four_jobs, env=surroundings(four_jobs), timeout=240,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "[0, 0, 0, 0]" in done.stdout, done.stderr[-3000:]
    check_parts(four_jobs)


def test_an_evaluation_shares_its_items_between_servers(servers, command, tmp_path):
    urls = [servers.start(0.05) for _ in range(2)]
    command(0, servers)
    editor = ComfyEditor(
        " ".join(urls), tmp_path / "graph.json", "LoadImage.image", "Edit.instruction", "Edit.seed"
    )
    assert editor.parallel == 2
    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(12)]

    def edit(i: int):
        return editor.edit(images[i], Item(str(i), "task", "copy", Path("a.png")), 1)

    edits = dict(in_threads(range(12), edit, editor.parallel, editor.close))
    assert [edits[i].getpixel((0, 0)) for i in range(12)] == [(i, 0, 0) for i in range(12)]
    with pytest.raises(EditFailed, match="failed"):
        editor.edit(images[0], Item("0", "task", "fail", Path("a.png")), 1)
    editor.close()
    assert all(log.read_text() for log in servers.folder.glob("*.log"))
    assert len(list(servers.folder.glob("*.log"))) == 2


def test_the_client_does_without_torch():
    """Half a gigabyte and two seconds of a machine that only sends files and gets some."""
    program = "import sys, hywu_core.cli.comfy_batch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_no_server_and_wrong_arguments(servers, command, tmp_path, capsys):
    servers.start(0.01)
    servers.kill(0)
    assert main(command(3, servers, "--instruction", "x", "--give-up", "1")) == 3
    assert "No ComfyUI answers" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.jsonl").exists()
    assert main(command(3, servers, "--instruction", "x", "--shard", "3/2")) == 1
    twice = command(3, servers, "--server", servers.urls[0])
    assert main(twice) == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert main(command(3, servers, "--instruction", "x", "--out", str(tmp_path / "full"))) == 1
    assert "holds other files (mine.txt)" in capsys.readouterr().err
