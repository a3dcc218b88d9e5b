"""What the conflict experiment trains and how: one dataclass, fixed before the first step.

Every strategy gets the same examples in the same order, the same rank, schedule and number of tuned
learning rates. What differs is written here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from ...bases.bundled.training import AT_START
from ...errors import HYWUError
from ...training.schedule import TrainConfig
from ..tasks import CONFLICT

#: optimizer -> strategy -> learning rates tried; as many for each. A static LoRA and a generator live on different
#: scales: one step of a generator's output head moves every value of every LoRA. None is higher than what
#: holds for a whole run, for a short trial would choose it: at 1e-2 a Single LoRA looked best after 120
#: steps with Muon, and then its gradients grew a hundredfold and it ended 4 dB below that of 2e-3.
LEARNING_RATES: Mapping[str, Mapping[str, tuple[float, ...]]] = MappingProxyType(
    {
        "muon": {
            "hywu": (6e-4, 9e-4, 1.4e-3),
            "shared": (9e-4, 1.4e-3, 2e-3),
            "shared_large": (1e-4, 3e-4, 1e-3),
            "sft": (1e-4, 3e-4, 1e-3),
            "single": (9e-4, 1.4e-3, 2e-3),
        },
        "adamw": {
            "hywu": (6e-4, 1.2e-3, 2.4e-3),
            "shared": (3e-3, 1e-2, 3e-2),
            "shared_large": (1e-4, 3e-4, 1e-3),
            "sft": (1e-4, 3e-4, 1e-3),
            "single": (3e-3, 1e-2, 3e-2),
        },
    }
)


@dataclass(frozen=True)
class GeneratorSize:
    """Hyperparameters of the HY-WU generator of the experiment (see `GeneratorConfig`)."""

    token_dim: int = 192
    d_model: int = 384
    head_dim: int = 64
    num_blocks: int = 1
    lora_a_scale: float = 0.05
    lora_b_scale: float = 0.6


@dataclass(frozen=True)
class ConflictPlan:
    """What is trained and measured; tasks come in contradictory pairs.

    main_rank: of the main table (about 1 % of the editor's width).
    ranks: of the sweep, where all are trained for sweep_steps, a part of the main runs' steps.
    seeds: in all, of HY-WU, Shared and Single; those after `seed`, which begin with other weights and have
        other crops, phrasings and noise, are trained for seed_steps with its learning rates.
    tune_steps: length of a run that tries a learning rate, 0 to take the middle one untried.
    precision, optimizer: of all trainings.
    error: of an item, at_start: share of the draws at t = 1 (see `EditorBase`).
    written_steps: over so many steps the composed phrasings come in, from none to all (see `make_batch`); 0:
        all from the start.
    crop_size: side of the crops that are trained on, in pixels.
    crops: of each evaluation image, of evaluation_size pixels, each edited once per task.
    """

    steps: int = 4000
    precision: str = "bf16"
    optimizer: str = "muon"
    error: str = "log"
    at_start: float = AT_START
    written_steps: int = 600
    sweep_steps: int = 600
    seeds: int = 3
    seed_steps: int = 1000
    batch_size: int = 24
    tasks: tuple[str, ...] = tuple(CONFLICT)
    main_rank: int = 4
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    generator: GeneratorSize = GeneratorSize()
    tune_steps: int = 120
    crop_size: int = 64
    crops: int = 1
    evaluation_size: int = 128
    sampling_steps: int = 4
    max_images: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.main_rank not in self.ranks:
            raise HYWUError(f"conflict: the main rank {self.main_rank} must be among {self.ranks}.")
        if unknown := set(self.tasks) - CONFLICT.keys():
            raise HYWUError(f"conflict: no such task: {', '.join(sorted(unknown))}.")

    def training(self, run: Run, lr: float, steps: int, batch_size: int) -> TrainConfig:
        """The schedule of every strategy."""
        return TrainConfig(
            steps, batch_size, lr, warmup=min(40, steps // 5), ema=0.98, precision=self.precision,
            seed=self.seed_of(run), optimizer=self.optimizer,
        )  # fmt: skip

    @property
    def runs(self) -> list[Run]:
        """Every training of the experiment, those of the main table first."""
        rank = self.main_rank
        runs = [Run("hywu", rank), Run("shared", rank)]
        runs += [Run("single", rank, task) for task in self.tasks]
        runs += [Run("shared_large", 0), Run("sft", 0)]
        for seed in self.other_seeds:
            runs += [Run("hywu", rank, seed=seed), Run("shared", rank, seed=seed)]
            runs += [Run("single", rank, task, seed=seed) for task in self.tasks]
        ranks = [rank, *(other for other in self.ranks if other != rank)]
        return runs + [Run(s, r, sweep=True) for r in ranks for s in ("hywu", "shared")]

    @property
    def main_runs(self) -> list[Run]:
        """What the main table compares at the main rank."""
        return [run for run in self.runs if run.rank == self.main_rank and run.main]

    def steps_of(self, run: Run) -> int:
        if run.main:
            return self.steps
        return self.sweep_steps if run.sweep else self.seed_steps

    @property
    def other_seeds(self) -> range:
        return range(self.seed + 1, self.seed + self.seeds)

    def seed_of(self, run: Run) -> int:
        return self.seed if run.seed is None else run.seed

    @property
    def opposites(self) -> dict[str, str]:
        """Task -> the one that undoes it."""
        return {task: CONFLICT[task].opposite for task in self.tasks}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def quick(cls) -> ConflictPlan:
        """The whole experiment in a few minutes on two cores; its figures mean nothing."""
        small = GeneratorSize(token_dim=192, d_model=64, head_dim=32, num_blocks=1)
        return replace(
            cls(), steps=12, sweep_steps=6, seeds=2, seed_steps=6, written_steps=6, batch_size=8,
            main_rank=2, ranks=(1, 2), generator=small, tune_steps=2, crops=1, sampling_steps=2, max_images=3,
        )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training: strategy (a key in `LEARNING_RATES`), rank (0 where the strategy sets it), task.

    sweep: of the sweep over ranks.
    seed: another one than the plan's.
    Of both only the seen phrasings are evaluated.
    """

    strategy: str
    rank: int
    task: str = ""
    sweep: bool = False
    seed: int | None = None

    @property
    def main(self) -> bool:
        """Whether it is of the main table."""
        return not self.sweep and self.seed is None

    @property
    def name(self) -> str:
        rank, sweep = f"r{self.rank}" if self.rank else "", "sweep" if self.sweep else ""
        seed = "" if self.seed is None else f"s{self.seed}"
        parts = [self.strategy, self.task, rank, sweep, seed]
        return "_".join(part for part in parts if part)
