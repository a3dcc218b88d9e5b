"""Several processes are counted, share every batch, and give what one process gives; devices are as named."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
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

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "helpers" / "toy_base.py"
FORMER = Path(__file__).with_name("former_runs")


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


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    tensors = read_tensors(folder / "state.safetensors")[0]
    return {key: value for key, value in tensors.items() if key.startswith("parameters.")}


COMBINATIONS = [f"{name}-{o}" for o in OPTIMIZERS for name in ("hywu", "shared", "sft")]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Every strategy with both optimizers, trained by two processes for 6 of 8 steps."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(2, str(TOY), str(folder), "8", "6", *COMBINATIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_two_processes_equal_one(two, tmp_path, combination):
    name, optimizer = combination.split("-")
    trainer = toy.make_trainer(tmp_path, name, optimizer=optimizer)
    start = {f"parameters.{n}": p.detach().clone() for n, p in trainer.parameters.items()}
    trainer.run(until=6)
    states = tmp_path / "state.safetensors", two / combination / "state.safetensors"
    assert [read_header(state)["processes"] for state in states] == [1, 2]
    one, both = parameters(tmp_path), parameters(two / combination)
    moved, apart = (
        sum(float((one[key] - other[key]).square().sum()) for key in one) ** 0.5
        for other in (start, both)
    )
    # sums in another order, which Muon's orthogonalized steps (in bfloat16 where the CPU has it) enlarge
    assert apart < (1e-3 if optimizer == "adamw" else 0.1) * moved
    logs = [read_log(folder / "log.csv") for folder in (tmp_path, two / combination)]
    # one log, written once, of the whole batch's loss
    assert [[row["step"] for row in log] for log in logs] == [list(range(1, 7))] * 2
    assert [row["loss"] for row in logs[1]] == pytest.approx([r["loss"] for r in logs[0]], rel=2e-3)


def test_a_run_of_two_processes_goes_on_with_one(two, tmp_path):
    shutil.copytree(two / "hywu-adamw", tmp_path / "both")
    assert toy.make_trainer(tmp_path / "both").run()
    toy.make_trainer(tmp_path / "one").run()
    one, both = parameters(tmp_path / "one"), parameters(tmp_path / "both")
    assert max(float((one[key] - both[key]).abs().max()) for key in one) < 1e-3


def test_a_run_of_two_processes_goes_on_with_three_whose_shares_differ(two, tmp_path):
    """Batches of 8 examples: 2, 3 and 3."""
    for combination in ("hywu-adamw", "shared-muon"):
        shutil.copytree(two / combination, tmp_path / combination)
    done = torchrun(3, str(TOY), str(tmp_path), "8", "8", "hywu-adamw", "shared-muon")
    assert done.returncode == 0, done.stderr[-3000:]
    for combination in ("hywu-adamw", "shared-muon"):
        name, optimizer = combination.split("-")
        state = tmp_path / combination / "state.safetensors"
        assert (read_header(state)["processes"], read_header(state)["step"]) == (3, 8)
        shutil.copytree(two / combination, tmp_path / "one" / combination)
        toy.make_trainer(tmp_path / "one" / combination, name, optimizer=optimizer).run()
        before = parameters(two / combination)
        one, three = parameters(tmp_path / "one" / combination), parameters(tmp_path / combination)
        moved, apart = (
            sum(float((one[key] - other[key]).square().sum()) for key in one) ** 0.5
            for other in (before, three)
        )
        assert apart < (1e-2 if optimizer == "adamw" else 0.1) * moved
        logs = [
            read_log(folder / combination / "log.csv") for folder in (tmp_path / "one", tmp_path)
        ]
        assert [row["loss"] for row in logs[1]] == pytest.approx(
            [row["loss"] for row in logs[0]], rel=1e-4
        )


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
