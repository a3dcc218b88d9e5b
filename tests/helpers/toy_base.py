"""A base model of a few thousand weights for the tests of the training loop; also run by processes.

Called as a script it trains a few steps: ``toy_base.py FOLDER STEPS UNTIL STRATEGY-OPTIMIZER…``, into a subfolder for
each; ``a/hywu-muon:8`` goes into another one, and to another step.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import torch
from torch import nn

from hywu_core.condition import Condition
from hywu_core.generator.config import GeneratorConfig
from hywu_core.layout import LoRALayout
from hywu_core.training import sharding
from hywu_core.training.base import Batch
from hywu_core.training.schedule import TrainConfig
from hywu_core.training.strategies import FullFineTuning, HyperNetwork, StaticLoRA
from hywu_core.training.trainer import Trainer

WIDTH = 12


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x)))


class ToyModel(nn.Module):
    """Pixels are mapped one by one, with the noise beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, source, noise):
        x = self.inp(torch.cat([source, noise], dim=1).flatten(2).mT)
        for layer in self.layers:
            x = layer(x)
        return source + self.out(x).mT.unflatten(2, source.shape[2:])


class ToyBase:
    name = "toy"

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = ToyModel().requires_grad_(False)

    encoder = {"type": "toy"}
    condition_parts = {"hidden_states": 8}

    @torch.no_grad()
    def encode(self, source, instruction):
        means = source.mean(dim=(2, 3))
        told = [[zlib.crc32(t.encode()) % 97 / 97, 1, 0, 0, 0] for t in instruction]
        text = torch.tensor(told, device=source.device)
        tokens = torch.cat([means, text], dim=1)[:, None].repeat(1, 2, 1)
        return Condition({"hidden_states": tokens}, fingerprint="toy")

    def draw(self, batch, seed):
        generator = torch.Generator().manual_seed(seed)
        return {"noise": torch.randn(batch.source.shape, generator=generator)}

    def loss(self, module, batch, draws):
        out = module(batch.source, draws["noise"])
        return (out.float() - batch.target).square().mean(dim=(1, 2, 3))

    def edit(self, module, batch, seed):
        return module(batch.source, torch.zeros_like(batch.source)).clamp(0, 1)


def batches(step: int, size: int = 8) -> Batch:
    """Half of the items are to be brightened, half darkened: one static change can't do both."""
    generator = torch.Generator().manual_seed(step)
    source = 0.3 + 0.4 * torch.rand(size, 3, 4, 4, generator=generator)
    tasks = ["brighten", "darken"] * (size // 2)
    sign = torch.tensor([1.0 if t == "brighten" else -1.0 for t in tasks])
    return Batch(source, source + 0.2 * sign[:, None, None, None], tuple(tasks), tuple(tasks))


def make_strategy(base: ToyBase, name: str, rank: int = 2):
    layout = LoRALayout.of(base.module, rank)
    if name == "sft":
        return FullFineTuning(base)
    if name == "shared":
        return StaticLoRA(base, layout)
    config = GeneratorConfig(
        layout, {"hidden_states": 8}, token_dim=8, dim_accumulation=1, d_model=16, head_dim=8,
        num_blocks=1, lora_b_scale=0.5, encoder=base.encoder, base=base.name,
    )  # fmt: skip
    return HyperNetwork(base, config, checkpointing=True)


#: Arguments of `Trainer`; all others of `make_trainer` are settings.
OPTIONS = ("device", "identity", "wandb", "on_step", "on_save", "channels_last", "save_every")


def make_trainer(folder: Path, name: str = "hywu", **settings) -> Trainer:
    torch.manual_seed(1)
    base = ToyBase()
    given = {key: settings.pop(key) for key in OPTIONS if key in settings}
    more = {"device": "cpu", "save_every": 4, **given}
    options = {"steps": 8, "batch_size": 8, "lr": 5e-3, "warmup": 2} | settings
    return Trainer(
        base, make_strategy(base, name), batches, TrainConfig(**options), folder,
        samples=batches(999), sample_every=4, **more,
    )  # fmt: skip


def count_parts(trainer: Trainer) -> None:
    """Write down how many values of base, generator, average and optimizer this process holds, and of how many."""
    moments = [s["exp_avg"] for s in trainer.optimizer.state.values()]
    held = {
        "base": [*trainer.base.module.layers.parameters()],
        "generator": [*trainer.strategy.trained.parameters()],
        "average": [*trainer.average.values.values()],
        "moments": moments,
    }
    counts = {
        name: [sum(sharding.local(t).numel() for t in tensors), sum(t.numel() for t in tensors)]
        for name, tensors in held.items()
    }
    rank = trainer.accelerator.process_index
    (trainer.folder / f"held_{rank}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    path, steps, until, *combinations = sys.argv[1:]
    for combination in combinations:
        name, _, own = combination.partition(":")
        folder = Path(path) / name
        strategy, optimizer = folder.name.split("-")
        trainer = make_trainer(folder, strategy, steps=int(steps), optimizer=optimizer)
        over = trainer.run(until=int(own or until))
        if over and trainer.accelerator.is_main_process:
            trainer.export(trainer.folder / "weights.safetensors", {})
        if trainer.shards is not None:
            count_parts(trainer)
