"""The state of an interrupted training in one safetensors file: weights, average, optimizer, step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HYWUError
from ..files import check_fields, open_tensors, parse_header, read_header, save_tensors
from ..precision import NAMES
from .schedule import Average
from .sharding import is_sharded, put

FORMAT = "hywu-training-1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    path: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    average: Average,
    optimizer: torch.optim.Optimizer,
    header: Mapping[str, Any],
    writes: bool = True,
) -> None:
    """Write everything that `load_state` needs to go on after `step` steps, atomically.

    writes: False for a process that only gives its part of what is sharded; all must call this together then.
    """
    tensors: dict[str, Tensor] = {}

    def gathered(tensor: Tensor) -> Tensor:
        """On the main process; the others only take part."""
        if not is_sharded(tensor):
            return tensor
        all_of_it = tensor.detach().full_tensor()
        return all_of_it.cpu() if writes else all_of_it.new_empty(0)

    for name, parameter in parameters.items():
        tensors[f"parameters.{name}"] = gathered(parameter)
        tensors[f"average.{name}"] = gathered(average.values[name])
    moments = {
        f"{moment}.{name}": gathered(optimizer.state[parameter][moment])
        for name, parameter in parameters.items()
        for moment in _MOMENTS
        if moment in optimizer.state.get(parameter, {})
    }
    whole = {**header, "format": FORMAT, "step": step, "moments": len(moments)}
    if writes:
        save_tensors(path, {**tensors, **moments}, whole, overwrite=True)


def recorded_precision(path: Path) -> str | None:
    """The precision that a state's run was started with, or None where there is no state."""
    if not path.exists():
        return None
    return state_header(path).get("config", {}).get("precision")


def state_header(path: Path) -> dict[str, Any]:
    """The header of a state. Raises HYWUError where a field of it is of another kind than was written."""
    return _checked(path, read_header(path))


def _checked(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    kinds = {"config": dict, "identity": dict, "step": int, "moments": int, "seconds": (int, float)}
    check_fields(header, kinds, str(path), null=False)
    settings = {"steps": int, "lr": (int, float), "warmup": int, "precision": str}
    check_fields(header.get("config", {}), settings, f"{path}: config", null=False)
    return header


def load_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    average: Average,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Restore a state; returns its header. Raises HYWUError, before anything changes, on a misfit."""
    with open_tensors(path) as file:
        header = _checked(path, parse_header(path, file.metadata()))
        if header.get("format") != FORMAT or "step" not in header:
            raise HYWUError(f"{path}: not a training state of this program; choose another folder.")
        names = set(file.keys())
        kept = [f"{m}.{name}" for m in _MOMENTS for name in parameters if f"{m}.{name}" in names]
        wanted = [f"{kind}.{name}" for name in parameters for kind in ("parameters", "average")]
        for key in (*wanted, *kept):
            kind, _, name = key.partition(".")
            parameter = parameters[name]
            shape = tuple(file.get_slice(key).get_shape()) if key in names else None
            if shape != tuple(parameter.shape):
                what = "is missing" if shape is None else f"is {shape}"
                of = "" if kind == "parameters" else f"{kind} of "
                raise HYWUError(
                    f"{path}: {of}{name} {what}, the model has {tuple(parameter.shape)}; go on with the "
                    "model that the run was started with, or use another output folder."
                )
            dtype = average.values[name].dtype if kind == "average" else parameter.dtype
            if (stored := file.get_slice(key).get_dtype()) != NAMES.get(dtype, stored):
                raise HYWUError(
                    f"{path}: {kind} of {name} is stored as {stored}, it is trained in {dtype}; another program "
                    "changed the file: use a whole copy, or another output folder."
                )
        moments = _check_moments(path, header, names, parameters)
        # one tensor after another: the whole file is as large as all that is trained
        with torch.no_grad():
            for name, parameter in parameters.items():
                put(parameter, file.get_tensor(f"parameters.{name}"))
                put(average.values[name], file.get_tensor(f"average.{name}"))
                found = [m for m in _MOMENTS if f"{m}.{name}" in moments]
                if not found:
                    continue
                kept = {m: torch.empty_like(parameter) for m in found}
                for m, moment in kept.items():
                    put(moment, file.get_tensor(f"{m}.{name}"))
                steps = _steps(header["step"], parameter, optimizer)
                optimizer.state[parameter] = {"step": steps, **kept}
    return header


def _check_moments(
    path: Path, header: Mapping[str, Any], names: set[str], parameters: Mapping[str, nn.Parameter]
) -> set[str]:
    """Names of the optimizer's moments in a state; HYWUError where one that was written is missing."""
    moments = {key for key in names if key.startswith(tuple(f"{m}." for m in _MOMENTS))}
    alone = [
        n for n in parameters if f"exp_avg_sq.{n}" in moments and f"exp_avg.{n}" not in moments
    ]
    written = header.get("moments", len(moments))
    if alone or written != len(moments):
        what = f"exp_avg.{alone[0]}" if alone else f"{written - len(moments)} of {written} moments"
        raise HYWUError(
            f"{path}: the optimizer's state lacks {what}; use a whole copy of the file, or another output "
            "folder."
        )
    return moments


def _steps(step: int, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    """AdamW's count of steps, where it keeps it: fused on the device, else on the CPU."""
    device = parameter.device if optimizer.defaults.get("fused") else "cpu"
    return torch.tensor(float(step), dtype=torch.float32, device=device)
