"""What a run keeps and refuses: identity, moments, more steps, validation, early end, beginning with a checkpoint."""

from __future__ import annotations

import math
import os
import shlex
import sys
import types

import pytest
import torch
import toy_base as toy
from PIL import Image

from hywu_core.bases.bundled.checkpoint import bundled
from hywu_core.cli.main import main
from hywu_core.errors import HYWUError
from hywu_core.experiments.bundled import BEST, WEIGHTS, Request
from hywu_core.files import folder_lock, read_header, read_tensors, save_tensors
from hywu_core.generator.checkpoints import load_generator
from hywu_core.training.logs import read_log
from hywu_core.training.schedule import RATES, TrainConfig, lr_at
from hywu_core.training.strategies import HyperNetwork
from hywu_core.training.trainer import STATE, Trainer
from hywu_core.training.validation import FIELDS, Validation

FORMER = __import__("pathlib").Path(__file__).with_name("former_runs")


def command(out, *more: str, data="pairs.jsonl") -> list[str]:
    return ["train", "--out", str(out), "--data", str(FORMER / data), "--batch-size", "2",
            "--sample-every", "0", "--device", "cpu", "--precision", "no", "--strategy", "shared",
            "--editor", str(FORMER / "editor.safetensors"), *more]  # fmt: skip


def small(*more: str) -> list[str]:
    return ["--strategy", "hywu", "--d-model", "64", *more]


# -- identity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--rank", "3"], "rank 2 -> 3"),
        (["--optimizer", "adamw"], "optimizer muon -> adamw"),
        (["--seed", "5"], "seed 0 -> 5"),
        (["--task", "custom", "--strategy", "single"], "strategy shared -> single"),
        (["--strategy", "sft"], "strategy shared -> sft"),
        (["--error", "mse"], "error log -> mse"),
    ],
)
def test_a_run_of_other_settings_is_refused_by_name(tmp_path, capsys, changed, said):
    assert main(command(tmp_path, "--steps", "2")) == 0
    before = (tmp_path / STATE).read_bytes()
    assert main(command(tmp_path, "--steps", "3", *changed)) == 1
    assert said in capsys.readouterr().err
    assert (tmp_path / STATE).read_bytes() == before


def test_other_data_under_the_same_name_is_refused(tmp_path, capsys, write_pairs):
    path = write_pairs(tmp_path, 4)
    run = ["--data", str(path)]
    assert main(command(tmp_path / "run", "--steps", "2", *run)) == 0
    path.write_text("\n".join(path.read_text().splitlines()[:3]))
    assert main(command(tmp_path / "run", "--steps", "3", *run)) == 1
    assert "data " in capsys.readouterr().err


def test_two_runs_into_one_folder_are_refused(tmp_path, capsys):
    tmp_path.mkdir(exist_ok=True)
    with folder_lock(tmp_path):
        assert main(command(tmp_path, "--steps", "2")) == 1
    assert "another run is working on this folder" in capsys.readouterr().err
    assert not (tmp_path / STATE).exists()


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("counted", [True, False])
def test_a_state_without_one_of_its_moments_is_refused(tmp_path, moment, counted):
    toy.make_trainer(tmp_path).run(until=2)
    header, tensors = dict(read_header(tmp_path / STATE)), read_tensors(tmp_path / STATE)[0]
    gone = next(key for key in tensors if key.startswith(f"{moment}."))
    if not counted:  # as states of before
        del header["moments"]
    del tensors[gone]
    save_tensors(tmp_path / STATE, tensors, header, overwrite=True)
    if moment == "exp_avg_sq" and not counted:
        pytest.skip("a state of before doesn't say that there was one")
    with pytest.raises(HYWUError, match="the optimizer's state lacks"):
        toy.make_trainer(tmp_path).run()


