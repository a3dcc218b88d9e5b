"""What Train Generator trains through a tiny Wan: its loss, its gradients, and that two contradictory tasks are told apart."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from hywu_nodes.hywu_core.condition import Condition
from hywu_nodes.hywu_core.generator.config import GeneratorConfig
from hywu_nodes.hywu_core.layout import LoRALayout
from hywu_nodes.hywu_core.training.base import Batch
from hywu_nodes.hywu_core.training.recompute import HeldNetwork
from hywu_nodes.hywu_core.training.schedule import TrainConfig
from hywu_nodes.hywu_core.training.strategies import StaticLoRA
from hywu_nodes.hywu_core.training.trainer import Trainer
from hywu_nodes.nodes.host.cache import TensorCache
from hywu_nodes.nodes.host.train import files
from hywu_nodes.nodes.host.train.base import HostBase
from hywu_nodes.nodes.host.train.conditions import CachedEncoder
from hywu_nodes.nodes.host.train.data import FixedCrops
from hywu_nodes.nodes.host.train.memory import (
    autograd_through_host,
    plain_patcher,
    recomputed,
)
from pairs import SIZE, TASKS, make_pairs
from torch import Tensor


@pytest.fixture(scope="module")
def make_base(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")

    def make(model=None, kind: type[HostBase] = HostBase, reads: str = "encoders") -> HostBase:
        cache = TensorCache(folder / "cache")
        patcher = plain_patcher(model or loaded[0])
        encoder = CachedEncoder(patcher, loaded[2], None, cache, reads, loaded[1], SIZE)
        made = kind(patcher, loaded[1], encoder, cache, "none", 2)
        made.load()
        return made

    return make


def make_generator(base: HostBase, layout: LoRALayout, seed: int = 1) -> HeldNetwork:
    config = GeneratorConfig(
        layout, dict(base.condition_parts), 192, layout.rank, 128, 64, 1, lora_a_scale=0.05,
        lora_b_scale=0.6, encoder=dict(base.encoder), base=base.name,
    )  # fmt: skip
    torch.manual_seed(seed)
    return HeldNetwork(base, config, checkpointing=False)


def four(batch: int = 4) -> Batch:
    return FixedCrops(files.training_pairs("colour")[0], batch, SIZE, 1, 0)(0)


@pytest.mark.parametrize("kind", ["flow", "eps", "v_prediction"])
def test_the_loss_is_that_of_the_models_own_output(loaded, make_base, kind):
    """Against the error of the network's own output, written out for each kind of sampling."""
    model = loaded[0]
    with torch.inference_mode():
        if kind != "flow":
            model = ModelSamplingDiscrete().patch(model, kind, False)[0]
    with autograd_through_host(), torch.no_grad():
        base, batch, seen = make_base(model), four(), []
        draws = base.draw(batch, 0)
        handle = base.module.register_forward_hook(lambda m, a, out: seen.append(out))
        loss = base.loss(base.module, batch, draws)
        handle.remove()
        clean, noise = base.model.process_latent_in(base.latents(batch.target)), draws["noise"]
        sigmas = base.model.model_sampling.sigmas
        sigma = sigmas[(draws["u"] * len(sigmas)).long()].view(-1, 1, 1, 1, 1)
        cosine = (1 + sigma**2) ** -0.5
        wanted = {
            "flow": noise - clean,
            "eps": noise,
            "v_prediction": cosine * noise - sigma * cosine * clean,
        }[kind]
        own = (seen[0] - wanted).square().flatten(1).mean(1)
        base.patcher.detach()
    assert float(((loss - own) / own).abs().max()) < 1e-3


def test_recomputed_layers_give_the_same_gradients(make_base):
    gradients, runs = [], []
    with autograd_through_host():
        base = make_base()
        strategy = make_generator(base, LoRALayout.of(base.module, 2))
        torch.nn.init.normal_(strategy.trained.model.proj_out_B.weight, std=0.05)
        batch, layout = four(), strategy.trained.config.layout
        draws, layer = base.draw(batch, 0), base.module.blocks[0].self_attn
        handle = layer.register_forward_pre_hook(lambda *_: runs[-1].append(1))
        for again in (False, True):
            strategy.trained.zero_grad()
            strategy.trained.checkpointing = again
            runs.append([])
            with recomputed(base.module, layout) if again else contextlib.nullcontext():
                with strategy.adapted(batch) as module:
                    loss = base.loss(module, batch, draws).mean()
                loss.backward()
                strategy.release()
            gradients.append([p.grad.clone() for p in strategy.trained.parameters()])
        handle.remove()
    assert [len(run) for run in runs] == [1, 2]
    assert max(float(x.abs().max()) for x in gradients[0]) > 1e-4
    for one, two in zip(*gradients, strict=True):
        assert float((one - two).abs().max()) < 1e-4 * max(float(one.abs().max()), 1e-9)


