"""How fast each strategy learns: the training loss by step, averaged over windows of steps.

Every strategy sees the same examples at the same step, and a Single LoRA those of its task; so the mean over
the Single LoRAs is what the others' loss can be compared with, step by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ...training.logs import read_log
from .plan import ConflictPlan

#: Parts that the main runs' steps are cut into.
WINDOWS = 40


def learning_curves(folder: Path, plan: ConflictPlan, labels: Mapping[str, str]) -> dict[str, Any]:
    """``{"steps": last step of each window, "loss": {label: mean loss in each window}}``; JSON-safe.

    folder: the experiment's. labels: label -> name of a main run, or "single" for the mean over the
    tasks' runs. A label whose runs were not trained to the end is left out.
    """
    width = max(1, plan.steps // WINDOWS)
    ends = list(range(width, plan.steps + 1, width))
    curves = {}
    for label, name in labels.items():
        names = [name]
        if name == "single":
            names = [run.name for run in plan.runs if run.strategy == "single"]
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
