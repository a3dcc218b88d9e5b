"""The experiment's page in Markdown, from ``figures.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("Unchanged", "Editor alone", "Single", "Shared", "Shared large", "SFT", "HY-WU")


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
        *_fixed(figures),
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


def _fixed(figures: Mapping[str, Any]) -> list[str]:
    """Whole photographs at fixed degrees: gain over the source, and sharpness."""
    found = figures.get("fixed_degrees", {})
    if not found:
        return []
    names = list(dict.fromkeys(case for parts in found.values() for case in parts["cases"]))
    methods = {
        "Single": lambda task: f"single_{task}_r{figures['plan']['main_rank']}",
        "Shared": lambda task: f"shared_r{figures['plan']['main_rank']}",
        "HY-WU": lambda task: f"hywu_r{figures['plan']['main_rank']}",
        "task's mean LoRA": lambda task: "hywu_task_mean",
        "Editor alone": lambda task: "base",
    }
    lines = []
    for case in names:
        rows = [found.get(of(case.split(",")[0]), {}).get("cases", {}) for of in methods.values()]
        lines.append((case, *(_gain(row.get(case)) for row in rows)))
    parts = [
        "## Whole photographs at fixed degrees",
        "Gain over the unchanged source in dB; PSNR to the target; sharpness over the target's.",
        _rows(("case", *methods), lines),
    ]
    for name, about in found.items():
        for key, said in (
            ("short", "Short forms minus the usual instruction, dB"),
            ("unknown", "Unknown requests, dB to the source (mean and lowest)"),
            ("flat", "Flat areas, standard deviation of the residual"),
        ):
            if about.get(key):
                texts = (f"“{k}” {_inline(v)}" for k, v in about[key].items())
                parts.append(f"{said}, {name}: {', '.join(texts)}.")
    return parts


def _gain(row: Mapping[str, float] | None) -> str:
    if row is None:
        return ""
    return f"{row['gain']:+.1f}; {row['psnr']:.1f}; {row['sharpness_of_target']:.2f}"


def _inline(value: Any) -> str:
    return (
        " / ".join(f"{x:g}" for x in value.values()) if isinstance(value, dict) else f"{value:+g}"
    )


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
