"""Charts outside ComfyUI, as PNG by matplotlib: training losses, and those of the conflict experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import need
from .files import atomic_path


def _figure(width: float, height: float) -> Any:
    """A figure that no window or global state knows of. Raises HYWUError where matplotlib is missing."""
    return need("matplotlib.figure", "to draw charts", "matplotlib").Figure(
        figsize=(width, height), layout="constrained"
    )


def _save(figure: Any, path: Path) -> Path:
    with atomic_path(path, overwrite=True) as part:
        figure.savefig(part, format="png", dpi=110)
    return path


def draw_loss(rows: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Loss over steps, raw and smoothed.

    rows: of a training's log, at least one.
    """
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    smooth, value = [], losses[0]
    for loss in losses:
        value += 0.1 * (loss - value)
        smooth.append(value)
    figure = _figure(7, 4)
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="loss")
    axes.plot(steps, smooth, color="tab:blue", label="smoothed")
    axes.set(xlabel="step", ylabel="loss", yscale="log" if min(losses) > 0 else "linear")
    axes.legend(frameon=False)
    return _save(figure, path)


def draw_edits(
    columns: Mapping[str, Tensor], rows: Sequence[str], path: Path, size: float = 1.15
) -> Path:
    """columns: title -> images ``[R, 3, H, W]`` in 0..1.

    rows: one label (the instruction) per row.
    """
    figure = _figure(size * len(columns) + 1.2, size * len(rows) + 0.3)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        axes[0][column].set_title(title, fontsize=8)
        for row, image in enumerate(images):
            axis = axes[row][column]
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    for row, label in enumerate(rows):
        axes[row][0].set_ylabel(
            label, rotation=0, ha="right", va="center", fontsize=7, wrap=True, labelpad=6
        )
    return _save(figure, path)


def draw_ranks(ranks: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """PSNR over the rank with intervals, one line per strategy."""
    figure = _figure(5, 3.4)
    axis = figure.subplots()
    at = [int(rank) for rank in ranks]
    for label, marker in (("HY-WU", "o"), ("Shared", "s")):
        found = [values[label] for values in ranks.values()]
        middle = [v["mean"] for v in found]
        below = [v["mean"] - v["low"] for v in found]
        above = [v["high"] - v["mean"] for v in found]
        axis.errorbar(at, middle, yerr=[below, above], marker=marker, capsize=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(at, [str(rank) for rank in at])
    axis.set_xlabel("LoRA rank (editor's width 192)")
    axis.set_ylabel("PSNR in dB, mean of all tasks")
    axis.grid(alpha=0.3)
    axis.legend()
    return _save(figure, path)


def draw_learning(learning: Mapping[str, Any], error: str, path: Path) -> Path:
    """Training loss over steps, one line per strategy (see `learning_curves`).

    error: of an item; where it is the logarithm, the axis is in dB, like a PSNR.
    """
    figure = _figure(5.5, 3.6)
    axis = figure.subplots()
    for label, losses in learning["loss"].items():
        # a loss of 0.1 * log10(e), e on -1..1, is a hundredth of 20 log10(2) - PSNR
        values = [20 * math.log10(2) - 100 * x for x in losses] if error == "log" else losses
        axis.plot(learning["steps"], values, label=label, linewidth=2 if label == "HY-WU" else 1.2)
    axis.set_xlabel("step")
    axis.set_ylabel("PSNR of what is predicted in training, dB" if error == "log" else "loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _save(figure, path)


def draw_cosines(tasks: Sequence[str], cosines: Sequence[Sequence[float]], path: Path) -> Path:
    """Matrix of gradient cosines; red is conflict."""
    figure = _figure(5, 4.3)
    axis = figure.subplots()
    image = axis.imshow(torch.tensor(cosines).numpy(), cmap="RdBu", vmin=-1, vmax=1)
    axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
    for i, row in enumerate(cosines):
        for j, value in enumerate(row):
            color = "white" if abs(value) > 0.6 else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, label="cosine")
    return _save(figure, path)