@pytest.mark.parametrize("kind", ["parameters", "average", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_a_state_in_another_dtype_is_refused(tmp_path, kind, dtype):
    """As a tool that makes checkpoints smaller leaves it: half of what Adam knows would be zero."""
    toy.make_trainer(tmp_path).run(until=2)
    header, tensors = dict(read_header(tmp_path / STATE)), read_tensors(tmp_path / STATE)[0]
    name = next(key for key in tensors if key.startswith(f"{kind}."))
    tensors[name] = tensors[name].to(dtype)
    save_tensors(tmp_path / STATE, tensors, header, overwrite=True)
    with pytest.raises(HYWUError, match=f"{kind} of .* is stored as [FI]\\d+, it is trained in"):
        toy.make_trainer(tmp_path).run()


# -- more steps --------------------------------------------------------------------------------------


def test_a_finished_run_goes_on_beyond_its_end(tmp_path, caplog):
    assert toy.make_trainer(tmp_path, steps=4).run()
    first = read_tensors(tmp_path / STATE)[0]
    longer = toy.make_trainer(tmp_path, steps=9)
    assert longer.run()
    assert "goes on from step 4 to 9, where it was to end at 4" in caplog.text
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == list(range(1, 10))
    rates = [row["lr"] for row in read_log(tmp_path / "log.csv")]
    assert rates[4:] == pytest.approx([lr_at(longer.config, step) for step in range(4, 9)])
    after = read_tensors(tmp_path / STATE)[0]
    assert max(float((after[k] - first[k]).abs().max()) for k in first) > 1e-3
    with pytest.raises(HYWUError, match="steps 9 -> 6"):
        toy.make_trainer(tmp_path, steps=6).run()


def test_the_command_goes_on_with_the_warm_up_that_it_began_with(tmp_path):
    assert main(command(tmp_path, "--steps", "5")) == 0
    assert main(command(tmp_path, "--steps", "10")) == 0
    config = read_header(tmp_path / STATE)["config"]
    assert (config["steps"], config["warmup"]) == (10, 1)


# -- validation --------------------------------------------------------------------------------------


def validated(folder, patience: int = 0, **settings):
    trainer = toy.make_trainer(folder, save_every=2, **settings)
    best: list[int] = []
    held_out = [toy.batches(900), toy.batches(901)]
    trainer.validation = Validation(held_out, patience, lambda: best.append(trainer.step))
    return trainer, best


def test_the_best_measurement_is_told_and_logged(tmp_path):
    trainer, best = validated(tmp_path, steps=12, lr=1e-2)
    assert trainer.run()
    rows = read_log(tmp_path / "validation.csv", FIELDS)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    losses = [row["loss"] for row in rows]
    wanted = [
        row["step"] for i, row in enumerate(rows) if row["loss"] < min([math.inf, *losses[:i]])
    ]
    assert best == wanted
    assert losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(
        trainer.mean_loss([(toy.batches(900), 0), (toy.batches(901), 1)])
    )


def test_measuring_changes_nothing_and_goes_on(tmp_path):
    validated(tmp_path / "cut", steps=8)[0].run(until=4)
    validated(tmp_path / "cut", steps=8)[0].run()
    validated(tmp_path / "whole", steps=8)[0].run()
    toy.make_trainer(tmp_path / "without", steps=8).run()
    states = [read_tensors(tmp_path / n / STATE)[0] for n in ("cut", "whole", "without")]
    assert all(torch.equal(states[0][k], other[k]) for other in states[1:] for k in states[0])
    logs = [(tmp_path / n / "validation.csv").read_text() for n in ("cut", "whole")]
    assert logs[0] == logs[1]


def test_patience_ends_a_run_and_stays_ended(tmp_path):
    trainer, best = validated(tmp_path, patience=2, steps=400, lr=1e-2)
    worse = iter([3.0, 2.0, 2.5, 2.2, 1.0])
    trainer.mean_loss = lambda examples: next(worse)
    assert trainer.run()
    assert trainer.step == 8
    assert best == [2, 4]
    again, _ = validated(tmp_path, patience=2, steps=400, lr=1e-2)
    assert again.run()
    assert again.step == 8
    longer, _ = validated(tmp_path, patience=3, steps=400, lr=1e-2)
    assert not longer.run(until=9)
    assert longer.step == 9


def test_the_command_keeps_the_best_weights_and_says_what_to_do_next(tmp_path, capsys):
    more = small("--steps", "4", "--save-every", "2", "--validation", "0.4")
    assert main(command(tmp_path, *more)) == 0
    said = capsys.readouterr().out
    assert f"--generator {tmp_path / BEST}" in said
    assert load_generator(tmp_path / BEST).config.provenance["steps"] in (2, 4)
    assert read_header(tmp_path / STATE)["identity"]["validation"] == 0.4


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (["--strategy", "hywu", "--d-model", "64", "--rank", "3"], 5),
        (["--strategy", "shared"], 2),
        (["--strategy", "single", "--task", "custom"], 2),
        (["--strategy", "sft"], 1),
    ],
)
def test_the_printed_next_steps_work(tmp_path, capsys, monkeypatch, given, count):
    assert main(command(tmp_path, "--steps", "2", *given)) == 0
    said = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    steps = [shlex.split(line) for line in said if line.startswith("  hywu ")]
    assert len(steps) == count
    folder = "loras" if given[1] in ("shared", "single") else "hywu"
    copied = [line for line in said if line.startswith(f"  copy {tmp_path / WEIGHTS} into ")]
    assert [f"models/{folder}" in line for line in copied] == [True] * (given[1] != "sft")
    monkeypatch.chdir(tmp_path)
    Image.open(FORMER / "coffee.png").save("image.png")
    for words in steps:
        assert main(words[1:]) == 0, words
    assert len(edits_in(tmp_path / "results" / tmp_path.name)) == 2
    assert (tmp_path / "edited.png").exists() == (given[1] == "hywu")


