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
from ..images import photographs
from ..tasks import CONFLICT
from .analysis import Summary, learning_curves
from .evaluate import EvaluationSet
from .experiment import Experiment
from .plan import ConflictPlan
from .runs import write_json

#: Figures of other experiments, by name.
BESIDE = "beside.json"
COLUMNS = ("Unchanged", "Editor alone", "Single", "Shared", "Shared large", "SFT", "HY-WU")


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
    gradients = read_json(folder / "results" / "gradients.json", dict, finite=False)
    figures = {
        "plan": plan.to_json(),
        "trained": _trained(experiment, folder),
        "missing": experiment.missing(),
        "held_out_phrasings": {task: CONFLICT[task].held_out for task in plan.tasks},
        "photographs": names,
        "all_images": summary.to_json(),
        "photographs_only": photos.to_json(),
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
    mine, theirs = (read_json(path / "plan.json", dict, finite=False) for path in (folder, other))
    measured = ("tasks", "crops", "max_images", "sampling_steps", "seed")
    different = [key for key in measured if mine["plan"][key] != theirs["plan"][key]]
    different += [key for key in ("editor", "tasks") if mine.get(key) != theirs.get(key)]
    if different:
        raise HYWUError(
            f"{other / 'plan.json'}: differs from {folder / 'plan.json'} in {', '.join(different)}; only the same "
            "editor's edits of the same images can stand beside each other."
        )
    figures = read_json(other / "figures.json", dict, "run its report first", finite=False)
    kept = {
        "differs": {k: v for k, v in theirs["plan"].items() if mine["plan"].get(k) != v},
        "trained": figures["trained"],
        **{metric: figures["all_images"][metric] for metric in ("psnr", "ssim")},
    }
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
    """Run -> learning rate, steps, seconds, trained values; from the states' headers."""
    from ...files import read_header, read_tensors

    found = {}
    for run in experiment.plan.runs:
        path = folder / "runs" / run.name / "state.safetensors"
        if run.name in experiment.missing():
            continue
        header = read_header(path)
        tensors = read_tensors(path)[0]
        values = sum(t.numel() for n, t in tensors.items() if n.startswith("parameters."))
        found[run.name] = {
            "lr": header["config"]["lr"],
            "steps": header["step"],
            "examples": header["step"] * header["config"]["batch_size"],
            "seconds": round(header["seconds"]),
            "trained_values": values,
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


# -- Markdown ---------------------------------------------------------------------------------------


def render(figures: Mapping[str, Any]) -> str:
    """The page, from ``figures.json`` alone."""
    return "\n\n".join([*_main(figures), *_controls(figures), *_rest(figures)]) + "\n"


def _main(figures: Mapping[str, Any]) -> list[str]:
    """The strategies against each other."""
    everything, plan = figures["all_images"], figures["plan"]
    photos = figures["photographs_only"]
    return [
        "# Contradictory tasks, one frozen editor",
        f"Rank {plan['main_rank']}, {plan['steps']} steps of {plan['batch_size']} examples "
        f"({plan['batch_size'] // len(plan['tasks'])} a task), seed {plan['seed']}; "
        f"{everything['images']} held-out images, {plan['crops']} crops each, of which "
        f"{len(figures['photographs'])} photographs ({', '.join(figures['photographs'])}). "
        "Intervals: 95 %, bootstrap over images. `hywu conflict` wrote this page.",
        *([f"**Not done yet:** {', '.join(figures['missing'])}."] if figures["missing"] else []),
        "## PSNR in dB (instructions as trained)",
        _table(everything["psnr"], 2),
        "## SSIM",
        _table(everything["ssim"], 3),
        "## HY-WU minus the others, dB, paired",
        _rows(
            ("against", "all held-out images", "photographs only"),
            [
                (k, _interval(v), _interval(photos["differences"][k]))
                for k, v in everything["differences"].items()
            ],
        ),
        "## By task, dB",
        _rows(
            ("task", "HY-WU - Single", "HY-WU - Shared"),
            [
                (task, *(_interval(v[k]) for k in ("HY-WU - Single", "HY-WU - Shared")))
                for task, v in everything["per_task"].items()
            ],
        ),
        "## A Single LoRA on the opposite task, dB",
        _rows(
            ("task", *next(iter(everything["opposite"].values()))),
            [
                (task, *(f"{x:.2f}" for x in v.values()))
                for task, v in everything["opposite"].items()
            ],
        ),
    ]


def _controls(figures: Mapping[str, Any]) -> list[str]:
    """What could prove the method wrong: other items' LoRAs, mean LoRAs, other phrasings."""
    everything = figures["all_images"]
    held_out = [
        f"{task}: " + ", ".join(f"“{text}”" for text in texts)
        for task, texts in figures["held_out_phrasings"].items()
    ]
    return [
        "## Controls, dB",
        _rows(
            ("control", "PSNR", "minus Shared", "minus HY-WU"),
            [
                (k, *(_interval(v[c]) for c in ("psnr", "minus Shared", "minus HY-WU")))
                for k, v in everything["controls"].items()
            ],
        ),
        "`hywu_shuffled`: every item gets another item's LoRA. `hywu_mean`: the mean of the generated "
        "LoRAs for all. `hywu_task_mean`: the mean of a task's LoRAs for all of its items; what "
        "HY-WU gains over it is adaptation to the instance. `base`: the editor without a LoRA. "
        "`unchanged`: the source itself.",
        "## Held-out phrasings minus seen ones, dB",
        _rows(
            ("strategy", "change"),
            [(k, _interval(v)) for k, v in everything["held_out_phrasings"].items()],
        ),
        f"Never trained on: {'; '.join(held_out)}.",
    ]


def _rest(figures: Mapping[str, Any]) -> list[str]:
    """Ranks, gradients, charts, and how each run was trained."""
    cosines = figures["gradients"]
    trained = [
        (k, f"{v['lr']:g}", v["steps"], v["examples"], f"{v['trained_values']:,}", v["seconds"])
        for k, v in figures["trained"].items()
    ]
    return [
        *_seeds(figures),
        *_ranks(figures),
        *_learning(figures),
        "## Gradients at the Shared LoRA",
        f"Mean cosine of all pairs of tasks {cosines['mean_of_all_pairs']:.2f}, of opposite tasks "
        f"{cosines['mean_of_opposite_tasks']:.2f}. (The HY-WU authors report about -0.30 on "
        "average for their tasks and base.)",
        "![cosines](gradients.png)",
        "## Edits",
        "![edits](edits.png)",
        "## Trainings",
        _rows(("run", "learning rate", "steps", "examples", "trained values", "seconds"), trained),
    ]


def _seeds(figures: Mapping[str, Any]) -> list[str]:
    """The main runs and those of other seeds, as far as they are done; nothing for figures made before."""
    seeds = figures["all_images"].get("seeds", {})
    if len(seeds) < 2:
        return []
    lines = [
        (seed, v["steps"], *(_interval(x) for k, x in v.items() if k != "steps"))
        for seed, v in seeds.items()
    ]
    columns = [k for k in next(iter(seeds.values())) if k != "steps"]
    return [
        "## Seeds, PSNR in dB",
        _rows(("seed", "steps", *columns), lines),
        "Another seed: other weights to begin with, other crops, phrasings and noise; the same "
        "learning rates, fewer steps where the table says so.",
    ]


def _ranks(figures: Mapping[str, Any]) -> list[str]:
    """The sweep, as far as it is done."""
    ranks = figures["all_images"]["ranks"]
    if not ranks:
        return []
    lines = [(rank, *(_interval(x) for x in v.values())) for rank, v in ranks.items()]
    return [
        f"## Ranks, PSNR in dB (all trained for {figures['plan']['sweep_steps']} steps)",
        _rows(("rank", *next(iter(ranks.values()))), lines),
        "![PSNR over rank](ranks.png)",
    ]


def _learning(figures: Mapping[str, Any]) -> list[str]:
    """The loss of each strategy over the steps; at the end of each quarter as numbers."""
    learning = figures["learning"]
    quarters = [max(0, len(learning["steps"]) * i // 4 - 1) for i in range(1, 5)]
    lines = [
        (label, *(f"{losses[i]:.4f}" for i in quarters))
        for label, losses in learning["loss"].items()
    ]
    return [
        "## Learning",
        "Training loss at the same steps, on the same examples (Single: the mean over its tasks).",
        _rows(("strategy", *(f"step {learning['steps'][i]}" for i in quarters)), lines),
        "![training loss over steps](learning.png)",
    ]


def _table(values: Mapping[str, Mapping[str, Any]], digits: int) -> str:
    labels = [label for label in COLUMNS if label in values]
    tasks = list(next(iter(values.values())))
    rows = []
    for task in tasks:
        cells = [values[label][task] for label in labels]
        best = max(cell["mean"] for cell in cells)
        texts = [f"{cell['mean']:.{digits}f}" for cell in cells]
        if task == "all":
            texts = [_interval(cell, digits) for cell in cells]
        rows.append(
            (
                task,
                *(
                    f"**{t}**" if c["mean"] == best else t
                    for t, c in zip(texts, cells, strict=True)
                ),
            )
        )
    return _rows(("task", *labels), rows)


def _interval(value: Mapping[str, float], digits: int = 2) -> str:
    mean, low, high = (f"{value[k]:.{digits}f}" for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _rows(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
