"""Gradient checkpointing of a base: less is kept, gradients stay to the bit, and the LoRAs are there when it runs again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy_base as toy

from hywu_core.cli import main
from hywu_core.files import read_tensors
from hywu_core.training.recompute import HeldNetwork, recomputed
from hywu_core.training.schedule import TrainConfig
from hywu_core.training.sharding import repeated
from hywu_core.training.trainer import Trainer

FORMER = Path(__file__).with_name("former_runs")


@pytest.fixture
def network():
    """A generator whose lora_B isn't zero, so that gradients reach all of it."""
    base = toy.ToyBase()
    plain = toy.make_strategy(base, "hywu")
    made = HeldNetwork(base, plain.trained.config)
    torch.manual_seed(3)
    torch.nn.init.normal_(made.trained.model.proj_out_B.weight, std=0.05)
    return base, made


def step(base, network) -> tuple[float, list[torch.Tensor], int]:
    """Loss, gradients, and the bytes that the base's forward keeps for the backward pass."""
    kept: set[tuple[int, int]] = set()

    def pack(tensor):
        kept.add((tensor.data_ptr(), tensor.untyped_storage().nbytes()))
        return tensor

    batch = toy.batches(3)
    network.trained.zero_grad()
    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with network.adapted(batch) as module, saved:
        loss = base.loss(module, batch, base.draw(batch, 5)).mean()
    loss.backward()
    grads = [p.grad.clone() for p in network.trained.parameters()]
    return float(loss.detach()), grads, sum(size for _, size in kept)


def test_gradients_are_the_same_and_less_is_kept(network):
    base, made = network
    blocks = repeated(base.module)
    assert len(blocks) == 2
    plain = step(base, made)
    with recomputed(blocks):
        again = step(base, made)
    assert all("forward" not in block.__dict__ for block in blocks)
    assert again[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))
    assert any(bool(grad.abs().sum() > 0) for grad in plain[1])
    assert again[2] < 0.7 * plain[2]


def test_a_base_that_lost_its_loras_before_it_ran_again_would_give_other_gradients(network):
    """What `HeldNetwork` is for: the ordinary network's hooks are gone by then."""
    base, made = network
    wanted = step(base, made)[1]
    batch = toy.batches(3)
    made.trained.zero_grad()
    with recomputed(repeated(base.module)), made.adapted(batch) as module:
        loss = base.loss(module, batch, base.draw(batch, 5)).mean()
        made.release()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()
    with recomputed(repeated(base.module)):
        again = step(base, made)[1]
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


def test_no_lora_is_on_the_base_when_it_makes_conditions_nor_after_release(network, monkeypatch):
    base, made = network
    hooks = []
    encode = base.encode

    def watched(*asked):
        hooks.append(sum(len(m._forward_hooks) for m in base.module.modules()))
        return encode(*asked)

    monkeypatch.setattr(base, "encode", watched)
    for _ in range(3):
        step(base, made)
    assert hooks == [0, 0, 0]
    made.close()
    assert sum(len(m._forward_hooks) for m in base.module.modules()) == 0


def test_a_training_gives_the_same_weights(tmp_path):
    for name in ("plain", "again"):
        torch.manual_seed(1)
        base = toy.ToyBase()
        config = toy.make_strategy(base, "hywu").trained.config
        torch.manual_seed(2)
        made = HeldNetwork(base, config)
        settings = TrainConfig(4, batch_size=8, lr=5e-3, accumulation=2)
        trainer = Trainer(base, made, toy.batches, settings, tmp_path / name, device="cpu")
        with recomputed(repeated(base.module) if name == "again" else []):
            assert trainer.run()
    one, other = (read_tensors(tmp_path / n / "state.safetensors")[0] for n in ("plain", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one | other)


def test_the_command_recomputes_the_base_too_and_trains_the_same(tmp_path, monkeypatch):
    from hywu_core.training import recompute

    ran = []
    real = recompute._recomputing
    monkeypatch.setattr(recompute, "_recomputing", lambda *a, **k: ran.append(1) or real(*a, **k))
    for name, more in (("plain", []), ("again", ["--checkpointing"])):
        command = ["train", "--out", str(tmp_path / name), "--data", str(FORMER / "pairs.jsonl"), "--steps", "2",
                   "--batch-size", "2", "--sample-every", "0", "--device", "cpu", "--d-model", "64",
                   "--precision", "no", "--editor", str(FORMER / "editor.safetensors"), *more]  # fmt: skip
        assert main(command) == 0
        assert bool(ran) == bool(more)
    one, other = (read_tensors(tmp_path / n / "state.safetensors")[0] for n in ("plain", "again"))
    assert all(torch.allclose(one[key], other[key], atol=1e-7) for key in one | other)
