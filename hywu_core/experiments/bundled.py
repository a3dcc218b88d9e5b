"""Trainings through the bundled editor: a user's own pairs or the built-in tasks, each strategy.

`hywu train` is this with its arguments parsed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..bases.bundled.checkpoint import bundled, load_editor
from ..bases.bundled.training import AT_START, ONE_IMAGE, EditorBase
from ..devices import chosen_device
from ..errors import HYWUError
from ..files import folder_lock
from ..generator.config import GeneratorConfig
from ..layout import LoRALayout
from ..training.base import Batch, BatchSource
from ..training.crops import Size
from ..training.data import Ahead, PairBatches
from ..training.pairs import (
    Pair,
    held_out,
    number_of_references,
    pairs_identity,
    phrasings,
    read_pairs,
)
from ..training.recompute import HeldNetwork, recomputed
from ..training.schedule import RATES, TrainConfig, chosen_precision, refuse_differences
from ..training.sharding import repeated
from ..training.state import state_header
from ..training.strategies import FullFineTuning, HyperNetwork, StaticLoRA, Strategy
from ..training.trainer import STATE, Trainer
from ..training.validation import Validation
from .conflict.plan import ConflictPlan, GeneratorSize
from .conflict.runs import EXCLUDE
from .images import PACKAGES, ImagePool, split_files
from .tasks import CONFLICT, VERSION, TaskBatches, get_task

WEIGHTS, BEST = "weights.safetensors", "best.safetensors"
#: What a run's identity says only where it isn't this.
USUAL: Mapping[str, Any] = MappingProxyType({"crop": "random", "sizes": None, "validation": 0.0})


@dataclass(frozen=True)
class Request:
    """What is trained, on what, how long; each field is an option of `hywu train`.

    data: None for the built-in tasks.
    crop, sizes, cache, workers: of it, see `PairBatches`; sizes None is the editor's own.
    lr: 0 or None takes the one that the run was begun with, else of `RATES`.
    error: of an item (see `EditorBase`); None takes the logarithm, or what a run was begun with.
    init: a generator's file or "bundled", whose weights are begun with.
    validation: share of the pairs that is not trained on.
    Raises HYWUError on options that don't go together.
    """

    out: Path
    data: Path | None = None
    tasks: Sequence[str] | None = None
    task: str | None = None
    strategy: str = "hywu"
    rank: int = 2
    steps: int = 500
    batch_size: int = 24
    accumulation: int = 1
    lr: float | None = None
    error: str | None = None
    precision: str = "auto"
    optimizer: str = "muon"
    checkpointing: bool = False
    d_model: int = 512
    blocks: int = 1
    init: str | None = None
    seed: int = 0
    save_every: int = 100
    sample_every: int = 100
    validation: float = 0.0
    patience: int = 0
    tensorboard: bool = False
    wandb: bool = False
    editor: Path | None = None
    device: str | None = None
    commit: str = ""
    crop: str = "random"
    sizes: Sequence[Size] | None = None
    cache: Path | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_size", "accumulation", "d_model", "blocks"):
            if getattr(self, name) < 1:
                raise HYWUError(f"training: {name} is {getattr(self, name)}; it must be 1 or more.")
        if (self.strategy == "single") != bool(self.task):
            raise HYWUError(
                "training: the strategy 'single' trains one task: name it (--task NAME), and only then."
            )
        if self.init and self.strategy != "hywu":
            raise HYWUError(
                f"training: --init begins with a generator's weights and the strategy is '{self.strategy}'; "
                "it goes with 'hywu'."
            )
        if self.data is not None and self.tasks:
            raise HYWUError("--tasks names built-in tasks; your own --data says its tasks itself.")
        if self.data is None and self.validation:
            raise HYWUError(
                "--validation is a share of --data; the built-in tasks have none to share."
            )
        given = {"--crop": self.crop != "random", "--sizes": self.sizes, "--cache": self.cache}
        if self.data is None and any(given.values()):
            name = next(name for name, value in given.items() if value)
            raise HYWUError(f"{name} is about --data; the built-in tasks make their own crops.")

    @classmethod
    def names(cls) -> set[str]:
        return {field.name for field in fields(cls)}


class Training:
    """A run of `Request`, ready to go or to go on. main: whether this is the process that writes."""

    def __init__(self, request: Request, say: Callable[[str], None]) -> None:
        self.request, self.say = request, say
        editor = load_editor(request.editor or bundled("editor"))
        state = request.out / STATE
        self.header = state_header(state) if state.exists() else {}
        error = _error(request, self.header)
        self.base = EditorBase(editor, error=error, at_start=_at_start(self.header))
        if request.device:  # conditions are looked at before the first step
            self.base.module.to(chosen_device(request.device))
        self.data = _data(request, ConflictPlan.crop_size, say)
        if self.header:
            begun = dict(USUAL) | dict(self.header.get("identity", {}))
            mine = {key: self.data.identity.get(key, value) for key, value in USUAL.items()}
            refuse_differences(begun, mine, state)
        self.config = self._config()
        torch.manual_seed(request.seed + 1)
        strategy = _strategy(request, self.base)
        if isinstance(strategy, HyperNetwork) and not request.init:
            strategy.standardize_on(self.data.batches, 0)
        self.trainer = self._trainer(strategy)
        self.main = self.trainer.accelerator.is_main_process

    def _config(self) -> TrainConfig:
        request, state, header = self.request, self.request.out / STATE, self.header
        recorded = header.get("config", {})
        if header and request.data is None and "identity" not in header:
            raise HYWUError(
                f"{state}: was begun on the built-in tasks of a former version, which made other images; go on "
                "with that version, or use another folder."
            )
        return TrainConfig(
            request.steps, request.batch_size,
            request.lr or recorded.get("lr") or RATES[request.optimizer][request.strategy],
            accumulation=request.accumulation,
            # as a run was begun, whatever is usual today; also when it goes on beyond its end
            warmup=recorded.get("warmup", min(40, request.steps // 5)),
            precision=chosen_precision(request.precision, recorded.get("precision"), request.device),
            seed=request.seed, optimizer=request.optimizer,
        )  # fmt: skip

    def _trainer(self, strategy: Strategy) -> Trainer:
        request, data = self.request, self.data
        validation = None
        if data.held_out:
            best = request.out / BEST
            validation = Validation(
                data.held_out, request.patience, on_best=lambda: self.export(best)
            )
        return Trainer(
            self.base, strategy, data.batches, self.config, request.out, samples=data.samples,
            save_every=request.save_every, sample_every=request.sample_every,
            tensorboard=request.tensorboard, wandb=request.wandb, device=request.device, validation=validation,
            identity=data.identity | _made_of(request, self.base, strategy),
        )  # fmt: skip

    def run(self) -> Path | None:
        """Train to the end, or go on; the weights' file, or None when it was stopped before."""
        request, trainer = self.request, self.trainer
        if not self.main:
            return request.out / WEIGHTS if self._train() else None
        count = trainer.accelerator.num_processes
        processes = f"{count} processes" if count > 1 else "one process"
        processes += ", sharded" if trainer.shards is not None else ""
        self.say(
            f"{request.strategy} on {trainer.device}, {processes}, precision {self.config.precision}"
        )
        with folder_lock(request.out):
            if not self._train():
                self.say(
                    f"stopped after {trainer.step} of {request.steps} steps; the same command goes on"
                )
                return None
            if trainer.step < request.steps:
                self.say(
                    f"ended after {trainer.step} of {request.steps} steps, {request.patience} measurements without a "
                    "better one (--patience)"
                )
            return self.export(request.out / WEIGHTS)

    def _train(self) -> bool:
        """Whether it is over. Checkpointing is of the base's blocks, too."""
        held = self.trainer.strategy
        if not isinstance(held, HeldNetwork):
            return self.trainer.run()
        with contextlib.closing(held), recomputed(repeated(self.base.module)):
            return self.trainer.run()

    def export(self, path: Path) -> Path:
        """Write the averaged weights with how they came about."""
        request = self.request
        about = {"phrasings": self.data.phrasings, "commit": request.commit}
        return self.trainer.export(path, {**about, "data": str(request.data or "built-in")})


