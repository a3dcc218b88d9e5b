"""Small generators without launch overhead: CUDA graphs, and compiled blocks.

A small generator spends its time on launching some hundred kernels, not in them. A CUDA graph launches
all of them at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...condition import Condition
from ...lora import GeneratedLoRA
from ..model import ParameterGenerator

#: Graphs kept, one a shape of condition; the one not used for longest goes first.
GRAPHS = 8

#: Generators with larger residual streams are bound by arithmetic: a graph would only hold memory.
LARGEST_STREAM_BYTES = 64 << 20


@dataclass
class _Graph:
    inputs: Condition
    outputs: list[Tensor]
    replay: Callable[[], None]
    weights: tuple
    places: list[tuple[dict[str, Tensor | None], str, Tensor, int]]
    kept: tuple

    def reads(self, weights: tuple) -> bool:
        """Whether all weights still lie where the graph reads them."""
        return self.weights == weights and all(
            owner.get(name) is tensor and tensor.data_ptr() == pointer
            for owner, name, tensor, pointer in self.places
        )


class GraphedGenerator:
    """Calls a generator through CUDA graphs, one for each shape of condition it meets.

    The first call with a shape runs the generator a few times and waits for the device; later ones
    copy the condition in, replay, and copy the LoRA out, without waiting. Weights may be written in
    place between calls; moved or replaced ones lead to new graphs. Where graphs don't suit (no CUDA,
    gradients, a memory_budget, a large generator) it calls the generator as it is.
    Threads may share it.
    """

    def __init__(self, generator: ParameterGenerator) -> None:
        self.generator = generator
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def __call__(self, condition: Condition | Tensor) -> GeneratedLoRA:
        """As `ParameterGenerator.forward`; the LoRA's tensors are its own."""
        generator = self.generator
        condition = Condition.of(condition, next(iter(generator.config.condition)))
        if not self.suits(condition):
            return generator(condition)
        with self._lock, torch.cuda.device_of(generator.model.norm_input.weight):
            self._wait()
            graph = self._graph(condition)
            for name, tokens in condition.parts.items():
                graph.inputs.parts[name].copy_(tokens, non_blocking=True)
            for name, mask in condition.masks.items():
                graph.inputs.masks[name].copy_(mask, non_blocking=True)
            graph.replay()
            grids = [output.clone() for output in graph.outputs]
            self._mark()
        return generator.lora(condition, grids)

    def suits(self, condition: Condition) -> bool:
        """Whether a call is made through a graph."""
        generator, like = self.generator, self.generator.model.norm_input.weight
        config = generator.config
        size = config.num_positions * config.d_model * like.element_size() * condition.batch_size
        return (
            like.is_cuda
            and size <= LARGEST_STREAM_BYTES
            and generator.memory_budget is None
            and not generator.residency.offloaded
            and not torch.is_grad_enabled()
        )

    def _graph(self, condition: Condition) -> _Graph:
        key = (
            tuple((name, tuple(tokens.shape)) for name, tokens in condition.parts.items()),
            tuple(sorted(condition.masks)),
        )
        weights = self.generator.weights_key()
        found = self._graphs.pop(key, None)
        if found is None or not found.reads(weights):
            del found  # its memory serves the new one
            found = self._capture(condition, weights)
        self._graphs[key] = found
        while len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)
        return found

    def _capture(self, condition: Condition, weights: tuple) -> _Graph:
        generator, like = self.generator, self.generator.model.norm_input.weight
        with torch.inference_mode(False), torch.no_grad():
            inputs = condition.to(like.device, like.dtype)
            inputs = replace(
                inputs,
                parts={name: tokens.clone() for name, tokens in inputs.parts.items()},
                masks={name: mask.clone() for name, mask in inputs.masks.items()},
            )
            outputs, replay = self._record(lambda: generator.generate_grids(inputs))
        # what the graph reads must outlive it: tables and the constant prefix are the generator's
        kept = (generator.tables.found, generator.prefixes.found)
        return _Graph(inputs, outputs, replay, weights, _places(generator), kept)

    def _record(self, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Run once for good, and return the outputs and what repeats the run into them."""
        if self._streams is None:  # libraries keep a workspace per stream, so always the same ones
            self._streams = torch.cuda.Stream(), torch.cuda.Stream()
        side, recording = self._streams
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are built, libraries make their handles, tables and prefix
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # what other threads do with the device (allocate, sample) is none of this recording
        with torch.cuda.graph(graph, stream=recording, capture_error_mode="thread_local"):
            outputs = run()
        return outputs, graph.replay

    def _wait(self) -> None:
        """Calls on other streams have copied their results out."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def _mark(self) -> None:
        if self.generator.model.norm_input.weight.is_cuda:
            self._done = torch.cuda.current_stream().record_event()


def _places(generator: ParameterGenerator) -> list[tuple[dict, str, Tensor, int]]:
    """(where a module keeps it, name, tensor, address) of every weight."""
    return [
        (owner, name, tensor, tensor.data_ptr())
        for module in generator.modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]


def compile_blocks(generator: ParameterGenerator, **options: Any) -> ParameterGenerator:
    """Compile the generator's blocks with torch.compile, in place; returns the generator.

    One compilation serves all blocks, at the first call with a shape. options: torch.compile's (mode,
    backend, dynamic). Inductor needs a C++ compiler, and Triton on CUDA. Streamed blocks run
    uncompiled.
    """
    generator.kernels = None  # inductor fuses by itself
    for block in generator.model.blocks:
        block.compile(**options)
    return generator
