"""The training loop: what it trains, what it leaves alone, and that it goes on where it stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import toy_base as toy

from hywu_core.errors import HYWUError
from hywu_core.files import read_tensors
from hywu_core.generator.checkpoints import load_generator
from hywu_core.injection import inject
from hywu_core.training.logs import plot_loss, read_log
from hywu_core.training.schedule import OPTIMIZERS, TrainConfig, chosen_precision, lr_at
from hywu_core.training.state import recorded_precision
from hywu_core.training.strategies import StaticLoRA, count_parameters, rank_for
from hywu_core.training.trainer import STATE

STRATEGIES = ["hywu", "shared", "sft"]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "state.safetensors")[0]


def largest_difference(one: dict, two: dict) -> float:
    assert one.keys() == two.keys()
    return max(float((one[key] - two[key]).abs().max()) for key in one)


@pytest.mark.parametrize("name", STRATEGIES)
def test_loss_falls_and_the_base_stays(tmp_path, name):
    trainer = toy.make_trainer(tmp_path, name, steps=30, lr=1e-2)
    before = {k: v.clone() for k, v in trainer.base.module.state_dict().items()}
    assert trainer.run()
    rows = read_log(tmp_path / "log.csv")
    first, last = (sum(r["loss"] for r in part) for part in (rows[:5], rows[-5:]))
    assert last < 0.9 * first
    for key, value in trainer.base.module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert len(list((tmp_path / "samples").glob("*.png"))) == 7
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, name, optimizer):
    toy.make_trainer(tmp_path / "whole", name, optimizer=optimizer).run()
    assert not toy.make_trainer(tmp_path / "cut", name, optimizer=optimizer).run(until=3)
    assert toy.make_trainer(tmp_path / "cut", name, optimizer=optimizer).run()
    assert largest_difference(trained(tmp_path / "whole"), trained(tmp_path / "cut")) == 0
    steps = [row["step"] for row in read_log(tmp_path / "cut" / "log.csv")]
    assert steps == list(range(1, 9))


def test_only_the_generator_learns_contradictory_tasks(tmp_path):
    losses = {}
    for name in ("hywu", "shared"):
        toy.make_trainer(tmp_path / name, name, steps=150, lr=1e-2).run()
        losses[name] = sum(r["loss"] for r in read_log(tmp_path / name / "log.csv")[-10:]) / 10
    # the toy base does not see the instruction, so no static change beats the mean of both tasks
    assert losses["shared"] > 0.03
    assert losses["hywu"] < 0.3 * losses["shared"]


def test_accumulated_parts_equal_the_whole_batch(tmp_path):
    toy.make_trainer(tmp_path / "one").run()
    toy.make_trainer(tmp_path / "four", accumulation=4).run()
    one, four = trained(tmp_path / "one"), trained(tmp_path / "four")
    one = {k: v for k, v in one.items() if k.startswith("parameters.")}
    four = {k: four[k] for k in one}
    # Adam's first steps are as large as the rate (5e-3) whatever the gradient, so rounding shows
    assert largest_difference(one, four) < 1e-3


def test_interrupt_keeps_a_resumable_state(tmp_path):
    trainer = toy.make_trainer(tmp_path / "cut", steps=400)

    def press_ctrl_c():
        while not trainer.step:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    assert not trainer.run()
    thread.join()
    assert trainer.interrupted
    assert 0 < trainer.step < 400
    toy.make_trainer(tmp_path / "cut", steps=400).run(until=trainer.step + 3)
    toy.make_trainer(tmp_path / "whole", steps=400).run(until=trainer.step + 3)
    assert largest_difference(trained(tmp_path / "cut"), trained(tmp_path / "whole")) == 0


def test_other_settings_or_strategy_are_refused(tmp_path):
    toy.make_trainer(tmp_path).run(until=2)
    with pytest.raises(HYWUError, match=r"lr 0\.005 -> 0\.001"):
        toy.make_trainer(tmp_path, lr=1e-3).run()
    with pytest.raises(HYWUError, match="strategy hywu -> shared"):
        toy.make_trainer(tmp_path, "shared").run()


def test_divergence_is_an_error_and_keeps_the_last_state(tmp_path):
    toy.make_trainer(tmp_path).run(until=4)
    trainer = toy.make_trainer(tmp_path)
    good = trainer.base.loss
    trainer.base.loss = lambda *args: good(*args) * float("nan")
    with pytest.raises(HYWUError, match="lower learning rate"):
        trainer.run()
    assert all(torch.isfinite(v).all() for v in trained(tmp_path).values())


def test_batch_that_cannot_be_split_is_refused(tmp_path):
    with pytest.raises(HYWUError, match="multiple of 3"):
        toy.make_trainer(tmp_path, accumulation=3)


def test_bf16_autocast_trains(tmp_path):
    trainer = toy.make_trainer(tmp_path, steps=30, lr=1e-2, precision="bf16")
    trainer.run()
    rows = read_log(tmp_path / "log.csv")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(p.dtype == torch.float32 for p in trainer.parameters.values())


@pytest.mark.parametrize(
    ("flags", "wanted"), [((False, False), "no"), ((True, False), "bf16"), ((False, True), "bf16")]
)
def test_auto_is_bf16_only_where_the_cpu_has_it(monkeypatch, flags, wanted):
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name, flag in zip(names, flags, strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda flag=flag: flag, raising=False)
    assert chosen_precision("auto", None, "cpu") == wanted
    assert chosen_precision("fp16", None, "cpu") == "fp16"
    for name in names:
        monkeypatch.delattr(torch.cpu, name)
    assert chosen_precision("auto", None, "cpu") == "no"


def test_auto_goes_on_in_the_precision_of_the_interrupted_run(tmp_path):
    assert recorded_precision(tmp_path / STATE) is None
    toy.make_trainer(tmp_path, steps=4, precision="bf16").run(until=2)
    recorded = recorded_precision(tmp_path / STATE)
    precision = chosen_precision("auto", recorded, "cpu")
    assert toy.make_trainer(tmp_path, steps=4, precision=precision).run()


def test_exported_generator_makes_the_edits_of_the_trainer(tmp_path):
    trainer = toy.make_trainer(tmp_path, steps=20)
    trainer.run()
    path = trainer.export(tmp_path / "generator.safetensors", {"commit": "abc"})
    generator = load_generator(path, dtype=torch.float32)
    assert generator.config.base == "toy"
    assert generator.config.encoder["type"] == "toy"
    assert generator.config.provenance["steps"] == 20
    assert generator.config.provenance["commit"] == "abc"
    batch = toy.batches(50)
    with torch.no_grad():
        lora = generator(trainer.base.encode(batch.source, batch.instruction))
        with inject(trainer.base.module, lora) as module:
            edits = trainer.base.edit(module, batch, 0)
    assert (edits - trainer.edit(batch)).abs().max() < 2e-3
    assert (edits - batch.source).abs().max() > 1e-2


def test_exported_peft_lora_makes_the_edits_of_the_trainer(tmp_path):
    trainer = toy.make_trainer(tmp_path, "shared", steps=20, lr=2e-2)
    trainer.run()
    with trainer.average.swapped(), torch.no_grad():
        lora = trainer.strategy.lora()
    batch = toy.batches(50)
    with torch.no_grad(), inject(trainer.base.module, lora) as module:
        edits = trainer.base.edit(module, batch, 0)
    assert (edits - trainer.edit(batch)).abs().max() < 1e-5


def test_average_is_an_exponential_mean(tmp_path):
    trainer = toy.make_trainer(tmp_path, "sft", steps=3, ema=0.5)
    seen = []
    update = trainer.average.update

    def spy(step):
        update(step)
        seen.append(trainer.parameters["out.bias"].detach().clone())

    trainer.average.update = spy
    start = trainer.parameters["out.bias"].detach().clone()
    trainer.run()
    expected = start
    for step, value in enumerate(seen):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert torch.allclose(trainer.average.values["out.bias"], expected, atol=1e-6)


def test_an_exception_under_averaged_weights_gives_the_weights_back(tmp_path):
    """And the training goes on to the same weights, averages and moments as one without it."""
    trainer = toy.make_trainer(tmp_path / "broken", steps=8)
    trainer.run(until=4)
    average = trainer.average
    weights = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    averages = {name: value.clone() for name, value in average.values.items()}
    with pytest.raises(RuntimeError, match="in the block"), average.swapped():
        inside = {name: p.detach() for name, p in trainer.parameters.items()}
        assert largest_difference(inside, averages) == 0
        assert largest_difference(inside, weights) > 0
        raise RuntimeError("in the block")
    after = {name: p.detach() for name, p in trainer.parameters.items()}
    assert largest_difference(after, weights) == 0
    assert largest_difference(average.values, averages) == 0
    trainer.run()
    toy.make_trainer(tmp_path / "whole", steps=8).run()
    assert largest_difference(trained(tmp_path / "broken"), trained(tmp_path / "whole")) == 0


def test_the_generator_keeps_nothing_of_its_weights_when_they_are_swapped(tmp_path):
    """Its prefix, which depends on no condition, is computed anew from the averages and back."""
    trainer = toy.make_trainer(tmp_path, steps=4)
    trainer.run()
    batch = toy.batches(50)
    condition = trainer.base.encode(batch.source, batch.instruction)
    generator = trainer.strategy.trained

    def kept_and_new():
        kept = generator(condition)
        generator.prefixes.clear()
        new = generator(condition)
        return max(float((kept[path].B - new[path].B).abs().max()) for path in kept)

    with torch.no_grad():
        generator(condition)
        assert generator.prefixes.found
        with trainer.average.swapped():
            assert kept_and_new() == 0
        assert kept_and_new() == 0


def test_schedule_warms_up_and_ends_low():
    config = TrainConfig(steps=100, lr=1.0, warmup=10, final_lr=0.1)
    rates = [lr_at(config, step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 <= rates[-1] < 0.11
    assert max(lr_at(TrainConfig(steps=1), s) for s in range(1)) > 0


def test_rank_for_a_parameter_count():
    base = toy.ToyBase()
    layout = toy.LoRALayout.of(base.module, 2)
    wanted = count_parameters(toy.make_strategy(base, "hywu"))
    strategy = StaticLoRA(base, layout.with_rank(rank_for(layout, wanted)))
    assert abs(count_parameters(strategy) - wanted) <= layout.with_rank(1).num_values


def test_standardized_conditions_are_folded_into_the_checkpoint(tmp_path):
    torch.manual_seed(2)
    base = toy.ToyBase()
    strategy = toy.make_strategy(base, "hywu")
    for parameter in strategy.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = toy.batches(0)
    plain = base.encode(batch.source, batch.instruction)
    # one channel that hardly varies and is a hundred times as large as the others
    tokens = plain.parts["hidden_states"].clone()
    tokens[..., 7] = 100 + 0.01 * tokens[..., 0]
    condition = type(plain)({"hidden_states": tokens}, fingerprint="toy")
    before = strategy.generate(condition)
    strategy.standardize([condition])
    with torch.no_grad():
        expected = strategy.generate(condition)
        strategy.export(tmp_path / "generator.safetensors", {})
        exported = load_generator(tmp_path / "generator.safetensors", dtype=torch.float32)(
            condition
        )
    path = next(iter(expected))
    assert not torch.allclose(before[path].A, expected[path].A, atol=1e-2)
    for key in expected:
        torch.testing.assert_close(exported[key].A, expected[key].A, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(exported[key].B, expected[key].B, atol=2e-2, rtol=2e-2)


def test_conditions_are_looked_at_where_the_base_is():
    """Batches come from the CPU, or from where crops are made; the base may be on a device by then."""
    base, seen = toy.ToyBase(), []
    strategy = toy.make_strategy(base, "hywu")
    base.module = torch.nn.Linear(2, 2, device="meta")
    base.encode = lambda source, *more: seen.append(source.device.type)
    strategy.standardize = lambda conditions: seen.append(len(conditions))
    strategy.standardize_on(toy.batches, 5)
    assert seen == ["meta"] * 4 + [4]


def test_a_loss_below_zero_is_plotted_too(tmp_path):
    rows = [{"step": step, "loss": -0.1 - 0.01 * step} for step in range(1, 40)]
    plot_loss(rows, tmp_path / "loss.png")
    from PIL import Image

    with Image.open(tmp_path / "loss.png") as plot:
        blue = sum(b > 150 > r for r, _, b in plot.convert("RGB").getdata())
    assert blue > 500
