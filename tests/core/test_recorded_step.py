"""A step from buffers trains as an ordinary step does; on CUDA it is replayed from a graph."""

import pytest
import torch
from tiny_editor import random_editor

from hywu_core.bases.bundled.text import EncodedTexts, word_ids
from hywu_core.bases.bundled.training import EditorBase
from hywu_core.generator.config import GeneratorConfig
from hywu_core.layout import LoRALayout
from hywu_core.training.base import Batch
from hywu_core.training.graphs import WARM_UP, RecordedStep, suits
from hywu_core.training.schedule import TrainConfig
from hywu_core.training.strategies import FullFineTuning, HyperNetwork, StaticLoRA
from hywu_core.training.trainer import Trainer

TEXTS = ("blur it", "please make the whole photograph a good deal sharper", "", "darken")


def batches(step: int) -> Batch:
    g = torch.Generator().manual_seed(step)
    source = torch.rand(4, 3, 16, 16, generator=g)
    texts = tuple(TEXTS[(i + step) % 4] for i in range(4))
    return Batch(source, source.flip(3), texts, texts)


def strategy(name: str, base: EditorBase):
    torch.manual_seed(3)
    layout = LoRALayout.of(base.module, 2, exclude="text.*")
    if name == "sft":
        return FullFineTuning(base)
    if name == "shared":
        return StaticLoRA(base, layout)
    config = GeneratorConfig(
        layout, dict(base.condition_parts), token_dim=32, d_model=32, head_dim=16, num_blocks=1,
        dim_accumulation=2, lora_a_scale=0.05, lora_b_scale=0.6,
    )  # fmt: skip
    hywu = HyperNetwork(base, config)
    hywu.standardize_on(batches, 100)
    return hywu


def trainer(name: str, optimizer: str, folder, device: str) -> Trainer:
    base = EditorBase(random_editor(), error="log", at_start=0.5)
    base.module.to(device)
    config = TrainConfig(20, 4, 1e-3, warmup=2, optimizer=optimizer, precision="no")

    def padded(step: int) -> Batch:
        # as wide as the buffers: rounding must not differ, which Muon makes large where gradients are nothing
        batch = batches(step)
        tensors = {key: value.to(device) for key, value in base.text_tensors(batch).items()}
        return base.with_text_tensors(batch, tensors)

    return Trainer(base, strategy(name, base), padded, config, folder, device=device)


def trained(run: Trainer, steps: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradient norms ``[steps, 2]``, and how far each parameter and its average went."""
    start = {name: p.detach().clone() for name, p in run.parameters.items()}
    losses = torch.stack([run._train_step(step) for step in range(steps)]).cpu()
    moved = {name: (p.detach() - start[name]).cpu() for name, p in run.parameters.items()}
    average = {f"average.{n}": (v - start[n]).cpu() for n, v in run.average.values.items()}
    return losses, moved | average


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> torch.Tensor:
    """Differences over what was moved, one per tensor."""
    return torch.stack(
        [(found[k] - value).norm() / value.norm().clamp_min(1e-9) for k, value in expected.items()]
    )


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", ["hywu", "shared", "sft"])
def test_a_step_from_buffers_is_an_ordinary_step(tmp_path, name, optimizer):
    plain = trainer(name, optimizer, tmp_path / "plain", "cpu")
    assert plain.recorded is None
    fixed = trainer(name, optimizer, tmp_path / "fixed", "cpu")
    fixed.recorded = RecordedStep(fixed, record=False)
    (losses, moved), (others, found) = trained(plain, 4), trained(fixed, 4)
    assert torch.allclose(losses, others, rtol=1e-4)
    assert len(set(others[:, 0].tolist())) == 4
    # orthogonalized, a gradient of nothing but rounding is as large as any
    assert apart(found, moved).max() < 0.05
    assert apart(found, moved).median() < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", ["hywu", "shared", "sft"])
def test_a_replayed_step_is_an_ordinary_step(tmp_path, name, optimizer):
    plain = trainer(name, optimizer, tmp_path / "plain", "cuda")
    plain.recorded = None
    replayed = trainer(name, optimizer, tmp_path / "replayed", "cuda")
    assert suits(replayed)
    steps = WARM_UP + 6
    (losses, moved), (others, found) = trained(plain, steps), trained(replayed, steps)
    assert replayed.recorded._graph is not None
    assert torch.allclose(losses, others, rtol=1e-2)
    assert apart(found, moved).median() < 0.02


def test_texts_as_tensors_say_what_the_texts_say():
    base = EditorBase(random_editor())
    whole = base.text_tensors(batches(0))
    other = base.text_tensors(batches(1))
    assert {k: v.shape for k, v in whole.items()} == {k: v.shape for k, v in other.items()}
    batch = base.with_text_tensors(batches(0), whole)
    assert isinstance(batch.instruction, EncodedTexts)
    assert batch.instruction == TEXTS
    text, mask = base.module.encode_text(TEXTS)
    wide, counted = base.module.encode_text(batch.instruction)
    ids, _ = word_ids(TEXTS, base.module.config, torch.device("cpu"))
    length = ids.shape[1]
    assert torch.equal(counted[:, :length], mask)
    assert not counted[:, length:].any()
    assert torch.allclose(wide[:, :length][mask], text[mask], atol=1e-5)
