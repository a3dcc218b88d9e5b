"""The whole experiment: trains what is missing, evaluates what is missing, gathers the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...devices import chosen_device
from ...errors import HYWUError
from ...files import as_json, read_header, save_tensors
from ...training.base import BaseModel
from ...training.trainer import Trainer
from . import degrees
from .analysis import cosine_matrix, task_gradients
from .evaluate import (
    Adapted,
    EvaluationSet,
    changed,
    evaluate,
    evaluation_set,
    mean_changes,
    measure,
    shuffled,
    unadapted,
)
from .kept import read_degrees, read_edits, read_rows
from .plan import ConflictPlan, Run
from .runs import VALIDATION, Runs, read_plan, write_json

#: Batches of training images over which the mean LoRAs are taken.
MEAN_BATCHES = 8


class Experiment:
    """Everything in `runs.folder`; each step is kept, so that a stopped experiment goes on."""

    def __init__(self, runs: Runs, base: BaseModel, say: Callable[[str], None]) -> None:
        self.runs, self.base, self.plan, self.say = runs, base, runs.plan, say
        self.data: EvaluationSet = evaluation_set(self.plan)

    def run(self, only: Sequence[str] = ()) -> None:
        """Train and evaluate the runs whose names match one of the patterns; all without patterns."""
        for run in self.plan.runs:
            if only and not any(fnmatch(run.name, pattern) for pattern in only):
                continue
            trainer = self.runs.train(run, self.say)
            with trainer.average.swapped():
                self._evaluate(run, trainer)

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluate(self, run: Run, trainer: Trainer) -> None:
        adapt = trainer.strategy.adapted
        self._rows(run.name, adapt, "seen", keep=run.main)
        if not run.main:
            return
        self._rows(run.name, adapt, "held_out", keep=True)
        self._degrees(run.name, adapt, [run.task] if run.task else self.plan.tasks, run.strategy)
        if run.strategy == "hywu":
            self._rows("base", unadapted(self.base), "seen", keep=True)
            self._degrees("base", unadapted(self.base), self.plan.tasks, "base")
            rows = measure(self.data.seen.source, self.data, "seen")
            write_json(self._path("unchanged", "seen"), rows)
            self._controls(trainer)
        if run.strategy == "shared":
            self._gradients(trainer)

    def _controls(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        self._rows("hywu_shuffled", shuffled(self.base, strategy), "seen")
        last = self.runs.folder / "degrees" / "hywu_task_mean.json"
        if (
            self._done("hywu_mean", "seen")
            and self._done("hywu_task_mean", "seen")
            and last.exists()
        ):
            return
        batches = self.runs.batches(Run("hywu", self.plan.main_rank))
        means = mean_changes(strategy, [batches(VALIDATION + i) for i in range(MEAN_BATCHES)])
        module = self.base.module
        self._rows("hywu_mean", lambda batch: changed(module, means[""]), "seen")
        by_task: Adapted = lambda batch: changed(module, means[batch.task[0]])  # noqa: E731
        self._rows("hywu_task_mean", by_task, "seen", by_task=True)
        self._degrees("hywu_task_mean", by_task, self.plan.tasks, "mean")

    def _degrees(self, name: str, adapt: Adapted, tasks: Sequence[str], strategy: str) -> None:
        """Whole photographs at fixed degrees; of HY-WU and the editor alone also other words."""
        path = self.runs.folder / "degrees" / f"{name}.json"
        if path.exists():
            return
        found: dict[str, Any] = {"tasks": degrees.measure_tasks(self.base, adapt, tasks)}
        if strategy in ("hywu", "base"):
            found |= degrees.measure_words(self.base, adapt, tasks)
        if strategy != "mean":
            found["flat"] = degrees.measure_flat(self.base, adapt, tasks)
        write_json(path, found)

    def _rows(
        self, name: str, adapt: Adapted, phrasing: str, by_task: bool = False, keep: bool = False
    ) -> None:
        """Edit and measure every item (a single-task run: those of its task and the opposite one)."""
        if self._done(name, phrasing):
            return
        items = self.data.seen if phrasing == "seen" else self.data.held_out
        edits = evaluate(self.base, adapt, items, self.plan.batch_size, by_task)
        if keep:
            save_tensors(
                edits_path(self.runs.folder, name, phrasing),
                {"edits": edits.mul(255).round().byte()},
                {},
                overwrite=True,
            )
        rows = measure(edits, self.data, phrasing)
        write_json(self._path(name, phrasing), rows)
        mean = fmean(row["psnr"] for row in rows)
        self.say(f"{name}, {phrasing} phrasings: {mean:.2f} dB over all tasks")

    def _done(self, name: str, phrasing: str) -> bool:
        return self._path(name, phrasing).exists()

    def _path(self, name: str, phrasing: str) -> Path:
        return self.runs.folder / "results" / f"{name}.{phrasing}.json"

    def _gradients(self, trainer: Trainer) -> None:
        """Cosines between the tasks' gradients at the shared LoRA, on crops that no run trains on."""
        path = self.runs.folder / "results" / "gradients.json"
        if path.exists():
            return
        source = self.runs.batches(Run("shared", self.plan.main_rank))
        parts = [source(VALIDATION + i) for i in range(MEAN_BATCHES)]
        total: dict[str, Tensor] = {}
        for seed, batch in enumerate(parts):
            by_task = {
                task: batch.select([i for i, other in enumerate(batch.task) if other == task])
                for task in self.plan.tasks
            }
            for task, gradient in task_gradients(
                self.base, trainer.strategy, by_task, seed
            ).items():
                total[task] = total[task] + gradient if task in total else gradient
        matrix = cosine_matrix(total)
        write_json(path, {"tasks": list(total), "cosines": matrix.tolist()})

    # -- gathering ---------------------------------------------------------------------------------

    def results(self) -> dict[str, list[dict[str, Any]]]:
        """Name -> rows of seen and held-out phrasings, of everything that has been evaluated."""
        found: dict[str, list[dict[str, Any]]] = {}
        for path in sorted((self.runs.folder / "results").glob("*.*.json")):
            found.setdefault(path.name.split(".")[0], []).extend(read_rows(path, self.data))
        return found

    def degrees(self) -> dict[str, dict[str, Any]]:
        """Name -> what was measured at fixed degrees, in the order of the plan's runs."""
        found = {
            path.stem: read_degrees(path)
            for path in sorted((self.runs.folder / "degrees").glob("*.json"))
        }
        order = [*(run.name for run in self.plan.runs), "hywu_task_mean", "base"]
        return {name: found[name] for name in order if name in found}

    def missing(self) -> list[str]:
        """Runs that are not evaluated yet."""
        last = {True: "held_out", False: "seen"}
        return [run.name for run in self.plan.runs if not self._done(run.name, last[run.main])]

    def edits(self, name: str) -> Tensor | None:
        """Kept edits ``[N, 3, H, W]`` in 0..1 of a strategy at the main rank."""
        path = edits_path(self.runs.folder, name)
        if not path.exists():
            return None
        return read_edits(path, len(self.data)).to(torch.float32) / 255


