"""The training loop: condition, generated LoRA, adapted base, loss, update; resumable to the bit.

Everything random is a function of (seed, step): the examples, the noise, the order. So a state needs no
random generators, and a run of two processes sees what a run of one sees.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import HYWUError, get_logger
from .base import BaseModel, Batch, BatchSource, Draws, frozen_digest
from .devices import make_accelerator, steady_attention
from .graphs import RecordedStep, suits
from .logs import Log, Progress, plot_loss, save_grid
from .muon import Muon, adamw
from .schedule import Average, TrainConfig, lr_at, refuse_differences
from .sharding import Shards, averaged, gathered_strategy, sharding_asked, whole
from .state import load_state, save_state, state_header
from .stopping import Interrupt
from .strategies import Strategy, read_export
from .validation import Validation

logger = get_logger(__name__)

STATE = "state.safetensors"


class Objective(nn.Module):
    """The loss of a batch as one module, so that a wrapper for several processes can hold it."""

    def __init__(self, base: BaseModel, strategy: Strategy) -> None:
        super().__init__()
        self.trained = strategy.trained
        # out of reach of nn.Module: the base is neither trained nor synchronized nor saved
        self._hidden = (base, strategy)
        # torch's data parallelism, which looks for unused parameters (see `devices`), warns where it finds none
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """Mean loss of the batch's items."""
        base, strategy = self._hidden
        with strategy.adapted(batch) as module:
            return base.loss(module, batch, draws).mean()