def edits_in(folder) -> list[str]:
    """The results that an evaluation has made there."""
    return [p.name for p in folder.rglob("*.png") if not p.stem.endswith("_SRCIMG")]


def test_an_early_end_is_said(tmp_path, capsys, monkeypatch):
    worse = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(Trainer, "mean_loss", lambda self, examples: next(worse))
    more = ["--steps", "9", "--save-every", "2", "--validation", "0.4", "--patience", "2"]
    assert main(command(tmp_path, *more)) == 0
    said = capsys.readouterr().out
    assert "ended after 6 of 9 steps, 2 measurements without a better one" in said


# -- what is begun with ------------------------------------------------------------------------------


def test_a_run_begins_with_a_checkpoint(tmp_path, capsys):
    assert main(command(tmp_path / "one", *small("--steps", "3"))) == 0
    first = tmp_path / "one" / WEIGHTS
    assert (
        main(
            command(tmp_path / "two", *small("--steps", "1", "--init", str(first), "--lr", "1e-9"))
        )
        == 0
    )
    one, two = (load_generator(p / WEIGHTS) for p in (tmp_path / "one", tmp_path / "two"))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-6, rtol=1e-3), name
    assert main(command(tmp_path / "two", *small("--steps", "1"))) == 1
    assert "init " in capsys.readouterr().err