# -- what is trained on ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """batches; task -> phrasings trained on; what tells it from other data; examples that are drawn, and held out."""

    batches: BatchSource
    phrasings: dict[str, list[str]]
    identity: dict[str, Any]
    samples: Batch
    held_out: list[Batch]


def _data(request: Request, size: int, say: Callable[[str], None]) -> _Data:
    made = _built_in(request, size) if request.data is None else _own_pairs(request, size, say)
    batches, texts, identity, kept = made
    shown = batches(request.steps).select(range(min(8, request.batch_size)))
    return _Data(batches, texts, identity, shown, kept)


def _built_in(request: Request, size: int):
    tasks = [request.task] if request.task else list(request.tasks or CONFLICT)
    texts = {name: list(get_task(name).seen) for name in tasks}
    pool = ImagePool(split_files("train")).on(request.device)
    batches = TaskBatches(pool, tasks, request.batch_size, size, request.seed)
    return (
        batches,
        texts,
        {"data": dict(PACKAGES.values()), "tasks": tasks, "tasks_version": VERSION},
        [],
    )


def _own_pairs(request: Request, size: int, say: Callable[[str], None]):
    pairs, bad = read_pairs(request.data)
    say(f"{request.data}: {len(pairs)} pairs" + (f", {len(bad)} rows skipped:" if bad else ""))
    for line in bad:
        say(f"  {line}")
    if number_of_references(pairs):
        raise HYWUError(f"{request.data}: {ONE_IMAGE}")
    identity: dict[str, Any] = {"data": pairs_identity(pairs), "tasks": request.task or "all"}
    sizes = [list(one) for one in request.sizes] if request.sizes else None
    more = {"crop": request.crop, "sizes": sizes, "validation": request.validation}
    identity |= {key: value for key, value in more.items() if value != USUAL[key]}

    def batches_of(some: Sequence[Pair]) -> PairBatches:
        return PairBatches(
            some, request.batch_size, request.sizes or size, request.seed, request.task or "",
            crop=request.crop, cache=request.cache, workers=request.workers,
        )  # fmt: skip

    kept = []
    if request.validation:
        pairs, others = held_out(pairs, request.validation, request.seed)
        kept = batches_of(others).once()
    texts = phrasings(pairs)
    if request.task:
        texts = {request.task: texts.get(request.task, [])}
    return Ahead(batches_of(pairs), depth=2), texts, identity, kept


