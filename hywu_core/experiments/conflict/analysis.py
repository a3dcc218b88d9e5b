"""The experiment's numbers: means and differences over images with intervals, learning curves, gradients.

Crops of one image are no independent observations: each image counts once, and images are what is
resampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import HYWUError
from ...evaluation.statistics import bootstrap_mean
from ...training.base import BaseModel, Batch
from ...training.logs import read_log
from ...training.strategies import Strategy
from .plan import ConflictPlan

Rows = Sequence[Mapping[str, Any]]
Results = Mapping[str, Rows]


class Interval(NamedTuple):
    """A mean and its 95 % percentile-bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Mapping[str, Sequence[float]], resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Interval of a mean.

    values: photograph -> one number per crop (or task, or phrasing) of it.

    Each photograph counts once, by its own mean; photographs are what is resampled (Efron 1979).
    Raises HYWUError on no photographs, an empty one, or a number that isn't finite.
    """
    empty = [name for name, numbers in values.items() if not len(numbers)]
    if not values or empty:
        raise HYWUError(f"bootstrap: no values for {', '.join(empty) or 'any photograph'}.")
    means = np.array([np.mean(numbers) for numbers in values.values()], dtype=np.float64)
    if not np.isfinite(means).all():
        bad = [name for name, mean in zip(values, means, strict=True) if not np.isfinite(mean)]
        raise HYWUError(f"bootstrap: values that are not finite for {', '.join(bad)}.")
    found = bootstrap_mean(means, resamples=resamples, seed=seed)
    low, high = (found.mean if math.isnan(end) else end for end in (found.low, found.high))
    return Interval(found.mean, low, high)


def paired_bootstrap(
    one: Mapping[str, Sequence[float]],
    two: Mapping[str, Sequence[float]],
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of ``one - two``, item by item on the same crops of the same photographs.

    Raises HYWUError when the two don't cover the same items.
    """
    if one.keys() != two.keys():
        alone = sorted(one.keys() ^ two.keys())
        raise HYWUError(f"paired bootstrap: only one side has {', '.join(alone[:5])}.")
    differences = {}
    for name, numbers in one.items():
        if len(numbers) != len(two[name]):
            raise HYWUError(
                f"paired bootstrap: {name} has {len(numbers)} and {len(two[name])} values."
            )
        differences[name] = np.subtract(numbers, two[name]).tolist()
    return bootstrap(differences, resamples, seed)