def test_a_checkpoint_of_another_encoder_is_refused(tmp_path):
    trainer = toy.make_trainer(tmp_path, steps=1)
    trainer.run()
    path = trainer.export(tmp_path / "generator.safetensors", {})
    other = toy.ToyBase()
    other.encoder = {"type": "other"}
    with pytest.raises(HYWUError, match=r"reads what .*toy.* makes, the base's encoder is .*other"):
        HyperNetwork.begun_with(other, path)
    begun = HyperNetwork.begun_with(toy.ToyBase(), path)
    assert all(p.requires_grad for p in begun.trained.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "single"}, "name it"),
        ({"task": "blur"}, "only then"),
        ({"strategy": "shared", "init": "bundled"}, "it goes with 'hywu'"),
        ({"validation": 0.1}, "share of --data"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"batch_size": -1, "data": FORMER}, "batch_size is -1"),
        ({"rank": 0}, "rank is 0"),
        ({"blocks": -2}, "blocks is -2"),
        ({"data": FORMER, "tasks": ["blur"]}, "says its tasks itself"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, said):
    with pytest.raises(HYWUError, match=said):
        Request(tmp_path, **options)


def test_rates_are_of_the_strategy_and_the_optimizer(tmp_path):
    for optimizer in ("muon", "adamw"):
        for strategy in ("shared", "sft"):
            out = tmp_path / optimizer / strategy
            more = ["--steps", "1", "--optimizer", optimizer, "--strategy", strategy]
            assert main(command(out, *more)) == 0
            assert read_header(out / STATE)["config"]["lr"] == RATES[optimizer][strategy]


def test_the_rates_are_those_that_made_the_bundled_weights():
    for name, strategy in {
        "generator": "hywu",
        "shared": "shared",
        "single_blur": "single",
    }.items():
        header = read_header(bundled(name))
        training = header.get("generator", header)["provenance"]["training"]
        assert RATES[training["optimizer"]][strategy] == training["lr"]


def test_a_constant_rate_stays_at_the_peak():
    config = TrainConfig(20, lr=1.0, warmup=4, schedule="constant")
    assert [lr_at(config, step) for step in range(4, 20)] == [1.0] * 16
    assert lr_at(config, 0) < 0.5
    assert TrainConfig(20).to_json().keys().isdisjoint({"schedule", "betas"})
    assert config.to_json()["schedule"] == "constant"
    with pytest.raises(HYWUError, match="schedule constant -> cosine"):
        TrainConfig(20, lr=1.0, warmup=4).check_same(config.to_json(), "state")


def test_channels_last_trains_the_same(tmp_path):
    toy.make_trainer(tmp_path / "one", "sft").run()
    toy.make_trainer(tmp_path / "two", "sft", channels_last=True).run(until=3)
    toy.make_trainer(tmp_path / "two", "sft", channels_last=True).run()
    one, two = (read_tensors(tmp_path / n / STATE)[0] for n in ("one", "two"))
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-4


# -- Weights & Biases --------------------------------------------------------------------------------


def test_weights_and_biases_get_one_run_per_folder_or_are_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(HYWUError, match="wandb is needed to log for Weights & Biases: .*pip inst"):
        toy.make_trainer(tmp_path, wandb=True).run()
    logged: dict[str, list[int]] = {}

    class Run:
        def __init__(self, **given):
            assert (given["project"], given["resume"]) == ("hywu", "allow")
            self.steps = logged.setdefault(given["id"], [])

        def log(self, values, step):
            assert values["loss"] > 0
            self.steps.append(step)

        def finish(self):
            self.steps.append(-1)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    toy.make_trainer(tmp_path, wandb=True).run(until=3)
    toy.make_trainer(tmp_path, wandb=True).run()
    assert list(logged.values()) == [[1, 2, 3, -1, 4, 5, 6, 7, 8, -1]]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_in_the_logs_place_is_said(tmp_path):
    os.mkfifo(tmp_path / "log.csv")
    with pytest.raises(HYWUError, match="is no file"):
        read_log(tmp_path / "log.csv")


@pytest.mark.parametrize(
    "data", [b"step,loss\n\xff\xfe", b'step,loss\n"' + b"x" * (1 << 24) + b"x"]
)
def test_a_log_that_is_no_text_is_said(tmp_path, data):
    (tmp_path / "log.csv").write_bytes(data)
    with pytest.raises(HYWUError, match="move it away"):
        read_log(tmp_path / "log.csv")
