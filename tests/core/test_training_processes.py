"""Several processes are counted, share every batch, and give what one process gives; devices are as named."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toy_base as toy

from hywu_core.devices import chosen_device
from hywu_core.errors import HYWUError
from hywu_core.files import read_header, read_tensors
from hywu_core.training import devices
from hywu_core.training.logs import read_log
from hywu_core.training.schedule import OPTIMIZERS
from hywu_core.training.trainer import STATE, Trainer

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "helpers" / "toy_base.py"
FORMER = Path(__file__).with_name("former_runs")
Tensors = dict[str, torch.Tensor]


def launch(launcher: list[str], *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A launcher of processes without GPUs, as a user starts it."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-m", *launcher, *command],
        env=env, timeout=240, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip


def torchrun(count: int, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["torch.distributed.run", "--nproc_per_node", str(count), "--master_port", port]
    return launch(launcher, *command, **more)


def parameters(folder: Path) -> Tensors:
    tensors = read_tensors(folder / STATE)[0]
    return {key: value for key, value in tensors.items() if key.startswith("parameters.")}


COMBINATIONS = [f"{name}-{o}" for o in OPTIMIZERS for name in ("hywu", "shared", "sft")]
GONE_ON = ("hywu-adamw", "shared-muon")
TO_THE_BIT = ("hywu-muon", "sft-adamw")


def trainer_of(folder: Path) -> Trainer:
    """One process's, in a folder named after its combination."""
    name, optimizer = folder.name.split("-")
    return toy.make_trainer(folder, name, optimizer=optimizer)


def trained(count: int, folder: Path, until: int, *combinations: str) -> Path:
    """The folder after `count` processes have trained there, to step `until` of 8."""
    done = torchrun(count, str(TOY), str(folder), "8", str(until), *combinations)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def beside(one: Path, other: Path, start: Tensors) -> float:
    """The distance of two runs' weights, of the way that the first's have gone.

    Sums in another order, which Muon's orthogonalized steps (in bfloat16 where the CPU has it) enlarge.
    """
    mine, others = parameters(one), parameters(other)
    moved, apart = (
        sum(float((mine[key] - there[key]).square().sum()) for key in mine) ** 0.5
        for there in (start, others)
    )
    return apart / moved


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Callable[[int], Path]:
    """A number of processes -> the folder of their runs.

    In `COMBINATION` each strategy with each optimizer, for 6 of 8 steps; in `gone_on` two runs of 2 processes,
    ended by this number; in `straight` two whole runs.
    """
    made: dict[int, Path] = {}

    def folder(count: int) -> Path:
        if count in made:
            return made[count]
        made[count] = tmp_path_factory.mktemp(f"processes{count}")
        more = [f"straight/{name}:8" for name in TO_THE_BIT] if count == 4 else []
        if count > 2:
            for name in GONE_ON:
                shutil.copytree(folder(2) / name, made[count] / "gone_on" / name)
            more += [f"gone_on/{name}:8" for name in GONE_ON]
        return trained(count, made[count], 6, *COMBINATIONS, *more)

    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Callable[[str], tuple[Path, Tensors]]:
    """A combination -> its folder after 6 of 8 steps by this process, and the weights it began with."""
    folder = tmp_path_factory.mktemp("one")

    @functools.cache
    def made(combination: str) -> tuple[Path, Tensors]:
        trainer = trainer_of(folder / combination)
        start = {f"parameters.{n}": p.detach().clone() for n, p in trainer.parameters.items()}
        trainer.run(until=6)
        return folder / combination, start

    return made


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_several_processes_equal_one(several, one, combination, count):
    """Batches have 8 examples: of three processes one takes 2, the others 3."""
    alone, start = one(combination)
    together = several(count) / combination
    headers = [read_header(folder / STATE) for folder in (alone, together)]
    assert [header["processes"] for header in headers] == [1, count]
    assert beside(alone, together, start) < (1e-3 if combination.endswith("adamw") else 0.1)
    logs = [read_log(folder / "log.csv") for folder in (alone, together)]
    # one log, written once, of the whole batch's loss
    assert [[row["step"] for row in log] for log in logs] == [list(range(1, 7))] * 2
    assert [row["loss"] for row in logs[1]] == pytest.approx([r["loss"] for r in logs[0]], rel=2e-3)


