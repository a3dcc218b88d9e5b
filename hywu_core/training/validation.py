"""Held-out examples, measured now and then: the best weights are kept, and a run may end when they stay best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .base import Batch
from .logs import Log

if TYPE_CHECKING:
    from .trainer import Trainer

FIELDS = ("step", "loss")


class Validation:
    """Mean loss of examples that aren't trained on, with the averaged weights, at every state that is kept.

    batches: the same examples each time, with the same draws.
    patience: measurements without a better one after which the run is over; 0 for never.
    on_best: called when a measurement is the lowest so far, on the main process.
    ``validation.csv`` in the run's folder has a row for each measurement.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        patience: int = 0,
        on_best: Callable[[], None] | None = None,
    ) -> None:
        self.batches, self.patience, self.on_best = list(batches), patience, on_best
        self._log: Log | None = None

    def begin(self, folder: Path, step: int, main: bool) -> None:
        """Take up what was measured up to `step`."""
        self._log = Log(folder, step, name="validation.csv", fields=FIELDS, writes=main)

    @property
    def over(self) -> bool:
        """Whether the last `patience` measurements were no better than one before."""
        losses = [row["loss"] for row in self._log.rows]
        return 0 < self.patience <= len(losses) - 1 - _best(losses)

    def measure(self, trainer: Trainer) -> None:
        """Measure at the trainer's step, unless that was done."""
        if any(row["step"] == trainer.step for row in self._log.rows):
            return
        loss = trainer.mean_loss((batch, seed) for seed, batch in enumerate(self.batches))
        self._log.add({"step": trainer.step, "loss": loss})
        losses = [row["loss"] for row in self._log.rows]
        if self._log.writes and self.on_best is not None and _best(losses) == len(losses) - 1:
            self.on_best()


def _best(losses: Sequence[float]) -> int:
    """Where the lowest loss stands; the first of equal ones."""
    return min(range(len(losses)), key=losses.__getitem__, default=-1)
