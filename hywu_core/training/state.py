"""The state of an interrupted training in one safetensors file: weights, average, optimizer, step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HYWUError
from ..files import open_tensors, parse_header, read_header, save_tensors
from .schedule import Average

FORMAT = "hywu-training-1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    path: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    average: Average,
    optimizer: torch.optim.Optimizer,
    header: Mapping[str, Any],
) -> None:
    """Write everything that `load_state` needs to go on after `step` steps, atomically."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameters.{name}"] = parameter
        tensors[f"average.{name}"] = average.values[name]
        for moment in _MOMENTS:
            if moment in optimizer.state.get(parameter, {}):
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    save_tensors(path, tensors, {**header, "format": FORMAT, "step": step}, overwrite=True)


def recorded_precision(path: Path) -> str | None:
    """The precision that a state's run was started with, or None where there is no state."""
    if not path.exists():
        return None
    return read_header(path).get("config", {}).get("precision")


def load_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    average: Average,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Restore a state; returns its header. Raises HYWUError, before anything changes, on a misfit."""
    with open_tensors(path) as file:
        header = parse_header(path, file.metadata())
        if header.get("format") != FORMAT:
            raise HYWUError(f"{path}: not a training state of this program; choose another folder.")
        names = set(file.keys())
        for name, parameter in parameters.items():
            key = f"parameters.{name}"
            shape = tuple(file.get_slice(key).get_shape()) if key in names else None
            if shape != tuple(parameter.shape):
                what = "is missing" if shape is None else f"is {shape}"
                raise HYWUError(
                    f"{path}: {name} {what}, the model has {tuple(parameter.shape)}; go on with the "
                    "model that the run was started with, or use another output folder."
                )
        # one tensor after another: the whole file is as large as all that is trained
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"parameters.{name}"))
                average.values[name].copy_(file.get_tensor(f"average.{name}"))
                if f"exp_avg.{name}" not in names:
                    continue
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(header["step"]), dtype=torch.float32),
                    **{
                        m: torch.empty_like(parameter).copy_(file.get_tensor(f"{m}.{name}"))
                        for m in _MOMENTS
                        if f"{m}.{name}" in names
                    },
                }
    return header