# -- what is trained ---------------------------------------------------------------------------------


def _strategy(request: Request, base: EditorBase) -> Strategy:
    """Freshly initialized, or begun with a checkpoint."""
    if request.strategy == "sft":
        return FullFineTuning(base)
    layout = LoRALayout.of(base.module, request.rank, exclude=EXCLUDE)
    if request.strategy != "hywu":
        return StaticLoRA(base, layout, request.strategy)
    network = HeldNetwork if request.checkpointing else HyperNetwork
    if request.init:
        path = bundled("generator") if request.init == "bundled" else Path(request.init)
        return network.begun_with(base, path, request.checkpointing)
    size = replace(GeneratorSize(), d_model=request.d_model, num_blocks=request.blocks)
    config = GeneratorConfig(
        layout, dict(base.condition_parts), dim_accumulation=math.gcd(request.rank, request.d_model),
        encoder=dict(base.encoder), base=base.name, **asdict(size),
    )  # fmt: skip
    return network(base, config, request.checkpointing)


def _error(request: Request, header: Mapping[str, Any]) -> str:
    """As asked for, or that of the recipe which made the bundled weights; a run that was begun keeps its own."""
    if not header:
        return request.error or "log"
    begun = header.get("identity", {}).get("error", "mse")  # what runs had that don't say it
    asked = {"error": request.error or begun}
    refuse_differences({"error": begun}, asked, request.out / STATE)
    return begun


def _at_start(header: Mapping[str, Any]) -> float:
    """Of the recipe; a run that was begun keeps its own, and former ones had none at t = 1."""
    return header.get("identity", {}).get("at_start", 0.0) if header else AT_START


def _made_of(request: Request, base: EditorBase, strategy: Strategy) -> dict[str, Any]:
    """What a run can't go on without, beside its data and settings."""
    made: dict[str, Any] = {"editor": base.encoder["editor"], "error": base.error}
    made |= {"at_start": base.at_start} if base.at_start else {}
    if isinstance(strategy, HyperNetwork):
        config = strategy.trained.config
        made |= {"rank": config.layout.rank, "d_model": config.d_model, "blocks": config.num_blocks}
        made["init"] = request.init or ""
    elif request.strategy != "sft":
        made["rank"] = request.rank
    return made
