"""The training loop: condition, generated LoRA, adapted base, loss, update; resumable to the bit.

Everything random is a function of (seed, step): the examples, the noise, the order. So a state needs no
random generators, and a run of two processes sees what a run of one sees.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import HYWUError, need
from .base import BaseModel, Batch, BatchSource, Draws, frozen_digest
from .logs import Log, plot_loss, save_grid
from .muon import Muon, adamw
from .schedule import Average, TrainConfig, lr_at
from .state import load_state, save_state
from .strategies import Strategy

logger = logging.getLogger(__name__)

STATE = "state.safetensors"


class Objective(nn.Module):
    """The loss of a batch as one module, so that a wrapper for several processes can hold it."""

    def __init__(self, base: BaseModel, strategy: Strategy) -> None:
        super().__init__()
        self.trained = strategy.trained
        # out of reach of nn.Module: the base is neither trained nor synchronized nor saved
        self._hidden = (base, strategy)

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """Mean loss of the batch's items."""
        base, strategy = self._hidden
        condition = None
        if strategy.needs_condition:
            condition = base.encode(*batch.asked)
        with strategy.adapted(condition) as module:
            return base.loss(module, batch, draws).mean()


class Trainer:
    """Trains a strategy on a base model; `folder` holds the state, logs, plot and samples.

    batches: step -> whole batch. samples: examples whose edits are drawn now and then. extra: JSON-safe
    facts kept in the state's header. on_step: called after each step with (steps done, loss); True
    keeps a state and stops. Call `run`; call it again, or in a new process, to go on.
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
        device: str | None = None,
        extra: dict[str, Any] | None = None,
        on_step: Callable[[int, float], bool] | None = None,
    ) -> None:
        self.base, self.strategy, self.batches, self.on_step = base, strategy, batches, on_step
        self.config, self.folder, self.samples = config, Path(folder), samples
        self.save_every, self.sample_every = save_every, sample_every
        self.tensorboard, self.extra = tensorboard, dict(extra or {})
        self.seconds, self.step, self.interrupted = 0.0, 0, False
        self._prepare(device)

    def _prepare(self, device: str | None) -> None:
        accelerate = need("accelerate", "to train")
        # a second trainer in one process may have another precision, which the shared state forbids
        accelerate.state.AcceleratorState._reset_state()
        self.accelerator = accelerate.Accelerator(
            mixed_precision=self.config.precision, cpu=device == "cpu"
        )
        config, processes = self.config, self.accelerator.num_processes
        if config.batch_size % (processes * config.accumulation):
            raise HYWUError(
                f"training: a batch of {config.batch_size} can't be split evenly over {processes} "
                f"processes with {config.accumulation} parts each; choose a multiple of "
                f"{processes * config.accumulation}."
            )
        named = self.strategy.trained.named_parameters()
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.base.module.requires_grad_(False).to(self.accelerator.device)
        # the strategy may share modules with the base, or train a copy of it: only its own train
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        optimizer = self._make_optimizer()
        objective = Objective(self.base, self.strategy)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.average = Average(self.parameters, config.ema)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        if config.optimizer == "muon":
            return Muon(self.strategy.trained, config.lr, config.weight_decay)
        return adamw(self.parameters.values(), config.lr, config.weight_decay)

    # -- running ---------------------------------------------------------------------------------

    def run(self, until: int | None = None) -> bool:
        """Train to the end, or to step `until`. Returns whether all steps are done.

        Ctrl-C (or SIGTERM) ends the step in progress, keeps a state and returns False. Raises HYWUError when
        the loss stops being finite (the last state is kept) or the state is of another run, and
        RuntimeError when the frozen base has changed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = frozen_digest(self.base.module)
        self._resume()
        log = Log(self.folder, self.step, self.tensorboard) if self._main else None
        stop = min(self.config.steps, until or self.config.steps)
        try:
            with _Interrupt() as interrupt:
                self._loop(stop, log, interrupt)
        finally:
            if log is not None:
                log.close()
        if frozen_digest(self.base.module) != digest:
            raise RuntimeError("The base model's weights changed during the training.")
        return self.step >= self.config.steps

    @property
    def _main(self) -> bool:
        return self.accelerator.is_main_process

    def _loop(self, stop: int, log: Log | None, interrupt: _Interrupt) -> None:
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=self.strategy.name,
            unit="step",
            disable=not self._main,
            mininterval=1.0,
        )
        smooth = None
        while self.step < stop:
            started = time.perf_counter()
            loss, norm = self._train_step(self.step)
            if not torch.isfinite(torch.tensor([loss, norm])).all():
                bar.close()
                raise HYWUError(
                    f"{self.folder}: the loss is {loss} (gradient norm {norm}) at step {self.step}; "
                    "train again with a lower learning rate."
                )
            self.step += 1
            self.seconds += time.perf_counter() - started
            smooth = loss if smooth is None else smooth + 0.05 * (loss - smooth)
            bar.update()
            bar.set_postfix(loss=f"{smooth:.5f}", refresh=False)
            if log is not None:
                lr = lr_at(self.config, self.step - 1)
                row = {"step": self.step, "loss": loss, "lr": lr, "grad_norm": norm}
                log.add({**row, "seconds": round(self.seconds, 3)})
            asked = self.on_step is not None and self.on_step(self.step, loss)
            self.interrupted = self._any(asked or interrupt.asked)
            if self.interrupted or self.step == stop or self.step % self.save_every == 0:
                self.save(log)
            if self.sample_every and self.step % self.sample_every == 0:
                self.draw_samples()
            if self.interrupted:
                break
        bar.close()

    def _train_step(self, step: int) -> tuple[float, float]:
        """One optimizer step; mean loss over all processes and the gradient's norm before clipping."""
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(config, step)
        parts = self._shares(step)
        total = torch.zeros((), device=accelerator.device)
        for i, (batch, draws) in enumerate(parts):
            last = i == len(parts) - 1
            with _maybe(accelerator.no_sync(self.objective), not last):
                loss = self.objective(batch, draws) / len(parts)
                accelerator.backward(loss)
            total += loss.detach().float()
        norm = accelerator.clip_grad_norm_(self.parameters.values(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(step)
        mean = accelerator.reduce(total, reduction="mean")
        return float(mean), float(norm)

    def _shares(self, step: int) -> list[tuple[Batch, dict[str, Tensor]]]:
        """This process's part of a step's batch, cut for accumulation."""
        whole = self.batches(step)
        if len(whole) != self.config.batch_size:
            raise HYWUError(
                f"training: the data gave {len(whole)} examples for step {step}, the batch size is "
                f"{self.config.batch_size}."
            )
        draws = self.base.draw(whole, _mix(self.config.seed, step))
        size = len(whole) // self.accelerator.num_processes
        start = self.accelerator.process_index * size
        device, part = self.accelerator.device, size // self.config.accumulation
        shares = []
        for at in range(start, start + size, part):
            items = list(range(at, at + part))
            share = {key: value[items].to(device) for key, value in draws.items()}
            shares.append((whole.select(items).to(device), share))
        return shares

    def _any(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all must leave the loop after the same step."""
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, reduction="sum")) > 0

    # -- keeping ---------------------------------------------------------------------------------

    def save(self, log: Log | None = None) -> None:
        """Write the state (main process only)."""
        if not self._main:
            return
        header = {
            "config": self.config.to_json(),
            "strategy": self.strategy.name,
            "base": self.base.name,
            "seconds": self.seconds,
            **self.extra,
        }
        path = self.folder / STATE
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        save_state(path, self.step, self.parameters, self.average, inner, header)
        if log is not None:
            plot_loss(log.rows, self.folder / "loss.png")

    def _resume(self) -> None:
        path = self.folder / STATE
        if not path.exists():
            return
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        from ..files import read_header

        header = read_header(path)
        self.config.check_same(header.get("config", {}), path)
        mine = {"strategy": self.strategy.name, "base": self.base.name}
        for key, value in mine.items():
            if header.get(key) != value:
                raise HYWUError(
                    f"{path}: is of the {key} '{header.get(key)}', this run's is '{value}'; use "
                    "another output folder."
                )
        header = load_state(path, self.parameters, self.average, inner)
        self.step, self.seconds = int(header["step"]), float(header["seconds"])

    def draw_samples(self) -> None:
        """A grid of source, target and the edit with averaged weights, as a PNG."""
        if self.samples is None or not self._main:
            return
        samples = self.samples.to(self.accelerator.device)
        edits = self.edit(samples)
        path = self.folder / "samples" / f"step_{self.step:06d}.png"
        save_grid([samples.source, samples.target, edits], path)

    @torch.no_grad()
    def edit(self, batch: Batch, seed: int = 0) -> Tensor:
        """Edits of a batch with the averaged weights."""
        with self.average.swapped():
            condition = None
            if self.strategy.needs_condition:
                condition = self.base.encode(*batch.asked)
            with self.strategy.adapted(condition) as module:
                return self.base.edit(module, batch, seed)

    def export(self, path: Path, provenance: dict[str, Any]) -> Path:
        """Write the averaged weights for use, with how they came about."""
        facts = {
            "strategy": self.strategy.name,
            "base": self.base.name,
            "steps": self.step,
            "training": self.config.to_json(),
            "seconds": round(self.seconds, 1),
            **provenance,
        }
        with self.average.swapped():
            return self.strategy.export(path, facts)


class _Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a flag; the second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Interrupt:
        # signals can only be handled in the main thread; elsewhere the host has its own way to stop
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("stopping after this step; once more to stop at once")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _maybe(context: Any, wanted: bool) -> Any:
    import contextlib

    return context if wanted else contextlib.nullcontext()


def _mix(seed: int, step: int) -> int:
    """A seed of its own for every (seed, step)."""
    return (seed * 1_000_003 + step * 7919 + 12345) & 0x7FFF_FFFF_FFFF_FFFF
