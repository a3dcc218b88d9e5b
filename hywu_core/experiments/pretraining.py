"""Training the bundled editor itself, in stages, on the pretraining tasks and on unknown requests."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..bases.bundled.checkpoint import save_editor
from ..bases.bundled.model import Editor
from ..bases.bundled.training import AT_START, EditorBase, at_start
from ..training.base import Batch, Draws
from ..training.schedule import TrainConfig
from ..training.strategies import FullFineTuning
from ..training.trainer import Trainer
from .images import ImagePool, data_provenance
from .pretraining_tasks import PRETRAINING, SPATIAL
from .tasks import make_batch
from .unknown_requests import unknown_request

#: The task of requests that the editor doesn't know: the image is left as it is.
UNKNOWN = "unknown"
WEIGHTS = "editor.safetensors"


@dataclass(frozen=True)
class Stage:
    """A part of the pretraining, in a folder of its own below the run's.

    error, smallest: see `EditorBase`.
    size: side of the crops.
    batch: in those of the command.
    schedule: see `TrainConfig`; a constant one can be gone on with beyond its end.
    unknown: share of requests that the editor doesn't know.
    """

    name: str
    error: str
    smallest: float = 5e-4
    size: int = 64
    batch: float = 1.0
    schedule: str = "constant"
    unknown: float = 0.06


#: Large errors first: the logarithm counts most what is nearly right, and a network that can't tell
#: tasks apart yet learns from it to leave every image alone. On small crops, for the more instructions
#: there are the sooner they are told apart. Then ever smaller errors, and last, at falling rates, what
#: a crop of 64 pixels can't show. Once tasks are told apart more unknown requests do no harm, and the last
#: stage has twice as many: after the stages before, "add a red hat" still made a red tint.
STAGES = (
    Stage("first", "mse", size=32, batch=2.0),
    Stage("main", "log", 2e-2),
    Stage("fine", "log"),
    Stage("last", "log", size=128, batch=1 / 3, schedule="cosine", unknown=0.12),
)


class PretrainingBase(EditorBase):
    """The editor as it is pretrained: half of the draws are at t = 1, where sampling starts, the others of
    the square root of a uniform draw.

    Below t = 1 the noisy image shows the edit, and a network learns to clean it long before it learns to read
    the instruction.
    """

    def draw(self, batch: Batch, seed: int) -> Draws:
        draws = super().draw(batch, seed)
        t = draws["t"].sqrt().clamp_min(1e-3)
        return {**draws, "t": t.masked_fill(at_start(len(batch), AT_START, seed), 1)}


class PretrainingBatches:
    """Random tasks on random crops, those that look at neighbours twice as often as tones; requests for
    what the editor doesn't know leave clean, damaged and edited images alone. A function of the step.
    """

    def __init__(
        self,
        pool: ImagePool,
        batch_size: int,
        size: int,
        seed: int = 0,
        unknown: float = Stage.unknown,
    ) -> None:
        self.pool, self.batch_size, self.size, self.seed = pool, batch_size, size, seed
        self.unknown = unknown
        self.names = [*PRETRAINING, *SPATIAL]

    def __call__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        clean = self.pool.crops(self.batch_size, self.size, generator)
        picks = torch.randint(len(self.names), (self.batch_size,), generator=generator).tolist()
        batch = make_batch(clean, [self.names[i] for i in picks], generator, carriers=True)
        unknown = torch.rand(self.batch_size, generator=generator) < self.unknown
        # what came before an edit or after it, as it is
        before = torch.rand(self.batch_size, 1, 1, 1, generator=generator) < 0.5
        shown = torch.where(
            before.to(batch.source.device, non_blocking=True),
            batch.source,
            batch.target,
        )
        asked = [
            unknown_request(generator) if alone else text
            for text, alone in zip(batch.instruction, unknown.tolist(), strict=True)
        ]
        leave = unknown[:, None, None, None].to(batch.source.device, non_blocking=True)
        return replace(
            batch,
            source=torch.where(leave, shown, batch.source),
            target=torch.where(leave, shown, batch.target),
            instruction=tuple(asked),
            task=tuple(
                UNKNOWN if alone else task
                for task, alone in zip(batch.task, unknown.tolist(), strict=True)
            ),
        )


def pretrain(
    editor: Editor,
    pool: ImagePool,
    config: TrainConfig,
    folder: Path,
    stage: Stage = STAGES[0],
    samples: ImagePool | None = None,
    save_every: int = 200,
    commit: str = "",
    device: str | None = None,
) -> Trainer:
    """Train `editor` in place; the trainer says how many steps are done and whether it was interrupted.
    With every state the averaged weights are left as an editor's file.

    Raises HYWUError when `folder` holds a run with other settings.
    """
    base = PretrainingBase(editor, error=stage.error, smallest=stage.smallest)

    def write(step: int) -> None:
        with trainer.average.swapped():
            save_editor(editor, folder / WEIGHTS, provenance(config, stage, step, commit))

    trainer = Trainer(
        base,
        FullFineTuning(base, of_itself=True),
        PretrainingBatches(pool, config.batch_size, stage.size, config.seed, stage.unknown),
        config,
        folder,
        samples=None if samples is None else sample_batch(samples, stage.size),
        save_every=save_every,
        sample_every=5 * save_every,
        device=device,
        identity={"stage": asdict(stage), "tasks": [*PRETRAINING, UNKNOWN]},
        on_save=write,
    )
    trainer.run()
    return trainer


def provenance(config: TrainConfig, stage: Stage, step: int, commit: str) -> dict[str, Any]:
    """What the weights come from; JSON-safe."""
    return {
        "commit": commit,
        "steps": step,
        "stage": asdict(stage),
        "training": config.to_json(),
        "tasks": [*PRETRAINING, UNKNOWN],
        "data": data_provenance(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }


def sample_batch(pool: ImagePool, size: int) -> Batch:
    """Held-out crops, one for each task."""
    generator, names = torch.Generator().manual_seed(1), list(PRETRAINING)
    return make_batch(pool.crops(len(names), size, generator), names, generator)
