"""What a training leaves for people: a CSV, TensorBoard and Weights & Biases on request, a loss plot, sample grids."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import fingerprint
from ..atomic import real_path
from ..charts import draw_loss
from ..errors import HYWUError, get_logger, need, one_line
from ..files import append_line, atomic_path
from .schedule import lr_at

if TYPE_CHECKING:
    from tqdm import tqdm

    from .trainer import Trainer

logger = get_logger(__name__)

#: Steps between looks at the loss where looking means waiting for a device.
READ_EVERY = 10
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
                id=fingerprint.digest([str(real_path(folder))], 16), resume="allow",
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


class Progress:
    """Losses on their way to the log and the bar; on a CUDA device they are read only now and then."""

    def __init__(self, trainer: Trainer, log: Log | None, bar: tqdm) -> None:
        self.trainer, self.log, self.bar = trainer, log, bar
        watched = trainer.on_step is not None or trainer.device.type == "cpu"
        self.every = 1 if watched else READ_EVERY
        self.waiting: list[tuple[int, float, Tensor]] = []
        self.smooth: float | None = None
        self.last = float("nan")

    def add(self, losses: Tensor) -> float:
        """Take in a step's (loss, gradient norm); the last loss that was read."""
        self.waiting.append((self.trainer.step, self.trainer.seconds, losses))
        if len(self.waiting) >= self.every:
            self.read()
        return self.last

    def read(self) -> None:
        """Log what has come in. Raises HYWUError at the first loss or norm that isn't finite."""
        if not self.waiting:
            return
        values = torch.stack([losses for _, _, losses in self.waiting]).tolist()
        for (step, seconds, _), (loss, norm) in zip(self.waiting, values, strict=True):
            if not torch.isfinite(torch.tensor([loss, norm])).all():
                raise HYWUError(
                    f"{self.trainer.folder}: the loss is {loss} (gradient norm {norm}) at step {step - 1}; "
                    "train again with a lower learning rate."
                )
            self.smooth = loss if self.smooth is None else self.smooth + 0.05 * (loss - self.smooth)
            if self.log is not None:
                row = {"step": step, "loss": loss, "lr": lr_at(self.trainer.config, step - 1)}
                self.log.add({**row, "grad_norm": norm, "seconds": round(seconds, 3)})
        self.last = values[-1][0]
        self.bar.update(len(self.waiting))
        self.bar.set_postfix(loss=f"{self.smooth:.5f}", refresh=False)
        self.waiting.clear()


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
