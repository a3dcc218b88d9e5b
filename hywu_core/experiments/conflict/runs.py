"""Trains the experiment's strategies: builds each, tries its learning rates, goes on where it stopped; bundles."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ... import files
from ...devices import chosen_device
from ...errors import HYWUError
from ...files import atomic_path
from ...generator.config import GeneratorConfig
from ...layout import LoRALayout
from ...training.base import BaseModel, BatchSource
from ...training.state import state_header
from ...training.strategies import FullFineTuning, HyperNetwork, StaticLoRA, Strategy, rank_for
from ...training.trainer import STATE, Trainer
from ..images import ImagePool
from ..tasks import CONFLICT, TaskBatches
from .plan import LEARNING_RATES, ConflictPlan, Run

#: Steps from which validation batches are drawn: crops of the training images that no run trains on.
VALIDATION = 10_000_000
#: The base's modules that aren't adapted: all strategies see the instruction through its own frozen text
#: encoder.
EXCLUDE = "text.*"


class Runs:
    """The trainings of a plan in `folder`: ``tuning/``, ``runs/<name>/``, ``weights/<name>.safetensors``."""

    def __init__(
        self, base: BaseModel, pool: ImagePool, plan: ConflictPlan, folder: Path,
        provenance: dict[str, Any] | None = None, device: str | None = None,
    ) -> None:  # fmt: skip
        self.base, self.plan, self.folder = base, plan, folder
        self.provenance, self.device = dict(provenance or {}), device
        # crops are made where they are trained on, and conditions looked at before the first step
        self.pool = pool.on(device)
        base.module.to(chosen_device(device))

    # -- what is trained, on what ------------------------------------------------------------------

    def layout(self, rank: int) -> LoRALayout:
        return LoRALayout.of(self.base.module, rank, exclude=EXCLUDE)

    def generator_config(self, rank: int) -> GeneratorConfig:
        """All rows of a token share a position, so that each rank costs about the same."""
        return GeneratorConfig(
            self.layout(rank),
            dict(self.base.condition_parts),
            dim_accumulation=rank,
            encoder=dict(self.base.encoder),
            base=self.base.name,
            **asdict(self.plan.generator),
        )

    def strategy(self, run: Run) -> Strategy:
        """Freshly initialized, the same for the same plan and seed."""
        seed = self.plan.seed_of(run)
        torch.manual_seed(seed + 1)
        if run.strategy == "hywu":
            hywu = HyperNetwork(self.base, self.generator_config(run.rank))
            hywu.standardize_on(self.batches(run), VALIDATION)
            return hywu
        if run.strategy == "sft":
            return FullFineTuning(self.base)
        rank = run.rank
        if run.strategy == "shared_large":
            hywu = HyperNetwork(self.base, self.generator_config(self.plan.main_rank))
            trained = sum(p.numel() for p in hywu.trained.parameters())
            rank = rank_for(self.layout(1), trained)
            torch.manual_seed(seed + 1)
        return StaticLoRA(self.base, self.layout(rank), run.name)

    def batches(self, run: Run) -> BatchSource:
        plan = self.plan
        return TaskBatches(
            self.pool,
            plan.tasks,
            plan.batch_size,
            plan.crop_size,
            plan.seed_of(run),
            run.task,
            plan.written_steps,
        )

    # -- learning rate -----------------------------------------------------------------------------

    def learning_rate(self, run: Run) -> float:
        """The best of the strategy's learning rates, tried at the main rank on the run's own task.

        Judged by the loss on other crops of the training images; kept in ``tuning/``.
        """
        rates = LEARNING_RATES[self.plan.optimizer][run.strategy]
        if not self.plan.tune_steps:
            return rates[len(rates) // 2]
        trial = Run(run.strategy, self.plan.main_rank if run.rank else 0, run.task)
        losses = {rate: self._try(trial, rate) for rate in rates}
        return min(losses, key=losses.get)

    def _try(self, run: Run, rate: float) -> float:
        path = self.folder / "tuning" / f"{run.name}_{rate:g}.json"
        wanted = {"plan": _trained_by(self.plan, run), "lr": rate, "steps": self.plan.tune_steps}
        if path.exists():
            found = files.read_json(path, dict, "remove it to try the rate anew", finite=False)
            loss = found.get("loss")  # infinite where the rate diverged
            known = isinstance(loss, float) and not math.isnan(loss)
            if known and {key: found.get(key) for key in wanted} == wanted:
                return loss
        trainer = self._trainer(run, rate, self.plan.tune_steps, path.with_suffix(""))
        try:
            trainer.run()
            loss = self.validation_loss(trainer, run)
        except ValueError as error:
            # a rate that diverges is a result of the trial, not an error of the experiment
            if "learning rate" not in str(error):
                raise
            loss = float("inf")
        if trainer.interrupted:
            raise KeyboardInterrupt
        write_json(path, {**wanted, "loss": loss})
        return loss

    def validation_loss(self, trainer: Trainer, run: Run, count: int = 16) -> float:
        """Mean loss with the averaged weights over a few batches that are not trained on."""
        batches = self.batches(run)
        return trainer.mean_loss((batches(s), s) for s in range(VALIDATION, VALIDATION + count))

    # -- training ----------------------------------------------------------------------------------

    def train(self, run: Run, say: Callable[[str], None] = lambda text: None) -> Trainer:
        """Train a run to its end, or load it when it is done. Raises KeyboardInterrupt when stopped.

        Of a run that is done its exported weights are enough.
        """
        state = self.folder / "runs" / run.name / STATE
        weights = self.folder / "weights" / f"{run.name}.safetensors"
        if weights.exists() and not state.exists():
            return self._done(run, weights)
        # a run that was begun keeps its rate, whatever rates are tried today
        begun = state_header(state).get("config", {}).get("lr") if state.exists() else None
        rate = begun or self.learning_rate(run)
        say(f"{run.name}: learning rate {rate:g}")
        trainer = self._trainer(run, rate, self.plan.steps_of(run), self.folder / "runs" / run.name)
        if not trainer.run():
            raise KeyboardInterrupt
        if not weights.exists():
            tasks = [run.task] if run.task else list(self.plan.tasks)
            phrasings = {task: list(CONFLICT[task].seen) for task in tasks}
            trainer.export(weights, {**self.provenance, "phrasings": phrasings})
        return trainer

    def _done(self, run: Run, weights: Path) -> Trainer:
        """A run of which only the exported weights are left."""
        rate = _trained_at(weights) or self.learning_rate(run)
        folder = self.folder / "runs" / run.name
        trainer = self._trainer(run, rate, self.plan.steps_of(run), folder)
        trainer.read(weights)
        return trainer

    def _trainer(self, run: Run, rate: float, steps: int, folder: Path) -> Trainer:
        batches = self.batches(run)
        config = self.plan.training(run, rate, steps, len(batches(0)))
        extra = {"plan": _trained_by(self.plan, run)}
        return Trainer(
            self.base, self.strategy(run), batches, config, folder, save_every=100,
            device=self.device, extra=extra,
        )  # fmt: skip


def _trained_at(weights: Path) -> float | None:
    """The learning rate that exported weights say they were trained at."""
    header = files.read_header(weights)
    about = header.get("generator", header).get("provenance", {})
    return about.get("training", {}).get("lr")


def _trained_by(plan: ConflictPlan, run: Run) -> dict[str, Any]:
    """The part of a plan that a run's weights depend on, as JSON gives it back."""
    keys = ["batch_size", "tasks", "seed", "precision", "optimizer", "error", "at_start"]
    keys += ["written_steps"]
    keys += ["generator"] if run.strategy in ("hywu", "shared_large") else []
    return files.as_json({key: plan.to_json()[key] for key in keys})


