"""Training the bundled editor itself, on the pretraining tasks and on words without meaning."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..bases.bundled.checkpoint import save_editor
from ..bases.bundled.sampling import edit
from ..bases.bundled.transformer import TransformerEditor as Editor
from ..training.base import Batch, Draws
from ..training.schedule import TrainConfig
from ..training.strategies import FullFineTuning
from ..training.trainer import Trainer
from .images import PACKAGES, ImagePool
from .phrasings import nonsense
from .tasks import PRETRAINING, make_batch

#: What is not known is left as it is: words without meaning ask for the identity.
UNKNOWN = "unknown"
WEIGHTS = "editor.safetensors"
#: AdamW's.
BETAS = (0.9, 0.95)


def pretrain(
    editor: Editor,
    pool: ImagePool,
    config: TrainConfig,
    folder: Path,
    samples: ImagePool | None = None,
    save_every: int = 200,
    commit: str = "",
    device: str | None = None,
) -> int:
    """Train `editor` in place through the one `Trainer`; returns the steps done, fewer than asked when it
    was interrupted (Ctrl-C). With every state the averaged weights are left as an editor's file.

    Raises HYWUError when `folder` holds a run with other settings.
    """
    base = Pretraining(editor)
    batches = PretrainingBatches(pool, config.batch_size, editor.config.train_size, config.seed)

    def write(step: int) -> None:
        with trainer.average.swapped():
            save_editor(editor, folder / WEIGHTS, provenance(config, step, commit))

    trainer = Trainer(
        base, FullFineTuning(base, of_itself=True), batches, config, folder, on_save=write,
        samples=None if samples is None else sample_batch(samples, editor.config.train_size),
        save_every=save_every, sample_every=save_every, device=device,
        identity={"tasks": [*PRETRAINING, UNKNOWN]},
    )  # fmt: skip
    trainer.run()
    return trainer.step


class PretrainingBatches:
    """step -> examples of all pretraining tasks and of words without meaning, which ask for the identity."""

    def __init__(self, pool: ImagePool, batch_size: int, size: int, seed: int = 0) -> None:
        self.pool, self.batch_size, self.size, self.seed = pool, batch_size, size, seed

    def __call__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        names = [*PRETRAINING, UNKNOWN]
        clean = self.pool.crops(self.batch_size, self.size, generator)
        picks = torch.randint(len(names), (self.batch_size,), generator=generator).tolist()
        chosen = [names[pick] for pick in picks]
        known = ["identity" if name == UNKNOWN else name for name in chosen]
        batch = make_batch(clean, known, generator, carriers=True)
        texts = [
            nonsense(generator) if name == UNKNOWN else text
            for name, text in zip(chosen, batch.instruction, strict=True)
        ]
        return replace(batch, instruction=tuple(texts))


class Pretraining:
    """The editor as the loop trains all of it: flow matching, the error of the predicted clean image."""

    name = "hywu-bundled-editor"

    def __init__(self, editor: Editor) -> None:
        self.module = editor

    def draw(self, batch: Batch, seed: int) -> Draws:
        """noise ``[B, 3, H, W]``; t ``[B]`` in (0, 1]."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch.source.shape, generator=generator)
        # sampling starts at t = 1, where the error counts whole: half of the draws lie above 0.7
        times = torch.rand(len(batch), generator=generator).sqrt().clamp_min(1e-3)
        return {"noise": noise, "t": times}

    def loss(self, module: Editor, batch: Batch, draws: Draws) -> Tensor:
        """Squared error of each item ``[B]``, in units of -1..1."""
        source, target, t = batch.source * 2 - 1, batch.target * 2 - 1, draws["t"]
        at = t[:, None, None, None]
        text, mask = module.encode_text(batch.instruction)
        clean = module.predict((1 - at) * target + at * draws["noise"], t, source, text, mask)
        return (clean.float() - target).square().mean(dim=(1, 2, 3))

    def edit(self, module: Editor, batch: Batch, seed: int) -> Tensor:
        return edit(module, batch.source, batch.instruction, steps=4, seed=seed)


def sample_batch(pool: ImagePool, size: int) -> Batch:
    """A held-out crop for each task."""
    generator = torch.Generator().manual_seed(1)
    names = list(PRETRAINING)
    return make_batch(pool.crops(len(names), size, generator), names, generator)


def provenance(config: TrainConfig, step: int, commit: str) -> dict[str, object]:
    """What the weights come from; JSON-safe."""
    return {
        "commit": commit,
        "steps": step,
        "training": config.to_json(),
        "tasks": [*PRETRAINING, UNKNOWN],
        "data": dict(PACKAGES.values()),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
