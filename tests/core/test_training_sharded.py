"""FSDP2 by the configuration file that is shipped: parts on every process, the files and the losses of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate as accelerate_package
import pytest
import torch
import toy_base as toy

from hywu_core import load_generator
from hywu_core.errors import HYWUError
from hywu_core.files import read_header, read_tensors
from hywu_core.headless.local import free_port
from hywu_core.training import devices, sharding
from hywu_core.training.logs import read_log
from hywu_core.training.sharding import repeated, sharding_asked

pytest.importorskip("torch.distributed.fsdp", reason="torch before 2.6 has no FSDP2")

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "helpers" / "toy_base.py"
FORMER = Path(__file__).with_name("former_runs")
STATE = "state.safetensors"


def accelerate(config: str, *command: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with a configuration file of docs/examples, on the CPU."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"docs/examples/accelerate_{config}.yaml",
    ]
    return subprocess.run(
        [sys.executable, *launcher, "--main_process_port", str(free_port()), *command],
        env=env, timeout=240, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip


def distance(one: Path, other: Path, kind: str) -> float:
    """Of two states' tensors of a kind, relative to their length."""
    a, b = (read_tensors(folder / STATE)[0] for folder in (one, other))
    assert sorted(a) == sorted(b)
    names = [name for name in a if name.startswith(kind + ".")]
    apart = sum(float((a[n] - b[n]).square().sum()) for n in names) ** 0.5
    return apart / sum(float(a[n].square().sum()) for n in names) ** 0.5


