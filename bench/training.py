"""A training step of HY-WU on the bundled editor: time and memory against the loop without generator.

python -m bench.training [--json FILE] [--repeats N]

"shared" is the same loop with one static LoRA through PEFT: the same base, batch, rank and optimizer.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from hywu_core.bases.bundled.model import Editor
from hywu_core.bases.bundled.training import EditorBase
from hywu_core.cli.console import say, table
from hywu_core.experiments.conflict.plan import ConflictPlan, Run
from hywu_core.experiments.conflict.runs import Runs
from hywu_core.experiments.images import ImagePool, split_files
from hywu_core.precision import usual_precision
from hywu_core.training.base import Batch
from hywu_core.training.strategies import Strategy, count_parameters
from hywu_core.training.trainer import Trainer

from .measure import paired, peak_memory, summary, write_json


def example(plan: ConflictPlan, size: int) -> Batch:
    """A batch of noise with instructions: the time of a step doesn't depend on what is seen."""
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(plan.batch_size, 3, size, size, generator=generator)
    tasks = tuple(plan.tasks[i % len(plan.tasks)] for i in range(plan.batch_size))
    texts = tuple(f"{task} the image" for task in tasks)
    return Batch(source, source.flip(3), texts, tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    args = parser.parse_args()
    plan = replace(ConflictPlan(), precision=usual_precision("cpu"))
    base = EditorBase(Editor())
    batch = example(plan, plan.crop_size)
    with tempfile.TemporaryDirectory() as folder:
        pool = ImagePool(split_files("train"))  # conditions are standardized on its crops
        runs = Runs(base, pool, plan, Path(folder))
        strategies: dict[str, Strategy] = {
            "shared": runs.strategy(Run("shared", plan.main_rank)),
            "hywu": runs.strategy(Run("hywu", plan.main_rank)),
            "hywu, checkpointing": runs.strategy(Run("hywu", plan.main_rank)),
        }
        strategies["hywu, checkpointing"].trained.checkpointing = True
        config = plan.training(Run("hywu", plan.main_rank), 4e-4, 1000, plan.batch_size)
        steps = {
            name: _step(Trainer(base, s, lambda step: batch, config, Path(folder), device="cpu"))
            for name, s in strategies.items()
        }
        figures = summary(paired(steps, args.repeats), "shared")
        memory = {name: peak_memory(step) for name, step in steps.items()}
    rows = [
        (
            name,
            f"{1 / figures[name]['wall_s']['median']:.2f}",
            f"{1 / figures[name]['wall_s']['paired_speedup']:.2f}",
            f"{memory[name] / 1e6:.0f}",
            f"{count_parameters(strategy):,}",
        )
        for name, strategy in strategies.items()
    ]
    say(f"batch of {plan.batch_size} at {plan.crop_size} pixels, precision {plan.precision}")
    table(rows, ("loop", "steps/s", "times shared's step", "peak MB of a step", "trained values"))
    write_json(args.json, {"times": figures, "peak_bytes": memory})


def _step(trainer: Trainer):
    return lambda: trainer._train_step(0)


if __name__ == "__main__":
    main()