# -- two contradictory tasks -------------------------------------------------------------------------

STEPS, RANK, IMAGES, VALIDATION = 120, 2, 16, 10_000


class OtherImage(HostBase):
    """Items come in pairs of one image in both tasks; each gets the condition of the next pair's image.

    So a condition tells the instruction and nothing about the image that is to be made.
    """

    def encode(
        self, source: Tensor, instruction: Sequence[str], references: Sequence[Any] = ()
    ) -> Condition:
        return super().encode(source.roll(2, 0), instruction, references)


class Balanced:
    """Four images per batch, each in both tasks, or in the one named; later steps are never trained on."""

    def __init__(self, crops: FixedCrops, task: str = "") -> None:
        self.crops, self.task = crops, task

    def __call__(self, step: int) -> Batch:
        chosen = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(step))[:4].tolist()
        batch = self.crops.batch([2 * i + side for i in chosen for side in (0, 1)])
        return batch.select([i for i, task in enumerate(batch.task) if self.task in ("", task)])


def validation_loss(trainer: Trainer, batches: Balanced) -> float:
    """Mean over batches of fresh noise, with the averaged weights."""
    base, losses = trainer.base, []
    with torch.no_grad(), trainer.average.swapped():
        for step in range(VALIDATION, VALIDATION + 8):
            whole = Balanced(batches.crops)(step)
            draws = base.draw(whole, step)
            kept = [i for i, task in enumerate(whole.task) if batches.task in ("", task)]
            batch, draws = whole.select(kept), {k: v[kept] for k, v in draws.items()}
            with trainer.strategy.adapted(batch) as module:
                losses.append(float(base.loss(module, batch, draws).mean()))
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def lora_losses(base, make_base, tmp_path_factory):
    """(crops, train a strategy and give its validation loss, one LoRA for both tasks, one LoRA per task).

    All see the same examples, noise, text conditioning and schedule. The shared LoRA gets the best of
    two learning rates, the others one: what favours it.
    """
    make_pairs(base / "input" / "conflict", IMAGES)
    runs = tmp_path_factory.mktemp("runs")
    with autograd_through_host():
        crops = FixedCrops(files.training_pairs("conflict")[0], 8, SIZE, 1, 0)

        def run(strategy, rate: float, base: HostBase, task: str = "") -> float:
            batches = Balanced(crops, task)
            config = TrainConfig(STEPS, len(batches(0)), rate, warmup=20, seed=0)
            folder = runs / f"{type(strategy).__name__}{task}{rate:g}{len(list(runs.iterdir()))}"
            trainer = Trainer(base, strategy, batches, config, folder, device="cpu")
            trainer.run()
            loss = validation_loss(trainer, batches)
            getattr(strategy, "release", lambda: None)()
            return loss

        own = make_base(reads="model")
        layout = LoRALayout.of(own.module, RANK)

        def static(rate: float, task: str = "") -> float:
            torch.manual_seed(1)
            return run(StaticLoRA(own, layout), rate, own, task)

        shared = min(static(rate) for rate in (3e-2, 6e-2))
        single = sum(static(3e-2, task) for task in TASKS) / len(TASKS)
    return crops, run, shared, single


@pytest.mark.parametrize(
    ("reads", "kind", "part"),
    [("encoders", HostBase, "text"), ("model", OtherImage, "hidden_states")],
)
def test_two_contradictory_tasks(make_base, lora_losses, reads, kind, part):
    """The excess loss of one static LoRA over one per task falls by at least half with a generator.

    It reads a text encoder's tokens, or nothing but the MODEL's own hidden states, of another image
    than the one to be made: the instruction alone must tell the tasks apart.
    """
    crops, run, shared, single = lora_losses
    assert shared - single > 0.005
    with autograd_through_host():
        base = make_base(kind=kind, reads=reads)
        assert list(base.condition_parts) == [part]
        strategy = make_generator(base, LoRALayout.of(base.module, RANK))
        # all of them, before a LoRA lies on the MODEL whose states they are
        whole = crops.batch(range(len(crops)))
        strategy.standardize([base.encode(whole.source, whole.instruction)])
        loss = run(strategy, 2e-3, base)
    assert 1 - (loss - single) / (shared - single) > 0.5