def losses(folder: Path, column: str = "loss") -> list[float]:
    return [row[column] for row in read_log(folder / "log.csv")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Two processes with FSDP2, and one process, with both optimizers."""
    folder = tmp_path_factory.mktemp("sharded")
    both = ["hywu-adamw", "hywu-muon"]
    stopped = ["again/hywu-muon:5", "again/hywu-muon:8"]
    done = accelerate("fsdp2", str(TOY), str(folder / "two"), "8", "8", *both, *stopped)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in both:
        trainer = toy.make_trainer(folder / "one" / name, optimizer=name.partition("-")[2])
        trainer.run()
        trainer.export(folder / "one" / name / "weights.safetensors", {})
    return {name: folder / name for name in ("two", "one")}


def test_every_process_holds_its_part(runs):
    for rank in range(2):
        for name in ("hywu-adamw", "hywu-muon"):
            held = json.loads((runs["two"] / name / f"held_{rank}.json").read_text())
            assert set(held) == {"base", "generator", "average", "moments"}
            for what, (here, all_of_it) in held.items():
                assert 0.4 * all_of_it < here < 0.6 * all_of_it, what


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_and_files_are_those_of_one_process(runs, optimizer):
    one, two = (runs[name] / f"hywu-{optimizer}" for name in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-4 if optimizer == "adamw" else 2e-3)
    assert losses(two, "grad_norm") == pytest.approx(losses(one, "grad_norm"), rel=1e-2)
    assert [read_header(folder / STATE)["processes"] for folder in (one, two)] == [1, 2]
    for kind in ("parameters", "average", "exp_avg"):
        # Muon's orthogonalized steps are bfloat16 where the CPU has it, and enlarge what sums differ in
        assert distance(one, two, kind) < (1e-4 if optimizer == "adamw" else 2e-2), kind
    assert (two / "samples" / "step_000008.png").exists()


def test_a_stopped_run_is_the_uninterrupted_one_to_the_bit(runs):
    states = [runs["two"] / name / STATE for name in ("hywu-muon", "again/hywu-muon")]
    assert [read_header(state)["step"] for state in states] == [8, 8]
    straight, again = (read_tensors(state)[0] for state in states)
    assert straight.keys() == again.keys()
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_the_exported_generator_writes_the_loras_of_the_unsharded_one(runs, tmp_path):
    one, two = (
        load_generator(runs[name] / "hywu-adamw" / "weights.safetensors", dtype=torch.float32)
        for name in ("one", "two")
    )
    batch = toy.batches(77)
    with torch.no_grad():
        condition = toy.ToyBase().encode(batch.source, batch.instruction)
        mine, theirs = one(condition), two(condition)
    largest = max(float(v.abs().max()) for v in mine.factors.values())
    apart = max(float((v - theirs.factors[k]).abs().max()) for k, v in mine.factors.items())
    assert largest > 1e-2
    assert apart <= 1e-5 * max(1.0, largest)


def test_a_sharded_run_goes_on_with_one_process_and_exports_the_same(runs, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(runs[name] / "hywu-adamw", tmp_path / name)
    over = toy.make_trainer(tmp_path / "two")
    assert over.run()  # nothing is left to do
    made = over.export(tmp_path / "whole.safetensors", {})
    mine, theirs = (read_tensors(p)[0] for p in (made, tmp_path / "two" / "weights.safetensors"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)
    for name in ("one", "two"):
        assert toy.make_trainer(tmp_path / name, steps=10).run()
    assert losses(tmp_path / "two")[8:] == pytest.approx(losses(tmp_path / "one")[8:], rel=1e-4)


def test_a_run_of_one_process_goes_on_sharded(runs, tmp_path):
    toy.make_trainer(tmp_path / "hywu-adamw").run(until=4)
    done = accelerate(
        "fsdp2", "--num_processes", "3", str(TOY), str(tmp_path), "8", "8", "hywu-adamw"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "hywu-adamw").glob("held_*.json"))) == 3
    assert losses(tmp_path / "hywu-adamw") == pytest.approx(
        losses(runs["one"] / "hywu-adamw"), rel=1e-4
    )


@pytest.mark.parametrize("config", ["multi_gpu", "fsdp2"])
def test_the_configuration_files_start_as_many_processes_as_they_say(tmp_path, config):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"docs/examples/accelerate_{config}.yaml -m hywu_core.cli train" in text
    done = accelerate(
        config, "-m", "hywu_core.cli", "train", "--out", str(tmp_path / "run"), "--steps", "2",
        "--data", str(FORMER / "pairs.jsonl"), "--batch-size", "2", "--sample-every", "0", "--device", "cpu",
        "--d-model", "64", "--editor", str(FORMER / "editor.safetensors"), "--validation", "0.4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes" + (", sharded" if config == "fsdp2" else "")) == 1
    assert read_header(tmp_path / "run" / STATE)["processes"] == 2
    for name in ("weights", "best"):
        assert load_generator(tmp_path / "run" / f"{name}.safetensors").config.layout.rank == 2


def test_what_sharding_does_not_do_is_refused(monkeypatch, tmp_path):
    assert not sharding_asked()
    monkeypatch.setenv(sharding.ASKED, "true")
    with pytest.raises(HYWUError, match="FSDP of version 1"):
        sharding_asked()
    monkeypatch.setenv(sharding.VERSION, "2")
    assert sharding_asked()
    with pytest.raises(HYWUError, match="the strategy is 'shared'"):
        toy.make_trainer(tmp_path, "shared")
    monkeypatch.setenv(sharding.OFFLOAD, "true")
    with pytest.raises(HYWUError, match="fsdp_offload_params"):
        sharding_asked()


def test_accelerate_has_nothing_to_wrap(monkeypatch):
    """On a GPU it would want to shard the module itself, and refuse an optimizer alone."""
    seen, real = [], accelerate_package.Accelerator

    def made(**options):
        seen.append(os.environ.get(sharding.ASKED))
        return real(**options)

    monkeypatch.setattr(accelerate_package, "Accelerator", made)
    monkeypatch.setenv(sharding.ASKED, "true")
    devices.make_accelerator("cpu", "no")
    assert seen == [None]
    assert os.environ[sharding.ASKED] == "true"


def test_the_blocks_of_a_base_are_the_outermost_ones_that_can_be_called():
    from torch import nn

    block = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    inside, holder = nn.Linear(2, 2), nn.Module()
    holder.lists = nn.ModuleList([block])
    lists = nn.ModuleList([nn.ModuleList([nn.Identity()]), nn.ModuleDict({"a": inside}), holder])
    assert repeated(nn.Sequential(nn.Linear(2, 2), lists)) == [inside, block]
