"""A whole training step as one CUDA graph: forward, backward, clipping, optimizer, moving average.

A small base and a small generator take thousands of short kernels a step, and a GPU waits for the host between
them: on an H100 a step of HY-WU on the bundled editor took 136 ms of which the kernels took 15. Recorded once,
the kernels follow each other without the host. A step's inputs lie in buffers that stay; the learning rate and
the average's weight are tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Batch, Draws

if TYPE_CHECKING:
    from .trainer import Trainer

#: Steps that run as usual before the recording: libraries choose kernels, tables are made, moments allocated.
WARM_UP = 3


def suits(trainer: Trainer) -> bool:
    """Whether a training's steps can be recorded: on one CUDA device, in one part, without a loss scaler, and
    with a base that gives its texts as tensors of one shape.
    """
    return (
        trainer.device.type == "cuda"
        and trainer.accelerator.num_processes == 1
        and trainer.config.accumulation == 1
        and trainer.config.precision != "fp16"
        and hasattr(trainer.base, "text_tensors")
    )


class RecordedStep:
    """`Trainer._train_step` from buffers: copies a step's examples into them and replays.

    record: False runs the same step from the same buffers without a graph, on any device.
    """

    def __init__(self, trainer: Trainer, record: bool = True) -> None:
        self.trainer, self.record = trainer, record
        self._inputs: dict[str, Tensor] = {}
        self._batch: Batch | None = None
        self._done = 0
        self._graph: Any = None
        self._result: Tensor | None = None
        device = trainer.device
        # what the host writes into these a replay reads
        self._rate: float | Tensor = torch.zeros((), device=device) if record else 0.0
        self._weight = torch.zeros((), device=device)
        # two each: the host fills one while the other is read
        self._pinned: list[dict[str, Tensor]] = [{}, {}]
        if record:
            self._copied = [torch.cuda.Event() for _ in range(2)]
            for group in trainer.optimizer.param_groups:
                group["capturable"] = True

    def __call__(self, batch: Batch, draws: Draws, rate: float, weight: float) -> Tensor:
        """float32 ``[2]`` on the device: the mean loss, and the norm of the gradient before clipping.

        rate: the learning rate.
        weight: the share of the new weights in their moving average.
        """
        self._fill(batch, draws)
        self._weight.fill_(weight)
        if not self.record:
            self._rate = rate
            return self._step()
        self._rate.fill_(rate)
        if self._graph is None:
            self._done += 1
            if self._done <= WARM_UP:
                return self._beside(self._step)
            self._capture()
        self._graph.replay()
        return self._result.clone()

    def _fill(self, batch: Batch, draws: Draws) -> None:
        values = {"source": batch.source, "target": batch.target, **draws}
        values |= self.trainer.base.text_tensors(batch)
        if not self._inputs:
            device = self.trainer.device
            self._inputs = {key: value.to(device, copy=True) for key, value in values.items()}
            self._batch = batch
            return
        staged = self._stage(values) if self.record else values
        for key, value in staged.items():
            self._inputs[key].copy_(value, non_blocking=True)
        if self.record:
            self._copied[0].record()

    def _stage(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same, what lies in ordinary memory through page-locked: a copy from there waits for the replay."""
        self._copied.reverse()
        self._pinned.reverse()
        self._copied[0].synchronize()  # of two steps ago
        pinned = self._pinned[0]
        for key, value in values.items():
            if value.is_cuda:
                continue
            if key not in pinned:
                pinned[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            pinned[key].copy_(value)
        return {**values, **pinned}

    def _step(self) -> Tensor:
        trainer, inputs = self.trainer, self._inputs
        trainer.optimizer.zero_grad(set_to_none=True)
        for group in trainer.optimizer.param_groups:
            group["lr"] = self._rate
        batch = replace(self._batch, source=inputs["source"], target=inputs["target"])
        batch = trainer.base.with_text_tensors(batch, inputs)
        loss = trainer.objective(batch, inputs)
        trainer.accelerator.backward(loss)
        norm = trainer.accelerator.clip_grad_norm_(trainer.parameters.values(), trainer.config.clip)
        trainer.optimizer.step()
        trainer.average.take(self._weight)
        return torch.stack([loss.detach().float(), norm.detach().float()])

    def _beside(self, function: Callable[[], Tensor]) -> Tensor:
        """On a stream of its own, as a recording will be."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = function()
        current.wait_stream(stream)
        return result.clone()

    def _capture(self) -> None:
        torch.cuda.synchronize()
        self.trainer.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._step()
        self._graph = graph
