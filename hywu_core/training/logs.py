"""What a training leaves for people: a CSV, TensorBoard and Weights & Biases on request, a loss plot, sample grids."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import fingerprint
from ..charts import draw_loss
from ..errors import HYWUError, get_logger, need, one_line
from ..files import append_line, atomic_path

logger = get_logger(__name__)

FIELDS = ("step", "loss", "lr", "grad_norm", "seconds")


class Log:
    """One row per logged step in a CSV file; rows after the step that a run resumes at are dropped.

    wandb: also to Weights & Biases, one run per folder, in the project that WANDB_PROJECT names ("hywu").
    writes: False keeps the rows in memory only, as the processes do that aren't the main one.
    """

    def __init__(
        self, folder: Path, resumed_at: int, tensorboard: bool = False, wandb: bool = False, name: str = "log.csv",
        fields: Sequence[str] = FIELDS, writes: bool = True,
    ) -> None:  # fmt: skip
        self.path, self.fields, self.writes = folder / name, fields, writes
        self.rows = [row for row in read_log(self.path, fields) if row["step"] <= resumed_at]
        self._board: Any = None
        self._run: Any = None
        if not writes:
            return
        with atomic_path(self.path, overwrite=True) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(self.rows)
        if tensorboard:
            board = need("torch.utils.tensorboard", "to log for TensorBoard", "tensorboard")
            self._board = board.SummaryWriter(
                str(folder / "tensorboard"), purge_step=resumed_at + 1
            )

        if wandb:
            package = need("wandb", "to log for Weights & Biases")
            self._run = package.init(
                project=os.environ.get("WANDB_PROJECT", "hywu"), name=folder.name, dir=str(folder),
                id=fingerprint.digest([str(folder.resolve())], 16), resume="allow",
            )  # fmt: skip

    def add(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))
        if not self.writes:
            return
        line = io.StringIO(newline="")
        csv.DictWriter(line, self.fields).writerow(row)
        append_line(self.path, line.getvalue().encode(), durable=False)
        if self._board is not None:
            for key in self.fields[1:]:
                self._board.add_scalar(key, row[key], int(row["step"]))

        if self._run is not None:
            about = {key: row[key] for key in self.fields[1:]}
            self._run.log(about, step=int(row["step"]))

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
        if self._board is not None:
            self._board.close()


def read_log(path: Path, fields: Sequence[str] = FIELDS) -> list[dict[str, float]]:
    """Rows of a log's CSV file; none when there is no file. Rows that aren't numbers, as the last one cut short,
    are left out. Raises HYWUError where the file is no text.
    """
    if not path.exists():
        return []
    if not path.is_file():  # a pipe's reader waits for ever
        raise HYWUError(f"{path}: is no file, and a log goes there; move it away.")
    rows = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                with contextlib.suppress(TypeError, ValueError, KeyError, OverflowError):
                    numbers = {key: float(row[key]) for key in fields}
                    rows.append({**numbers, "step": int(numbers["step"])})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise HYWUError(
            f"{path}: not a log that can be gone on with ({one_line(error)}); move it away to begin a new one."
        ) from error
    return rows


def plot_loss(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss over steps as a PNG; a warning where matplotlib is missing, nothing without rows."""
    if not rows:
        return
    try:
        draw_loss(rows, path)
    except HYWUError as error:
        logger.warning("no loss plot: %s", error)


def save_grid(columns: Sequence[Tensor], path: Path, zoom: int = 2) -> None:
    """A PNG with one row per item; columns ``[B, 3, H, W]`` in 0..1 side by side."""
    from PIL import Image

    grid = torch.cat([column.detach().float().cpu().clamp(0, 1) for column in columns], dim=-1)
    pixels = torch.cat(list(grid), dim=-2).permute(1, 2, 0).mul(255).round().to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    with atomic_path(path, overwrite=True) as part:
        image.save(part, format="PNG")