class Trainer:
    """Trains a strategy on a base model; `folder` holds the state, logs, plot and samples.

    batches: step -> whole batch.
    samples: examples whose edits are drawn now and then.
    device: a name that torch knows; None is the machine's accelerator, else the CPU.
    channels_last: memory format of all images and convolutions.
    identity: JSON-safe; what a run can't go on without (data, tasks, rank): a state of another one is refused
        by name.
    extra: JSON-safe, kept in the state's header.
    on_step: called after each step with (steps done, loss); True keeps a state and stops.
    on_save: called with the steps done after a state was written, on the main process.
    validation: see `Validation`. Call `run`; call it again, or in a new process, to go on.
    Raises HYWUError on a device that isn't there and a batch that can't be split.
    """

    def __init__(
        self,
        base: BaseModel,
        strategy: Strategy,
        batches: BatchSource,
        config: TrainConfig,
        folder: Path,
        *,
        samples: Batch | None = None,
        save_every: int = 100,
        sample_every: int = 0,
        tensorboard: bool = False,
        wandb: bool = False,
        device: str | None = None,
        channels_last: bool = False,
        identity: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        on_step: Callable[[int, float], bool] | None = None,
        on_save: Callable[[int], None] | None = None,
        validation: Validation | None = None,
    ) -> None:
        self.base, self.strategy, self.batches = base, strategy, batches
        self.on_step, self.on_save, self.validation = on_step, on_save, validation
        self.config, self.folder, self.samples = config, Path(folder), samples
        self.save_every, self.sample_every = save_every, sample_every
        self.boards, self.extra = (tensorboard, wandb), dict(extra or {})
        self.identity = {"strategy": strategy.name, "base": base.name, **(identity or {})}
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.seconds, self.step, self.interrupted = 0.0, 0, False
        self._prepare(device)

    def _prepare(self, device: str | None) -> None:
        config = self.config
        self.accelerator = make_accelerator(device, config.precision)
        self.device, processes = self.accelerator.device, self.accelerator.num_processes
        parts = processes * config.accumulation
        if config.batch_size % config.accumulation or config.batch_size < parts:
            raise HYWUError(
                f"training: a batch of {config.batch_size} can't be split evenly into {config.accumulation} parts "
                f"with an example for each of {processes} processes; choose a multiple of {config.accumulation}, "
                f"{parts} at least."
            )
        trained, base = self.strategy.trained, self.base.module
        self.shards = Shards(self.strategy, base, self.accelerator) if sharding_asked() else None
        self.parameters = {n: p for n, p in trained.named_parameters() if p.requires_grad}
        base.requires_grad_(False).to(self.device, memory_format=self.memory_format)
        trained.to(memory_format=self.memory_format)
        # the strategy may share modules with the base, or train a copy of it: only its own train
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        fused = self.device.type == "cuda"
        settings = (config.lr, config.weight_decay, config.betas, fused)
        if config.optimizer == "muon":
            optimizer: torch.optim.Optimizer = Muon(trained, *settings)
        else:
            optimizer = adamw(self.parameters.values(), *settings)
        objective = Objective(self.base, self.strategy)
        prepare = self.accelerator.prepare if self.shards is None else self.shards.prepare
        self.objective, self.optimizer = prepare(objective, optimizer)
        self.average = Average(self.parameters, config.ema)
        self.recorded = RecordedStep(self) if suits(self) else None

    # -- running ---------------------------------------------------------------------------------

    def run(self, until: int | None = None) -> bool:
        """Train to the end, or to step `until`. Returns whether the run is over: all steps are done, or
        the validation's patience is.

        Ctrl-C (or SIGTERM) ends the step in progress, keeps a state and returns False. Raises HYWUError when
        the loss stops being finite (the last state is kept) or the state is of another run, and
        RuntimeError when the frozen base has changed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        frozen = self.strategy.trained is not self.base.module
        digest = frozen_digest(self.base.module) if frozen else ""
        self._resume()
        log = Log(self.folder, self.step, *self.boards) if self._main else None
        if self.validation is not None:
            self.validation.begin(self.folder, self.step, self._main)
        stop = min(self.config.steps, until or self.config.steps)
        try:
            with Interrupt() as interrupt, steady_attention(self.device):
                self._loop(stop, log, interrupt)
        finally:
            if log is not None:
                log.close()
        self.accelerator.wait_for_everyone()
        if frozen and frozen_digest(self.base.module) != digest:
            raise RuntimeError("The base model's weights changed during the training.")
        return self.step >= self.config.steps or self._over

    @property
    def _over(self) -> bool:
        return self.validation is not None and self._any(self.validation.over)

    @property
    def _main(self) -> bool:
        return self.accelerator.is_main_process

    def _loop(self, stop: int, log: Log | None, interrupt: Interrupt) -> None:
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=self.strategy.name,
            unit="step",
            disable=not self._main,
            mininterval=1.0,
        )
        progress = Progress(self, log, bar)
        with contextlib.closing(bar):
            while self.step < stop and not self._over:
                started = time.perf_counter()
                losses = self._train_step(self.step)
                self.step += 1
                self.seconds += time.perf_counter() - started
                loss = progress.add(losses)
                asked = self.on_step is not None and self.on_step(self.step, loss)
                self.interrupted = self._any(asked or interrupt.asked)
                if self.interrupted or self.step == stop or self.step % self.save_every == 0:
                    progress.read()
                    self.save(log)
                    if self.validation is not None and not self.interrupted:
                        self.validation.measure(self)
                if self.sample_every and self.step % self.sample_every == 0:
                    self.draw_samples()
                if self.interrupted:
                    break

    def _train_step(self, step: int) -> Tensor:
        """One optimizer step; float32 ``[2]`` on the device: the mean loss over all processes, and the norm of
        the gradient before clipping.
        """
        config, accelerator = self.config, self.accelerator
        if self.recorded is not None:
            batch, draws = self._whole(step)
            rate, weight = lr_at(config, step), self.average.weight(step)
            return self.recorded(batch, draws, rate, weight)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(config, step)
        parts, usual = self._shares(step), config.batch_size / accelerator.num_processes
        total = torch.zeros((), device=self.device)
        for i, (batch, draws) in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.objective):
                # the mean over processes counts each the same, however many items it had
                loss = self.objective(batch, draws) / (usual / len(batch))
                accelerator.backward(loss)
            total += loss.detach().float()
        norm = accelerator.clip_grad_norm_(self.parameters.values(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(step)
        mean = accelerator.reduce(total, reduction="mean")
        return torch.stack([mean, whole(norm).detach().float()])

    def _whole(self, step: int) -> tuple[Batch, Draws]:
        """A step's batch of all processes, and its draws."""
        batch = self.batches(step)
        if len(batch) != self.config.batch_size:
            raise HYWUError(
                f"training: the data gave {len(batch)} examples for step {step}, the batch size is "
                f"{self.config.batch_size}."
            )
        return batch, self.base.draw(batch, _mix(self.config.seed, step))

    def _shares(self, step: int) -> list[tuple[Batch, Draws]]:
        """This process's part of a step's batch, cut for accumulation."""
        batch, draws = self._whole(step)
        size, config = len(batch), self.config
        parts = self.accelerator.num_processes * config.accumulation
        first = self.accelerator.process_index * config.accumulation
        shares = []
        for part in range(first, first + config.accumulation):
            items = list(range(part * size // parts, (part + 1) * size // parts))
            share = {key: value[items] for key, value in draws.items()}
            shares.append(self._on_device(batch.select(items), share))
        return shares

    def _on_device(self, batch: Batch, draws: Draws) -> tuple[Batch, Draws]:
        moved = {key: value.to(self.device) for key, value in draws.items()}
        return batch.to(self.device, self.memory_format), moved

    def _any(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all must leave the loop after the same step."""
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.device)
        return float(self.accelerator.reduce(flag, reduction="sum")) > 0

    # -- keeping ---------------------------------------------------------------------------------

    def save(self, log: Log | None = None) -> None:
        """Write the state (main process only; of what is sharded all processes give their part)."""
        if not self._main and self.shards is None:
            return
        header = {
            "config": self.config.to_json(),
            "strategy": self.strategy.name,
            "base": self.base.name,
            "identity": self.identity,
            "seconds": self.seconds,
            "processes": self.accelerator.num_processes,
            **self.extra,
        }
        path = self.folder / STATE
        save_state(path, self.step, self.parameters, self.average, self._inner, header, self._main)
        if not self._main:
            return
        if self.on_save is not None:
            self.on_save(self.step)
        if log is not None:
            plot_loss(log.rows, self.folder / "loss.png")

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _resume(self) -> None:
        path = self.folder / STATE
        if not path.exists():
            return
        header = state_header(path)
        recorded = {**header, **header.get("identity", {})}
        # states from before `identity` say only strategy and base
        refuse_differences(
            recorded, {k: v for k, v in self.identity.items() if k in recorded}, path
        )
        self.config.check_same(header.get("config", {}), path)
        header = load_state(path, self.parameters, self.average, self._inner)
        if self.recorded is not None:  # a recording writes the moments that were there before
            self.recorded = RecordedStep(self)
        self.step, self.seconds = int(header["step"]), float(header.get("seconds", 0))
        former = header.get("config", {}).get("steps", 0)
        if self.config.steps > former and self._main:
            logger.warning(
                "%s: goes on from step %d to %d, where it was to end at %d; the learning rate is %.2g again",
                self.folder, self.step, self.config.steps, former, lr_at(self.config, self.step),
            )  # fmt: skip

    def draw_samples(self) -> None:
        """A grid of source, target and the edit with averaged weights, as a PNG."""
        if self.samples is None or not (self._main or self.shards):
            return
        edits = self.edit(self.samples.to(self.device, self.memory_format))
        path = self.folder / "samples" / f"step_{self.step:06d}.png"
        if self._main:
            save_grid([self.samples.source, self.samples.target, edits], path)

    @torch.no_grad()
    def edit(self, batch: Batch, seed: int = 0) -> Tensor:
        """Edits of a batch on the training's device, with the averaged weights."""
        with averaged(self.average, self.shards), self.strategy.adapted(batch) as module:
            return self.base.edit(module, batch, seed)

    @torch.no_grad()
    def mean_loss(self, examples: Iterable[tuple[Batch, int]]) -> float:
        """Mean loss of batches, each with the seed of its draws, with the averaged weights in float32."""
        losses = []
        with averaged(self.average, self.shards), steady_attention(self.device):
            for example, seed in examples:
                batch, draws = self._on_device(example, self.base.draw(example, seed))
                with self.strategy.adapted(batch) as module:
                    losses.append(float(self.base.loss(module, batch, draws).mean()))
        return math.fsum(losses) / len(losses)

    def read(self, path: Path) -> Mapping[str, Any]:
        """Take in the weights of a whole run from what `export` wrote, when its state is gone; its provenance.

        Raises HYWUError where they were trained otherwise or not to the end.
        """
        about = read_export(self.strategy, path)
        mine = {"steps": self.config.steps, "training": self.config.to_json()}
        refuse_differences(about, mine, path)
        self.average = Average(self.parameters, self.config.ema)
        self.step, self.seconds = self.config.steps, float(about.get("seconds", 0))
        return about

    def export(self, path: Path, provenance: Mapping[str, Any]) -> Path:
        """Write the averaged weights for use, with how they came about."""
        about = {
            "strategy": self.strategy.name,
            "base": self.base.name,
            "steps": self.step,
            "training": self.config.to_json(),
            "seconds": round(self.seconds, 1),
            **provenance,
        }
        if self.shards is not None:
            return gathered_strategy(self.strategy, self.folder / STATE, self.step).export(
                path, about
            )
        with self.average.swapped():
            return self.strategy.export(path, about)


def _mix(seed: int, step: int) -> int:
    """A seed of its own for every (seed, step)."""
    return (seed * 1_000_003 + step * 7919 + 12345) & 0x7FFF_FFFF_FFFF_FFFF