def write_json(path: Path, data: Any) -> None:
    """Atomically; a file that is there is replaced."""
    files.write_json(path, data, indent=1, ascii=True)


# -- weights under the names by which the bundled editor finds them ------------------------------

#: Largest file and largest folder that a checkout should carry, in bytes.
FILE_LIMIT, FOLDER_LIMIT = 15_000_000, 24_000_000


def bundle(experiment: Path, editor: Path, plan: ConflictPlan, folder: Path) -> list[Path]:
    """Copy editor, generator, Shared and Single LoRAs of the main rank and figures.json to `folder`.

    Returns the files. Raises HYWUError when one is missing or they are larger than a checkout should
    carry; then nothing is written.
    """
    sources = _sources(experiment, editor, plan)
    if missing := [str(path) for path in sources.values() if not path.is_file()]:
        raise HYWUError(
            f"{experiment}: {', '.join(missing)} must be made first: run the same command without "
            "--bundle."
        )
    sizes = {name: path.stat().st_size for name, path in sources.items()}
    too_large = [f"{name} has {size:,} bytes" for name, size in sizes.items() if size > FILE_LIMIT]
    if too_large or sum(sizes.values()) > FOLDER_LIMIT:
        raise HYWUError(
            f"{', '.join(too_large) or 'together they have'} {sum(sizes.values()):,} bytes in all; at most "
            f"{FILE_LIMIT:,} a file and {FOLDER_LIMIT:,} in all may be bundled."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        with atomic_path(folder / name, overwrite=True) as part:
            shutil.copyfile(source, part)
    return [folder / name for name in sources]


def _sources(experiment: Path, editor: Path, plan: ConflictPlan) -> dict[str, Path]:
    rank, weights = plan.main_rank, experiment / "weights"
    return {
        "editor.safetensors": editor,
        "generator.safetensors": weights / f"hywu_r{rank}.safetensors",
        "shared.safetensors": weights / f"shared_r{rank}.safetensors",
        **{
            f"single_{task}.safetensors": weights / f"single_{task}_r{rank}.safetensors"
            for task in plan.tasks
        },
        "figures.json": experiment / "figures.json",
    }


def read_plan(path: Path) -> dict[str, Any]:
    """What a ``plan.json`` holds, its ``plan`` an object. Raises HYWUError where that isn't so."""
    found = files.read_json(path, dict, finite=False)
    if not isinstance(found.get("plan"), dict):
        raise HYWUError(
            f"{path}: not the plan of `hywu conflict` (its 'plan' is missing or no object); restore it, or use "
            "another folder."
        )
    return found
