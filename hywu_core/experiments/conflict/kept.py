"""What an experiment kept, read again: a file that isn't as it was measured is an error that names it.

Means over what is left of a damaged file would look like any others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import HYWUError
from ...files import check_fields, read_json, read_tensors
from ...training.logs import read_log
from .evaluate import EvaluationSet

WAY_OUT = "remove it to measure anew"
EDITS_ANEW = "remove it and the results of its run to measure anew"
NUMBER = (int, float)
#: Fields of a row of ``results/*.json``.
ROW = {"image": str, "crop": int, "task": str, "phrasing": str, "psnr": NUMBER, "ssim": NUMBER}
CASE = {
    "case": str, "task": str, "instruction": str, "psnr": NUMBER, "gain": NUMBER, "sharpness_of_source": NUMBER,
    "sharpness_of_target": NUMBER,
}  # fmt: skip
#: Parts of ``degrees/*.json``, which all but the first may be missing, and fields of their rows.
DEGREES = {
    "tasks": CASE, "short": CASE, "unknown": CASE, "flat": {"area": str, "task": str, "residual": NUMBER},
}  # fmt: skip


def read_rows(path: Path, data: EvaluationSet) -> list[dict[str, Any]]:
    """The rows of one run and phrasing, one for each item of `data`. Raises HYWUError naming the file."""
    rows = read_json(path, list, WAY_OUT, finite=False)
    _check_rows(rows, ROW, str(path))
    items = zip(data.image, data.crop, data.seen.task, strict=True)
    wanted = Counter(items)
    found = Counter((row["image"], row["crop"], row["task"]) for row in rows)
    if found != wanted:
        lacking, more = wanted - found, found - wanted
        name = " / ".join(map(str, next(iter(lacking or more))))
        raise HYWUError(
            f"{path}: has {lacking.total()} of the {len(data)} items not and {more.total()} that are none, such as "
            f"{name}; {WAY_OUT}."
        )
    return rows


def read_degrees(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What was measured at fixed degrees, by parts. Raises HYWUError naming the file."""
    found = read_json(path, dict, WAY_OUT, finite=False)
    check_fields(found, dict.fromkeys(DEGREES, list), str(path), null=False)
    if "tasks" not in found:
        raise HYWUError(f"{path}: lacks 'tasks'; {WAY_OUT}.")
    parts = {name: found[name] for name in DEGREES if name in found}
    for name, rows in parts.items():
        _check_rows(rows, DEGREES[name], f"{path}: '{name}'")
    unknown = {row["case"] for row in parts.get("short", ())} - {
        row["case"] for row in parts["tasks"]
    }
    if unknown:
        raise HYWUError(f"{path}: 'short' has the case '{min(unknown)}', 'tasks' not; {WAY_OUT}.")
    return parts


def read_gradients(path: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """``tasks`` and their ``cosines``, a square of numbers. Raises HYWUError naming the file."""
    found = read_json(path, dict, WAY_OUT, finite=False)
    rows = found.get("cosines")
    square = isinstance(rows, list) and len(rows) == len(tasks)
    square = square and all(
        isinstance(row, list)
        and len(row) == len(tasks)
        and all(isinstance(value, NUMBER) and not abs(value) > 1.001 for value in row)
        for row in rows
    )
    if not square or found.get("tasks") != list(tasks):
        raise HYWUError(
            f"{path}: not the cosines between the gradients of {', '.join(tasks)}; {WAY_OUT}."
        )
    return found


def read_edits(path: Path, count: int | None = None) -> Tensor:
    """Kept edits, uint8 ``[N, 3, H, W]`` in the order of the items.

    count: N, where it is known.
    Raises HYWUError naming the file.
    """
    edits = read_tensors(path)[0].get("edits")
    if edits is None or edits.dtype != torch.uint8 or edits.ndim != 4 or edits.shape[1] != 3:
        found = "no edits" if edits is None else f"{edits.dtype} {tuple(edits.shape)}"
        raise HYWUError(f"{path}: holds {found}, uint8 [N, 3, H, W] is needed; {EDITS_ANEW}.")
    if count is not None and len(edits) != count:
        raise HYWUError(f"{path}: holds {len(edits)} edits of {count} items; {EDITS_ANEW}.")
    return edits


def read_training(path: Path) -> list[dict[str, float]]:
    """The rows of a finished run's log, one at least. Raises HYWUError naming the file."""
    rows = read_log(path)
    if not rows:
        raise HYWUError(
            f"{path}: the log of a run that is done has no rows or is gone; remove the run's folder and its "
            "results to train it anew."
        )
    return rows


def _check_rows(rows: Sequence[Any], fields: Mapping[str, Any], name: str) -> None:
    if not rows:
        raise HYWUError(f"{name} is empty; {WAY_OUT}.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise HYWUError(f"{name}, row {number}: is no object; {WAY_OUT}.")
        if lacking := [field for field in fields if field not in row]:
            raise HYWUError(f"{name}, row {number}: lacks '{lacking[0]}'; {WAY_OUT}.")
        check_fields(row, fields, f"{name}, row {number}", null=False)
