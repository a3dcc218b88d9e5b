"""Train a generator for a denoiser of your own, here a flow-matching network that sees noise beside the source.

    python docs/examples/own_denoiser.py pairs.jsonl runs/own [STEPS]

The network is small and freshly initialized: put your own, with its weights, there."""

import sys
import zlib
from pathlib import Path

import torch
from torch import nn

from hywu_core import Condition, GeneratorConfig, LoRALayout, load_generator
from hywu_core import training as hywu

SIZE, PATCH, WIDTH = 32, 4, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (12, -1)).transpose(1, 2).chunk(3, 1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Denoiser(nn.Module):  # x_t, t and the source in, velocity out: what your own model is
    def __init__(self):
        super().__init__()
        self.read, self.time = nn.Conv2d(6, WIDTH, PATCH, PATCH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.write = nn.Conv2d(WIDTH, 3 * PATCH**2, 1)

    def forward(self, x, t, source):
        x = self.read(torch.cat([x, source], 1)) + self.time(t[:, None])[..., None, None]
        tokens = x.flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return nn.functional.pixel_shuffle(self.write(tokens.mT.unflatten(2, x.shape[2:])), PATCH)


class OwnBase:  # all that the loop asks of a base model: `hywu_core.training.BaseModel`
    name, encoder = "my-denoiser", {"type": "hashed-words"}
    condition_parts = {"words": 32}

    def __init__(self):
        torch.manual_seed(0)
        self.module = Denoiser().eval().requires_grad_(False)

    def encode(self, source, instruction):
        seeds = [zlib.crc32(text.lower().encode()) for text in instruction]
        rows = [torch.randn(1, 32, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return Condition({"words": torch.stack(rows).to(source)})

    def draw(self, batch, seed):
        random = torch.Generator().manual_seed(
            seed
        )  # a function of the seed: runs go on to the bit
        noise = torch.randn(batch.source.shape, generator=random)
        return {"noise": noise, "t": torch.rand(len(batch), generator=random)}

    def loss(self, module, batch, draws):
        t, noise = draws["t"][:, None, None, None], draws["noise"]
        source, target = 2 * batch.source - 1, 2 * batch.target - 1
        velocity = module((1 - t) * target + t * noise, draws["t"], source)
        return (velocity - (noise - target)).square().mean(dim=(1, 2, 3))

    def edit(self, module, batch, seed=0, steps=8):
        x, source = self.draw(batch, seed)["noise"].to(batch.source), 2 * batch.source - 1
        for i in range(steps):
            x = x - module(x, x.new_full((len(x),), 1 - i / steps), source) / steps
        return (x.clamp(-1, 1) + 1) / 2


def main(data, out, steps=300):
    base, out = OwnBase(), Path(out)
    trained, kept = hywu.held_out(hywu.read_pairs(data)[0], share=0.2)
    layout, made_for = (
        LoRALayout.of(base.module, rank=4),
        {"encoder": base.encoder, "base": base.name},
    )
    config = GeneratorConfig.of_size(layout, "XS", base.condition_parts, **made_for)
    settings = hywu.TrainConfig(steps, batch_size=8, lr=6e-4, optimizer="muon")
    watch = hywu.Validation(hywu.PairBatches(kept, 8, SIZE).once())
    batches = hywu.Ahead(hywu.PairBatches(trained, batch_size=8, size=SIZE))
    trainer = hywu.Trainer(base, hywu.HyperNetwork(base, config), batches, settings, out, validation=watch)  # fmt: skip
    before = trainer.mean_loss((batch, i) for i, batch in enumerate(watch.batches))
    trainer.run()  # Ctrl-C keeps a state; the same call goes on
    after = trainer.mean_loss((batch, i) for i, batch in enumerate(watch.batches))
    sys.stdout.write(f"loss, held out: {before:.4f} before, {after:.4f} trained\n")
    if trainer.accelerator.is_main_process:  # the first of those that torchrun started
        path = trainer.export(out / "generator.safetensors", {"data": data})
        generator = load_generator(path, trainer.device, torch.float32)
        batch = watch.batches[0].to(trainer.device)
        lora = generator(base.encode(*batch.asked).select([0]))
        lora.save(out / "peft", format="peft", overwrite=True)  # PEFT loads it into the base


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
