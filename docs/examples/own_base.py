"""Train a generator for a base model of your own, here a vision transformer of transformers.

    python docs/examples/own_base.py pairs.jsonl runs/own [STEPS]

The network is small and freshly initialized: put `from_pretrained` there."""

import sys
import zlib
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForMaskedImageModeling

from hywu_core import Condition, GeneratorConfig, LoRALayout, load_generator
from hywu_core import training as hywu

SIZE, WIDTH, WORDS = 32, 96, 48
SHAPE = ViTConfig(
    hidden_size=WIDTH, num_attention_heads=4, intermediate_size=4 * WIDTH, num_hidden_layers=3,
    image_size=SIZE, patch_size=4, encoder_stride=4)  # fmt: skip


class OwnBase:  # all that the loop asks of a base model: `hywu_core.training.BaseModel`
    name = "my-vit"  # kept in the checkpoint, as is `encoder`: what makes the conditions
    encoder = {"type": "my-encoder", "words": WORDS}
    condition_parts = {"image": WIDTH, "words": WORDS}  # name -> width

    def __init__(self):
        torch.manual_seed(0)
        self.module = ViTForMaskedImageModeling(SHAPE).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, source, instruction):
        """What the generator reads: the base's own view of the image, and a vector for each word."""
        tokens = self.module.vit(source).last_hidden_state
        texts = [text.lower().split() for text in instruction]
        words = torch.zeros(len(texts), max(map(len, texts)), WORDS)
        mask = torch.zeros(words.shape[:2], dtype=torch.bool)
        for i, text in enumerate(texts):
            for j, word in enumerate(text):
                random = torch.Generator().manual_seed(zlib.crc32(word.encode()))
                words[i, j], mask[i, j] = torch.randn(WORDS, generator=random), True
        masks = {"words": mask.to(source.device)}
        return Condition({"image": tokens, "words": words.to(source)}, masks)

    def draw(self, batch, seed):
        return {}  # nothing random beside the examples; a denoiser draws noise and times here

    def loss(self, module, batch, draws):
        return (self.edit(module, batch) - batch.target).square().mean(dim=(1, 2, 3))

    def edit(self, module, batch, seed=0):
        return batch.source + module(batch.source).reconstruction


def main(data, out, steps=300):
    base, out = OwnBase(), Path(out)
    trained, kept = hywu.held_out(hywu.read_pairs(data)[0], share=0.2)
    batches = hywu.Ahead(hywu.PairBatches(trained, batch_size=8, size=SIZE))
    layout, reads = LoRALayout.of(base.module, rank=4), base.condition_parts
    made_for = {"encoder": base.encoder, "base": base.name}
    strategy = hywu.HyperNetwork(base, GeneratorConfig.of_size(layout, "XS", reads, **made_for))
    strategy.standardize_on(batches, 0)
    settings = hywu.TrainConfig(steps, batch_size=8, lr=6e-4, optimizer="muon")
    watch = hywu.Validation(hywu.PairBatches(kept, 8, SIZE).once())
    trainer = hywu.Trainer(base, strategy, batches, settings, out, validation=watch)
    trainer.run()  # Ctrl-C keeps a state; the same call goes on
    batch = watch.batches[0].to(trainer.device)
    before, after = (x.sub(batch.target).pow(2).mean() for x in (batch.source, trainer.edit(batch)))
    sys.stdout.write(f"mean squared error, held out: {before:.4f} unchanged, {after:.4f} edited\n")
    if trainer.accelerator.is_main_process:  # the first of those that torchrun started
        path = trainer.export(out / "generator.safetensors", {"data": data})
        generator = load_generator(path, trainer.device, torch.float32)
        lora = generator(base.encode(batch.source[:1], batch.instruction[:1]))
        lora.save(out / "peft", format="peft", overwrite=True)  # PEFT loads it into the base


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
