"""Small generators without launch overhead: CUDA graphs, and compiled blocks.

A small generator spends its time on launching some hundred kernels, not in them. A CUDA graph launches
all of them at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...condition import Condition
from ...lora import GeneratedLoRA
from ..model import ParameterGenerator

#: Graphs kept, one per shape of condition; the one not used for longest goes first.
GRAPHS = 8

#: Generators with larger hidden states are bound by arithmetic: a graph would only hold memory.
LARGEST_HIDDEN_BYTES = 64 << 20

#: Lengths of a condition's part are padded to multiples of the first up to four of them, then of the second.
BUCKETS = 16, 64


def generate(
    generator: ParameterGenerator,
    condition: Condition | Tensor,
    on_block: Callable[[int, int], None] | None = None,
) -> GeneratedLoRA:
    """As ``generator(condition, on_block)``: a small one that lies on CUDA as a whole through graphs.

    The first call with a shape runs the generator a few times and waits for the device; later ones
    copy the condition in, replay, and copy the LoRA out, without waiting. Lengths are padded with masked
    tokens to some few, so that a sentence of another length needs no graph of its own. Weights may be
    written in place between calls; moved or replaced ones lead to new graphs. Where graphs don't suit (no
    CUDA, gradients, a memory_budget, a large generator) it calls the generator as it is.
    Threads may share a generator.
    """
    condition = Condition.of(condition, next(iter(generator.config.condition)))
    if not suits(generator, condition):
        generator.graphs = None
        return generator(condition, on_block)
    if generator.graphs is None:
        generator.graphs = Graphs()
    grids = generator.graphs.generate_grids(generator, condition)
    if on_block is not None:
        on_block(generator.config.num_blocks, generator.config.num_blocks)
    return generator.lora(condition, grids)


def suits(generator: ParameterGenerator, condition: Condition) -> bool:
    """Whether a call is made through a graph."""
    config, like = generator.config, generator.model.norm_input.weight
    size = config.num_positions * config.d_model * like.element_size() * condition.batch_size
    return (
        like.is_cuda
        and size <= LARGEST_HIDDEN_BYTES
        and generator.memory_budget is None
        and not generator.residency.offloaded
        and not torch.is_grad_enabled()
        and dict(config.condition) == condition.widths
        # a host may have left weights elsewhere or in 8 bits, and casts them at each call
        and all(p.device == like.device and p.dtype == like.dtype for p in generator.parameters())
    )


def bucket(length: int) -> int:
    """The length that a part of a condition is padded to."""
    fine, coarse = BUCKETS
    step = fine if length <= 4 * fine else coarse
    return -(-length // step) * step


@dataclass
class _Graph:
    """inputs: padded condition on the device, whose masks tell the padding.

    kept: what the graph reads.
    """

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

    def load(self, condition: Condition) -> None:
        """Copy a condition to where the graph reads it."""
        for name, padded in self.inputs.parts.items():
            tokens = condition.parts[name]
            length = tokens.shape[1]
            padded[:, :length].copy_(tokens, non_blocking=True)
            padded[:, length:].zero_()
            mask = self.inputs.masks.get(name)
            if mask is None:
                continue
            given = condition.masks.get(name)
            if given is None:
                mask[:, :length].fill_(True)
            else:
                mask[:, :length].copy_(given, non_blocking=True)
            mask[:, length:].fill_(False)


class Graphs:
    """The CUDA graphs of one generator, by the padded shape of the condition."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def __deepcopy__(self, memo: dict) -> Graphs:
        return Graphs()  # a copy has weights of its own, which these don't read

    def generate_grids(self, generator: ParameterGenerator, condition: Condition) -> list[Tensor]:
        """The generator's grids, the caller's own."""
        like = generator.model.norm_input.weight
        with self._lock, torch.cuda.device_of(like):
            if self._done is not None:  # calls on other streams have copied their results out
                torch.cuda.current_stream().wait_event(self._done)
            graph = self._graph(generator, condition)
            graph.load(condition)
            graph.replay()
            grids = [output.clone() for output in graph.outputs]
            if like.is_cuda:
                self._done = torch.cuda.current_stream().record_event()
        return grids

    def _graph(self, generator: ParameterGenerator, condition: Condition) -> _Graph:
        lengths = {name: bucket(tokens.shape[1]) for name, tokens in condition.parts.items()}
        masked = tuple(
            name
            for name, tokens in condition.parts.items()
            if name in condition.masks or lengths[name] != tokens.shape[1]
        )
        key = (condition.batch_size, tuple(lengths.items()), masked)
        weights = generator.weights_key()
        found = self._graphs.pop(key, None)
        if found is None or not found.reads(weights):
            del found  # its memory serves the new one
            found = self._capture(generator, condition, lengths, masked, weights)
        self._graphs[key] = found
        while len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)
        return found

    def _capture(
        self,
        generator: ParameterGenerator,
        condition: Condition,
        lengths: Mapping[str, int],
        masked: tuple[str, ...],
        weights: tuple,
    ) -> _Graph:
        like, batch = generator.model.norm_input.weight, condition.batch_size
        with torch.inference_mode(False), torch.no_grad():
            parts = {
                name: like.new_zeros(batch, lengths[name], width)
                for name, width in condition.widths.items()
            }
            masks = {
                name: torch.ones(batch, lengths[name], dtype=torch.bool, device=like.device)
                for name in masked
            }
            inputs = Condition(parts, masks)
            graph = _Graph(inputs, [], lambda: None, weights, _places(generator), ())
            graph.load(condition)
            graph.outputs, graph.replay = self._record(lambda: generator.generate_grids(inputs))
        # what the graph reads must outlive it: tables and the constant prefix are the generator's
        graph.kept = (generator.tables.found, generator.prefixes.found)
        return graph

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

    One compilation serves all blocks, at the first call with a shape.
    options: torch.compile's (mode, backend, dynamic).
    Inductor needs a C++ compiler, and Triton on CUDA. Offloaded blocks run uncompiled.
    """
    generator.kernels = None  # inductor fuses by itself
    for block in generator.model.blocks:
        block.compile(**options)
    return generator