class Summary:
    """Figures of the results of a plan, as far as its runs are done (HY-WU, Shared and Single must be). All differences are on the same crops of the same images.

    images: only these, such as the photographs; all held-out images without.
    """

    def __init__(
        self, results: Results, plan: ConflictPlan, opposites: Mapping[str, str],
        images: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.plan, self.opposites = plan, dict(opposites)
        chosen = set(images)
        self.results = {
            name: [row for row in rows if not chosen or row["image"] in chosen]
            for name, rows in results.items()
        }
        rank = plan.main_rank
        self.main = {"HY-WU": f"hywu_r{rank}", "Shared": f"shared_r{rank}", "Single": "single"}
        self.main |= {"Shared large": "shared_large", "SFT": "sft"}
        self._join_singles()
        self.main = {label: name for label, name in self.main.items() if self.results.get(name)}

    def _join_singles(self) -> None:
        """ "single": each task by its own LoRA, "single_s1" with another seed; "single_opposite": by the
        opposite task's.
        """
        rank = self.plan.main_rank
        for name, of, end in (
            ("single", lambda t: t, ""),
            ("single_opposite", self.opposites.get, ""),
            *((f"single_s{seed}", lambda t: t, f"_s{seed}") for seed in self.plan.other_seeds),
        ):
            self.results[name] = [
                row
                for task in self.plan.tasks
                for row in self.results.get(f"single_{of(task)}_r{rank}{end}", ())
                if row["task"] == task
            ]

    # -- values ------------------------------------------------------------------------------------

    def values(
        self, name: str, task: str = "", phrasing: str = "seen", metric: str = "psnr"
    ) -> dict[str, list[float]]:
        """Image -> values in the order crop, task; of one task or of all."""
        found: dict[str, list[float]] = {}
        rows = [r for r in self.results[name] if r["phrasing"] == phrasing]
        for row in sorted(rows, key=lambda r: (r["image"], r["crop"], r["task"])):
            if task in ("", row["task"]):
                found.setdefault(row["image"], []).append(row[metric])
        return found

    def mean(self, name: str, task: str = "", **options: str) -> Interval:
        return bootstrap(self.values(name, task, **options))

    def difference(self, one: str, two: str, task: str = "", **options: str) -> Interval:
        """one - two, paired."""
        return paired_bootstrap(
            self.values(one, task, **options), self.values(two, task, **options)
        )

    def phrasing_loss(self, name: str) -> Interval:
        """Held-out phrasings minus seen ones, on the same sources."""
        return paired_bootstrap(
            self.values(name, phrasing="held_out"), self.values(name, phrasing="seen")
        )

    # -- what is said ------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything that the report shows; JSON-safe."""
        tasks, main = self.plan.tasks, self.main
        hywu, shared = main["HY-WU"], main["Shared"]
        controls = ("unchanged", "hywu_shuffled", "hywu_mean", "hywu_task_mean", "base")
        return {
            "images": len(self.values(hywu)),
            "psnr": self._table("psnr"),
            "ssim": self._table("ssim"),
            "opposite": {
                task: {
                    "Single of the task": self.mean("single", task).mean,
                    "Single of the opposite task": self.mean("single_opposite", task).mean,
                    "HY-WU": self.mean(hywu, task).mean,
                }
                for task in tasks
            },
            "differences": {
                label: self.difference(hywu, name)._asdict()
                for label, name in main.items()
                if label != "HY-WU"
            },
            "per_task": {
                task: {
                    "HY-WU - Single": self.difference(hywu, "single", task)._asdict(),
                    "HY-WU - Shared": self.difference(hywu, shared, task)._asdict(),
                }
                for task in tasks
            },
            "controls": {
                name: {
                    "psnr": self.mean(name)._asdict(),
                    "minus Shared": self.difference(name, shared)._asdict(),
                    "minus HY-WU": self.difference(name, hywu)._asdict(),
                }
                for name in controls
                if self.results.get(name)
            },
            "held_out_phrasings": {
                label: self.phrasing_loss(name)._asdict() for label, name in main.items()
            },
            "seeds": self.seeds(),
            "ranks": self.ranks(),
        }

    def seeds(self) -> dict[str, dict[str, Any]]:
        """Seed -> HY-WU, Shared, Single and differences, of the main runs and of other seeds' shorter ones,
        where all of them are done; JSON-safe.
        """
        plan, rank = self.plan, self.plan.main_rank
        found = {}
        for seed in (plan.seed, *plan.other_seeds):
            end = "" if seed == plan.seed else f"_s{seed}"
            hywu, shared, single = f"hywu_r{rank}{end}", f"shared_r{rank}{end}", f"single{end}"
            tasks = [f"single_{task}_r{rank}{end}" for task in plan.tasks]
            if not {hywu, shared, *tasks} <= self.results.keys():
                continue
            found[str(seed)] = {
                "steps": plan.steps if seed == plan.seed else plan.seed_steps,
                "HY-WU": self.mean(hywu)._asdict(),
                "Shared": self.mean(shared)._asdict(),
                "Single": self.mean(single)._asdict(),
                "HY-WU - Shared": self.difference(hywu, shared)._asdict(),
                "HY-WU - Single": self.difference(hywu, single)._asdict(),
            }
        return found

    def ranks(self) -> dict[str, dict[str, Any]]:
        """Rank -> HY-WU, Shared and their difference in the sweep, where both are done; JSON-safe."""
        return {
            str(rank): self._at_rank(rank)
            for rank in sorted(self.plan.ranks)
            if {f"hywu_r{rank}_sweep", f"shared_r{rank}_sweep"} <= self.results.keys()
        }

    def _at_rank(self, rank: int) -> dict[str, Any]:
        hywu, shared = f"hywu_r{rank}_sweep", f"shared_r{rank}_sweep"
        return {
            "HY-WU": self.mean(hywu)._asdict(),
            "Shared": self.mean(shared)._asdict(),
            "HY-WU - Shared": self.difference(hywu, shared)._asdict(),
        }

    def _table(self, metric: str) -> dict[str, dict[str, Any]]:
        """Strategy -> task (and "all") -> mean and interval."""
        return {
            label: {
                task or "all": self.mean(name, task, metric=metric)._asdict()
                for task in (*self.plan.tasks, "")
            }
            for label, name in {
                "Unchanged": "unchanged",
                "Editor alone": "base",
                **self.main,
            }.items()
        }


# -- learning: the training loss by step, averaged over windows of steps ------------------------------
# Every strategy sees the same examples at the same step, and a Single LoRA those of its task; so the mean over
# the Single LoRAs is what the others' loss can be compared with, step by step.

#: Parts that the main runs' steps are cut into.
WINDOWS = 40


def learning_curves(folder: Path, plan: ConflictPlan, labels: Mapping[str, str]) -> dict[str, Any]:
    """``{"steps": last step of each window, "loss": {label: mean loss in each window}}``; JSON-safe.

    folder: the experiment's.
    labels: label -> name of a main run, or "single" for the mean over the tasks' runs.
    A label whose runs were not trained to the end is left out.
    """
    width = max(1, plan.steps // WINDOWS)
    ends = list(range(width, plan.steps + 1, width))
    curves = {}
    for label, name in labels.items():
        names = [name]
        if name == "single":
            names = [run.name for run in plan.runs if run.strategy == "single" and run.main]
        parts = [_windows(folder / "runs" / n / "log.csv", ends, width) for n in names]
        if all(parts):
            curves[label] = [round(fmean(values), 5) for values in zip(*parts, strict=True)]
    return {"steps": ends, "loss": curves}


def _windows(path: Path, ends: list[int], width: int) -> list[float]:
    """Mean loss of the steps up to each end; nothing where a step is missing."""
    losses = {int(row["step"]): row["loss"] for row in read_log(path)}
    if any(step not in losses for step in range(1, ends[-1] + 1)):
        return []
    return [fmean(losses[end - i] for i in range(width)) for end in ends]


# -- gradients: below zero, a step that helps one task hurts the other --------------------------------


def task_gradients(
    base: BaseModel, strategy: Strategy, batches: Mapping[str, Batch], seed: int = 0
) -> dict[str, Tensor]:
    """task -> gradient of its mean loss, flat float32 ``[parameters]``. Changes no weight.

    All tasks get the draws of the same seed. The parameters' own ``.grad`` stays as it is.
    """
    parameters = [p for p in strategy.trained.parameters() if p.requires_grad]
    device = parameters[0].device
    gradients = {}
    for task, batch in batches.items():
        draws = {k: v.to(device) for k, v in base.draw(batch, seed).items()}
        moved = batch.to(device)
        with torch.enable_grad(), strategy.adapted(moved) as module:
            loss = base.loss(module, moved, draws).mean()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pieces = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]
        gradients[task] = torch.cat([piece.detach().float().flatten() for piece in pieces]).cpu()
    return gradients


def cosine_matrix(gradients: Mapping[str, Tensor]) -> Tensor:
    """Cosines ``[tasks, tasks]`` in the mapping's order; 0 beside a gradient of zero."""
    stacked = torch.nn.functional.normalize(torch.stack(list(gradients.values())), dim=1)
    return stacked @ stacked.mT
