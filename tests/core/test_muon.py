"""Muon: steps of matrices are orthogonal and all else steps as with AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
import toy_base as toy
from torch import nn

from hywu_core.errors import HYWUError
from hywu_core.files import read_header, read_tensors, save_tensors
from hywu_core.training import muon
from hywu_core.training.logs import read_log
from hywu_core.training.muon import MATRIX_RATE, STEP_RMS, Muon, orthogonalized
from hywu_core.training.trainer import STATE

LR = 1e-2


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 8, 64), (2, 64, 8), (4, 2, 96), (4, 96, 2)])
def test_orthogonalized_keeps_the_singular_vectors(shape):
    # singular values over a tenfold range, far from alike
    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    s = torch.linspace(1, 0.1, s.shape[1]).expand_as(s)
    made = orthogonalized(u * s[:, None] @ vh)
    values = (u.mT @ made @ vh.mT).diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6
    assert values.max() < 1.25
    torch.testing.assert_close(u * values[:, None] @ vh, made, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(1, 200, 300), (3, 300, 200), (2, 129, 129), (1, 256, 512)])
def test_symmetric_products_by_blocks_change_nothing_but_rounding(shape, monkeypatch):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    by_blocks = orthogonalized(x)
    monkeypatch.setattr(muon, "BLOCK", 10_000)
    torch.testing.assert_close(by_blocks, orthogonalized(x), atol=2e-6, rtol=1e-4)
    both = orthogonalized(torch.cat([x, x]))
    torch.testing.assert_close(both[: len(x)], by_blocks, atol=2e-6, rtol=1e-4)


def test_the_fused_adamw_of_a_device_steps_alike_and_is_kept(monkeypatch):
    """On the CPU, which has it too: its count of steps lies with the weights, also after loading a state."""
    torch.manual_seed(0)
    modules = [nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.LayerNorm(6)}) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    optimizers = [Muon(m, LR, fused=fused) for m, fused in zip(modules, (False, True), strict=True)]
    for step in range(3):
        for module, optimizer in zip(modules, optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for parameter in module.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for one, two in zip(*(m.parameters() for m in modules), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    assert optimizers[1]._adamw.defaults["fused"]
    assert not optimizers[0]._adamw.defaults["fused"]


def test_a_matrix_steps_as_with_the_muon_of_torch(monkeypatch):
    reference = getattr(torch.optim, "Muon", None)
    if reference is None:
        pytest.skip("torch has an own Muon from 2.9 on")
    torch.manual_seed(0)
    mine, theirs = (nn.Linear(24, 40, bias=False) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    optimizers = (
        Muon(mine, LR),
        reference(
            theirs.parameters(),
            lr=LR * MATRIX_RATE,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        ),
    )
    before = mine.weight.detach().clone()
    # torch iterates in bfloat16 wherever it runs
    monkeypatch.setattr(muon, "_dtype", lambda like: torch.bfloat16)
    for step in range(5):
        gradient = torch.randn(40, 24, generator=torch.Generator().manual_seed(step))
        for layer, optimizer in zip((mine, theirs), optimizers, strict=True):
            layer.weight.grad = gradient.clone()
            optimizer.step()
    moved = (theirs.weight - before).norm()
    assert moved > 0.5
    assert (mine.weight - theirs.weight).norm() < 0.02 * moved


def test_a_step_has_the_size_of_one_of_adamw():
    layer = nn.Linear(48, 64, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(64, 48)
    Muon(layer, LR).step()
    size = (layer.weight - before).square().mean().sqrt()
    assert 0.6 < size / (LR * MATRIX_RATE * STEP_RMS) < 1.3


def test_a_fused_projection_steps_as_its_parts():
    torch.manual_seed(0)
    fused = nn.ModuleDict({"W_qkv": nn.Linear(8, 24, bias=False)})
    apart = nn.ModuleDict({part: nn.Linear(8, 8, bias=False) for part in "qkv"})
    gradient = torch.randn(24, 8) * torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(8)[:, None]
    fused["W_qkv"].weight.grad = gradient
    weights = [layer.weight for layer in apart.values()]
    for weight, whole, part in zip(
        weights, fused["W_qkv"].weight.chunk(3), gradient.chunk(3), strict=True
    ):
        weight.data.copy_(whole)
        weight.grad = part.clone()
    for module in (fused, apart):
        Muon(module, LR).step()
    torch.testing.assert_close(torch.cat(weights), fused["W_qkv"].weight)


def test_matrices_are_stepped_in_parts_of_bounded_size(monkeypatch):
    """The same steps, and never more at once than `AT_ONCE` numbers, or one matrix."""
    made = []

    def stepped(at_once: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layers = nn.ModuleDict({str(n): nn.Linear(8, 16, bias=False) for n in range(5)})
        layers["W_kv"] = nn.Linear(8, 32, bias=False)
        for parameter in layers.parameters():
            parameter.grad = torch.randn_like(parameter)
        monkeypatch.setattr(muon, "AT_ONCE", at_once)
        made.clear()
        Muon(layers, LR).step()
        return [parameter.detach() for parameter in layers.parameters()]

    monkeypatch.setattr(
        muon, "orthogonalized", lambda x: made.append(x.numel()) or orthogonalized(x)
    )
    whole = stepped(1 << 24)
    assert made == [7 * 128]
    parts = stepped(2 * 128)
    assert made == [256, 256, 128, 256]
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-3)
    assert len(stepped(1)) == 6
    assert made == [128] * 5 + [256]


def test_embeddings_biases_norms_and_heads_step_as_with_adamw():
    torch.manual_seed(0)
    layers = {
        "hidden": nn.Linear(6, 6),
        "proj_out_B": nn.Linear(6, 6),
        "embed": nn.Embedding(5, 6),
        "norm": nn.LayerNorm(6),
    }
    module = nn.ModuleDict(layers)
    twin = copy.deepcopy(module)
    optimizers = (
        Muon(module, LR),
        torch.optim.AdamW(twin.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0),
    )
    for step in range(3):
        for which, optimizer in zip((module, twin), optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for parameter in which.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    same = {
        name
        for (name, mine), other in zip(module.named_parameters(), twin.parameters(), strict=True)
        if torch.allclose(mine, other, atol=1e-6)
    }
    assert same == {name for name, _ in module.named_parameters()} - {"hidden.weight"}


def test_it_learns_contradictory_tasks(tmp_path):
    toy.make_trainer(tmp_path, steps=150, lr=5e-3, optimizer="muon").run()
    losses = [row["loss"] for row in read_log(tmp_path / "log.csv")]
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_a_state_of_before_goes_on_with_adamw_and_not_with_muon(tmp_path):
    toy.make_trainer(tmp_path).run(until=2)
    header, tensors = dict(read_header(tmp_path / STATE)), read_tensors(tmp_path / STATE)[0]
    del header["config"]["optimizer"]
    save_tensors(tmp_path / STATE, tensors, header, overwrite=True)
    with pytest.raises(HYWUError, match="optimizer adamw -> muon"):
        toy.make_trainer(tmp_path, optimizer="muon").run()
    assert toy.make_trainer(tmp_path).run()


def test_an_unknown_optimizer_is_refused(tmp_path):
    with pytest.raises(HYWUError, match="optimizer 'sgd'; it is adamw or muon"):
        toy.make_trainer(tmp_path, optimizer="sgd")