def test_a_run_of_two_processes_goes_on_with_one(several, tmp_path):
    shutil.copytree(several(2) / "hywu-adamw", tmp_path / "both")
    assert toy.make_trainer(tmp_path / "both").run()
    toy.make_trainer(tmp_path / "one").run()
    one, both = parameters(tmp_path / "one"), parameters(tmp_path / "both")
    assert max(float((one[key] - both[key]).abs().max()) for key in one) < 1e-3


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("combination", GONE_ON)
def test_a_run_of_two_processes_goes_on_with_more(several, tmp_path, combination, count):
    more = several(count) / "gone_on" / combination
    header = read_header(more / STATE)
    assert (header["processes"], header["step"]) == (count, 8)
    alone = tmp_path / combination
    shutil.copytree(several(2) / combination, alone)
    trainer_of(alone).run()
    start = parameters(several(2) / combination)
    assert beside(alone, more, start) < (1e-2 if combination.endswith("adamw") else 0.1)
    logs = [read_log(folder / "log.csv") for folder in (alone, more)]
    assert [r["loss"] for r in logs[1]] == pytest.approx([r["loss"] for r in logs[0]], rel=1e-4)


def test_four_processes_go_on_to_the_bit(several, tmp_path):
    """Stopped after 6 of 8 steps, and gone on with by four others."""
    for name in TO_THE_BIT:
        shutil.copytree(several(4) / name, tmp_path / name)
    trained(4, tmp_path, 8, *TO_THE_BIT)
    for name in TO_THE_BIT:
        both = [f / name / STATE for f in (tmp_path, several(4) / "straight")]
        assert [read_header(state)["step"] for state in both] == [8, 8]
        again, straight = (read_tensors(state)[0] for state in both)
        assert again.keys() == straight.keys()
        assert all(torch.equal(again[key], straight[key]) for key in again)


def train(out: Path, *more: str) -> list[str]:
    """The arguments of `hywu train` on the tiny editor, as docs/training.md has them."""
    return ["-m", "hywu_core.cli", "train", "--out", str(out), "--steps", "2", "--strategy", "shared",
            "--data", str(FORMER / "pairs.jsonl"), "--batch-size", "2", "--sample-every", "0",
            "--editor", str(FORMER / "editor.safetensors"), *more]  # fmt: skip


def test_the_documented_command_runs_as_many_processes_as_it_says(tmp_path):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert "\ntorchrun --nproc_per_node 2 -m hywu_core.cli train " in text
    # without --device, on a machine without a GPU
    done = torchrun(2, *train(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout
    assert done.stdout.count("processes") == 1
    assert read_header(tmp_path / "run" / "state.safetensors")["processes"] == 2


def test_a_launcher_that_starts_one_process_for_two_is_refused(tmp_path):
    asked = ["--cpu", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = launch(["accelerate.commands.launch", *asked], *train(tmp_path / "run"))
    assert done.returncode != 0
    assert "was asked for several processes and has started one" in done.stderr
    assert "torchrun --nproc_per_node" in done.stderr
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_a_launcher_of_one_process_is_fine(tmp_path):
    asked = ["--cpu", "--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = train(tmp_path / "run", "--device", "cpu")
    done = launch(["accelerate.commands.launch", *asked], *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_header(tmp_path / "run" / "state.safetensors")["processes"] == 1


def test_processes_that_do_not_find_each_other_are_refused(tmp_path, monkeypatch):
    """As under a launcher of MPI whose group accelerate doesn't see."""
    monkeypatch.setattr(devices, "started_processes", lambda: 2)
    with pytest.raises(HYWUError, match="2 processes were started and 1 found each other"):
        toy.make_trainer(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nonsense", "torch knows no such device"),
        ("cuda", "finds no cuda device"),
        ("cuda:3", "finds no cuda device"),
        ("meta", "finds no meta device"),
        ("xpu", "finds no xpu device"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(tmp_path, monkeypatch, name, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(HYWUError, match=said) as error:
        toy.make_trainer(tmp_path, device=name)
    assert name in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_index_beyond_the_devices_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen_device("cuda:1") == torch.device("cuda", 1)
    assert chosen_device(None) == torch.device("cuda")
    with pytest.raises(HYWUError, match=r"has 2 cuda device\(s\), 0 to 1"):
        chosen_device("cuda:2")


@pytest.mark.parametrize("command", ["train", "conflict", "pretrain"])
def test_every_training_command_refuses_a_device_that_is_not_there(tmp_path, capsys, command):
    from hywu_core.cli import main

    more = train(tmp_path / "run")[3:] if command == "train" else ["--out", str(tmp_path / "run")]
    more += ["--editor", str(FORMER / "editor.safetensors")] if command == "conflict" else []
    assert main([command, *more, "--device", "nonsense"]) == 1
    assert "device 'nonsense'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("state.safetensors"))


def test_the_state_says_what_it_was_made_from(tmp_path):
    toy.make_trainer(tmp_path, identity={"data": "abc"}).run(until=2)
    header = read_header(tmp_path / "state.safetensors")
    assert json.loads(json.dumps(header))["identity"] == {
        "strategy": "hywu", "base": "toy", "data": "abc",
    }  # fmt: skip
    with pytest.raises(HYWUError, match="data abc -> other"):
        toy.make_trainer(tmp_path, identity={"data": "other"}).run()