def edits_path(folder: Path, name: str, phrasing: str = "seen") -> Path:
    """Where an experiment keeps the edits of a run, uint8 ``[N, 3, H, W]`` in the order of its items."""
    ending = "" if phrasing == "seen" else f".{phrasing}"
    return folder / "edits" / f"{name}{ending}.safetensors"


def make_experiment(
    folder: Path, plan: ConflictPlan, editor_file: Path | None, device: str | None, commit: str,
    say: Callable[[str], None],
) -> Experiment:  # fmt: skip
    """The experiment on an editor's file; a folder that holds another plan is refused."""
    from ...bases.bundled.checkpoint import bundled, load_editor
    from ...bases.bundled.training import EditorBase
    from ..images import ImagePool, data_provenance, split_files
    from ..tasks import VERSION

    path, editor_file = folder / "plan.json", editor_file or bundled("editor")
    editor = load_editor(editor_file)
    begun = read_plan(path) if path.exists() else None
    base = EditorBase(editor, plan.sampling_steps, plan.error, at_start=plan.at_start)
    mine = {"plan": as_json(plan.to_json()), "editor": dict(base.encoder), "tasks": VERSION}
    if begun is not None:
        found = {"tasks": 1, **begun}
        if found["tasks"] != VERSION:
            raise HYWUError(
                f"{path}: this folder's tasks are of version {found['tasks']}, this program's of {VERSION}: they "
                "make other images; go on with the program that began it, or use another folder."
            )
        if found != mine:
            raise HYWUError(
                f"{path}: this folder holds an experiment with another plan or editor; use its options, "
                "or another folder."
            )
    else:
        write_json(path, mine)
    provenance = {
        "commit": commit,
        "data": data_provenance(),
        "device": str(chosen_device(device)),
        "editor": read_header(editor_file).get("provenance", {}),
    }
    runs = Runs(base, ImagePool(split_files("train")), plan, folder, provenance, device)
    return Experiment(runs, base, say)
