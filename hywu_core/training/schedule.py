"""Hyperparameters of a training, the learning-rate schedule, the moving average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import HYWUError
from ..precision import usual_precision
from .sharding import is_sharded, local

PRECISIONS = ("no", "bf16", "fp16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant")
#: Optimizer -> strategy -> peak learning rate to start with. Muon's made the bundled weights (chosen by the
#: conflict experiment's trials, and they hold for a whole run); AdamW's are in the middle of what its trials
#: favour. A step of a generator's output head moves every value of every LoRA.
RATES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "muon": {"hywu": 1.4e-3, "shared": 2e-3, "single": 2e-3, "sft": 1e-3},
        "adamw": {"hywu": 4e-4, "shared": 1e-2, "single": 1e-2, "sft": 1e-3},
    }
)
#: Settings that came later; a state says them only where they differ, and older states mean these.
LATER: Mapping[str, Any] = MappingProxyType({"betas": [0.9, 0.99], "schedule": "cosine"})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the trained weights depend on, but for the data and the model.

    batch_size: examples of one optimizer step over all processes and accumulated parts.
    accumulation: parts that a process splits its share into.
    warmup: steps of linear warm-up, then a cosine down to `final_lr` times the peak.
    ema: decay of the moving average, 0 for none; early on it averages over what there is.
    clip: largest norm of the gradient.
    precision: "bf16" runs under autocast with float32 weights.
    optimizer: "muon" orthogonalizes the steps of matrices (see `muon`); lr is that of all other weights then.
    betas: AdamW's.
    schedule: "constant" stays at the peak after the warm-up.
    """

    steps: int
    batch_size: int = 24
    lr: float = 4e-4
    warmup: int = 20
    final_lr: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.98
    accumulation: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise HYWUError(f"training: {name} is {getattr(self, name)}; it must be 1 or more.")
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise HYWUError(f"training: the learning rate is {self.lr}; it must be above 0.")
        if not 0 <= self.ema < 1:
            raise HYWUError(f"training: ema is {self.ema}; it must be in [0, 1).")
        if self.precision not in PRECISIONS:
            raise HYWUError(f"training: precision '{self.precision}'; it is no, bf16 or fp16.")
        if self.optimizer not in OPTIMIZERS:
            raise HYWUError(f"training: optimizer '{self.optimizer}'; it is adamw or muon.")
        if self.schedule not in SCHEDULES:
            raise HYWUError(f"training: schedule '{self.schedule}'; it is cosine or constant.")

    def to_json(self) -> dict[str, Any]:
        """JSON-safe; settings of `LATER` only where they differ from it."""
        whole = asdict(self) | {"betas": list(self.betas)}
        return {key: value for key, value in whole.items() if LATER.get(key) != value}

    def check_same(self, recorded: Mapping[str, Any], where: object) -> None:
        """Raise HYWUError naming every setting in which an interrupted run was started otherwise.

        More steps are not another setting: a run may be gone on with beyond its end.
        """
        mine, theirs = ({**LATER, "optimizer": "adamw", **x} for x in (self.to_json(), recorded))
        if int(mine["steps"]) > int(theirs.get("steps", 0)):
            theirs["steps"] = mine["steps"]
        refuse_differences(theirs, mine, where)


def refuse_differences(recorded: Mapping[str, Any], mine: Mapping[str, Any], where: object) -> None:
    """Raise HYWUError naming each key of `mine` that was recorded otherwise, with both values."""
    different = [
        f"{key} {_short(recorded.get(key))} -> {_short(value)}"
        for key, value in mine.items()
        if recorded.get(key) != value
    ]
    if different:
        raise HYWUError(
            f"{where}: was started with other settings ({', '.join(different)}); use the same ones to "
            "go on, or another output folder."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def chosen_precision(asked: str, recorded: str | None, device: str | None = None) -> str:
    """What "auto" means: as the run was started, on whatever machine; at the start `usual_precision`."""
    return asked if asked != "auto" else recorded or usual_precision(device)


def lr_at(config: TrainConfig, step: int) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then a cosine or the peak."""
    warmup = min(config.warmup, config.steps - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, config.steps - warmup)
    floor = config.lr * config.final_lr
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Average:
    """Exponential moving average of the trained parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.values = {n: p.detach().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after `step` (counted from 0)."""
        mine, theirs = (map(local, d.values()) for d in (self.values, self.parameters))
        torch._foreach_lerp_(list(mine), [p.detach() for p in theirs], self.weight(step))

    def weight(self, step: int) -> float:
        """The share of the parameters after `step` in the average."""
        return 1 - (min(self.decay, (1 + step) / (10 + step)) if self.decay else 0.0)

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """`update` by a weight on the device, float32 ``[]``."""
        mine, theirs = list(self.values.values()), [p.detach() for p in self.parameters.values()]
        apart = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(apart, weight)
        torch._foreach_add_(mine, apart)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the block the parameters hold their averages, read only; nothing is copied but of sharded ones.

        They stay the same objects, so the optimizer's state and hooks on them are not touched.
        """
        kept = {
            name: local(p.detach()).clone() if is_sharded(p) else p.data
            for name, p in self.parameters.items()
        }
        try:
            self._set(self.values)
            yield
        finally:
            self._set(kept)

    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            if is_sharded(parameter):  # whoever gathers it holds on to its memory
                local(parameter.detach()).copy_(local(values[name]))
            else:
                parameter.data = values[name]
            # whoever keeps what follows from the weights learns by the version that they are others
            torch.autograd.graph.increment_version(parameter)
