"""One page about the experiment: tables, controls, figures, whichever way they came out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ...charts import draw_cosines, draw_edits, draw_learning, draw_ranks
from ...errors import HYWUError
from ...files import atomic_path, read_json
from ...training.strategies import count_parameters
from ..images import photographs
from ..tasks import CONFLICT
from . import degrees
from .analysis import Summary, learning_curves
from .evaluate import EvaluationSet
from .experiment import Experiment
from .kept import read_gradients, read_training
from .page import COLUMNS, render
from .plan import ConflictPlan
from .runs import read_plan, write_json

#: Figures of other experiments, by name.
BESIDE = "beside.json"


def write_report(experiment: Experiment, folder: Path) -> Path:
    """``figures.json``, the charts and ``report.md`` in `folder`; returns the last.

    Raises HYWUError while a run is missing that everything else is compared with.
    """
    results, plan = experiment.results(), experiment.plan
    _check_main_rank(experiment, folder)
    opposites = experiment.plan.opposites
    summary = Summary(results, plan, opposites)
    names = [name for name in photographs() if name in experiment.data.image]
    photos = Summary(results, plan, opposites, names)
    gradients = read_gradients(folder / "results" / "gradients.json", plan.tasks)
    figures = {
        "plan": plan.to_json(),
        "trained": _trained(experiment, folder),
        "missing": experiment.missing(),
        "held_out_phrasings": {task: CONFLICT[task].held_out for task in plan.tasks},
        "photographs": names,
        "all_images": summary.to_json(),
        "photographs_only": photos.to_json(),
        "fixed_degrees": degrees.summary(experiment.degrees()),
        "learning": learning_curves(folder, plan, summary.main),
        "gradients": {**gradients, **_mean_cosines(gradients, opposites)},
        **_beside(folder),
    }
    write_json(folder / "figures.json", figures)
    _keep_ranks(plan, figures["all_images"]["ranks"], folder)
    draw_learning(figures["learning"], plan.error, folder / "learning.png")
    draw_cosines(gradients["tasks"], gradients["cosines"], folder / "gradients.png")
    _draw_edits(experiment, summary, folder / "edits.png")
    with atomic_path(folder / "report.md", overwrite=True) as part:
        part.write_text(render(figures), encoding="utf-8")
    return folder / "report.md"


def keep_beside(experiment: Experiment, other: Path, name: str) -> Path:
    """Keep the main figures of another experiment's folder, to stand in ``figures.json`` beside this one's.

    Of the same editor, tasks and images; what differs in its plan is said. Nothing is paired with it.
    Raises HYWUError where it isn't comparable, or has no figures yet.
    """
    folder = experiment.runs.folder
    mine, theirs = (read_plan(path / "plan.json") for path in (folder, other))
    measured = ("tasks", "crops", "max_images", "sampling_steps", "seed")
    different = [key for key in measured if mine["plan"].get(key) != theirs["plan"].get(key)]
    different += [key for key in ("editor", "tasks") if mine.get(key) != theirs.get(key)]
    if different:
        raise HYWUError(
            f"{other / 'plan.json'}: differs from {folder / 'plan.json'} in {', '.join(different)}; only the same "
            "editor's edits of the same images can stand beside each other."
        )
    figures = read_json(other / "figures.json", dict, "run its report first", finite=False)
    differs = {k: v for k, v in theirs["plan"].items() if mine["plan"].get(k) != v}
    try:
        shown = {metric: figures["all_images"][metric] for metric in ("psnr", "ssim")}
        kept = {"differs": differs, "trained": figures["trained"], **shown}
    except (KeyError, TypeError) as error:
        raise HYWUError(
            f"{other / 'figures.json'}: not the figures of `hywu conflict` ({error}); run its report again."
        ) from error
    path = folder / BESIDE
    found = read_json(path, dict, finite=False) if path.exists() else {}
    write_json(path, {**found, name: kept})
    return path


def _beside(folder: Path) -> dict[str, Any]:
    path = folder / BESIDE
    return {"apart": read_json(path, dict, finite=False)} if path.exists() else {}


def write_ranks(experiment: Experiment, folder: Path) -> Path | None:
    """``ranks.json`` and ``ranks.png`` of the sweep, which can be done without the main runs.

    Returns the chart; None while no rank is done.
    """
    summary = Summary(experiment.results(), experiment.plan, experiment.plan.opposites)
    return _keep_ranks(experiment.plan, summary.ranks(), folder)


def _keep_ranks(plan: ConflictPlan, ranks: Mapping[str, Any], folder: Path) -> Path | None:
    if not ranks:
        return None
    write_json(folder / "ranks.json", {"plan": plan.to_json(), "ranks": ranks})
    return draw_ranks(ranks, folder / "ranks.png")


def _check_main_rank(experiment: Experiment, folder: Path) -> None:
    """HY-WU, Shared and Single at the main rank must be done, and the gradients with Shared."""
    plan, missing = experiment.plan, set(experiment.missing())
    needed = plan.main_runs
    lacking = [run.name for run in needed if run.name in missing]
    if not lacking and not (folder / "results" / "gradients.json").exists():
        lacking = [run.name for run in needed if run.strategy == "shared"]
    if lacking:
        raise HYWUError(
            f"{folder}: the report compares HY-WU, Shared and Single at rank {plan.main_rank}, and "
            f"{', '.join(lacking)} must be done first: the same command without --report goes on."
        )


def _trained(experiment: Experiment, folder: Path) -> dict[str, dict[str, Any]]:
    """Run -> learning rate, steps, seconds, trained values; from the logs, which outlive the states."""
    found, counts = {}, {}
    missing, plan = set(experiment.missing()), experiment.plan
    for run in plan.runs:
        if run.name in missing:
            continue
        rows = read_training(folder / "runs" / run.name / "log.csv")
        # runs of a kind and rank train as many, whatever their task and seed
        kind = (run.strategy, run.rank)
        if kind not in counts:
            counts[kind] = count_parameters(experiment.runs.strategy(run))
        batch = plan.batch_size // (len(plan.tasks) if run.task else 1)
        found[run.name] = {
            "lr": max(row["lr"] for row in rows),
            "steps": rows[-1]["step"],
            "examples": rows[-1]["step"] * batch,
            "seconds": round(rows[-1]["seconds"]),
            "trained_values": counts[kind],
        }
    return found


def _mean_cosines(gradients: Mapping[str, Any], opposites: Mapping[str, str]) -> dict[str, float]:
    tasks, cosines = gradients["tasks"], torch.tensor(gradients["cosines"])
    pairs = [(tasks.index(a), tasks.index(b)) for a, b in opposites.items() if b in tasks]
    off = cosines[~torch.eye(len(tasks), dtype=torch.bool)]
    return {
        "mean_of_all_pairs": round(float(off.mean()), 4),
        "mean_of_opposite_tasks": round(fmean(float(cosines[p]) for p in pairs), 4),
    }


def _draw_edits(experiment: Experiment, summary: Summary, path: Path) -> None:
    """One crop of a few images, every task once, all strategies side by side."""
    data, tasks = experiment.data, experiment.plan.tasks
    names = list(dict.fromkeys(data.image))
    rows = []
    for number, task in enumerate(tasks):
        # the two directions of a pair on the same crop
        name = names[(number // 2) % len(names)]
        crop = data.crop[_most_contrast(data, name, tasks[number // 2 * 2])]
        found = zip(data.image, data.crop, data.seen.task, strict=True)
        rows.append(list(found).index((name, crop, task)))
    columns = {"input": data.seen.source[rows], "target": data.seen.target[rows]}
    keys = {**summary.main, "Editor alone": "base"}
    for label in COLUMNS[1:]:
        if label not in keys:
            continue
        if label == "Single":
            rank = experiment.plan.main_rank
            parts = [experiment.edits(f"single_{data.seen.task[i]}_r{rank}") for i in rows]
            columns[label] = torch.stack([e[i] for e, i in zip(parts, rows, strict=True)])
        else:
            columns[label] = experiment.edits(keys[label])[rows]
    draw_edits(columns, [data.seen.instruction[i] for i in rows], path)


def _most_contrast(data: EvaluationSet, image: str, task: str) -> int:
    """The item of an image and task whose source shows most: a crop of plain sky shows no edit."""
    asked = (image, task)
    found = [
        i for i, key in enumerate(zip(data.image, data.seen.task, strict=True)) if key == asked
    ]
    return max(found, key=lambda i: float(data.seen.source[i].std()))
