"""The variants of bench/cuda.py: each turns a generator into a function without arguments.

The plain eager reference is bench/eager.py on the same tensors: official names are views of the fused
weights, so it costs no memory of its own. It knows one stack; stacks see each other nowhere, so several
are one reference each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hywu_core import Condition, GeneratorConfig, LoRALayout, ParameterGenerator
from hywu_core.generator.speed.fp8 import scaled_mm_works, to_fp8
from hywu_core.generator.speed.graphs import compile_blocks, generate, suits
from hywu_core.generator.speed.memory import SLOTS
from hywu_core.generator.tensors import file_tensors

from .eager import EagerGenerator

#: What the offloaded variant may take in all where the weights alone take more.
OFFLOADED_BYTES = 12_000_000_000

Run = Callable[[], list[Tensor]]


class Unavailable(Exception):
    """A variant that can't run here; the text says why."""


class _Parts(nn.Module):
    """The input projections of every part of a condition, joined."""

    def __init__(self, generator: ParameterGenerator) -> None:
        super().__init__()
        layer = generator.hidden_in
        names = list(generator.config.condition)
        self.layers = {name: layer if len(names) == 1 else layer[name] for name in names}

    def forward(self, condition: Condition) -> Tensor:
        parts = [
            F.linear(condition.parts[name], layer.weight, layer.bias)
            for name, layer in self.layers.items()
        ]
        return torch.cat(parts, dim=1)


class _StackReference(EagerGenerator):
    """The plain reference of one stack of a generator, on the generator's own tensors."""

    def __init__(self, generator: ParameterGenerator, stack: int) -> None:
        config = generator.config
        layout = LoRALayout((config.layout.stacks[stack],), config.layout.rank, config.layout.alpha)
        width = next(iter(config.condition.values()))
        with torch.device("meta"):
            super().__init__(config.with_(layout=layout, condition={"all": width}))
        tokens, layers = generator.model.embeddings(stack)
        own = ("hidden_in", "model.hw_pos", "model.layer_pos")
        state = {n: t for n, t in file_tensors(generator) if not n.startswith(own)}
        state |= {"model.hw_pos.weight": tokens, "model.layer_pos.weight": layers}
        self.hidden_in = _Parts(generator)
        self.load_state_dict(state, assign=True)
        self.requires_grad_(False)

    def tables(self, condition_tokens: int, device: torch.device) -> dict[str, Tensor]:
        tables = super().tables(condition_tokens, device)
        wide = self.model.norm_input.weight.dtype
        return tables if wide != torch.float64 else {n: t.double() for n, t in tables.items()}


def reference(generator: ParameterGenerator, condition: Condition) -> Run:
    """The plain eager computation of the generator's grids."""
    config = generator.config
    stacks = [_StackReference(generator, s) for s in range(len(config.grids))]

    def run() -> list[Tensor]:
        return [_scaled(config, s, stack(condition)) for s, stack in enumerate(stacks)]

    return run


def _scaled(config: GeneratorConfig, stack: int, grid: Tensor) -> Tensor:
    cut = config.grids[stack].num_a_tokens
    if config.lora_a_scale != 1.0:
        grid[:, :, :cut] *= config.lora_a_scale
    if config.lora_b_scale != 1.0:
        grid[:, :, cut:] *= config.lora_b_scale
    return grid


def _eager(generator: ParameterGenerator, condition: Condition) -> Run:
    return reference(generator, condition)


def _plain(generator: ParameterGenerator, condition: Condition) -> Run:
    return lambda: generator.generate_grids(condition)


def _compiled(generator: ParameterGenerator, condition: Condition) -> Run:
    # on a CPU inductor would need a C++ compiler: the same graph is taken, and run as it is
    backend = "inductor" if condition.device.type == "cuda" else "aot_eager"
    compile_blocks(generator, backend=backend, dynamic=False)
    return lambda: generator.generate_grids(condition)


def _graph(generator: ParameterGenerator, condition: Condition) -> Run:
    if not suits(generator, condition):
        raise Unavailable("graphs are for small generators on CUDA")
    return lambda: list(generate(generator, condition).grids)


def _fp8(generator: ParameterGenerator, condition: Condition) -> Run:
    if condition.device.type == "cuda" and not scaled_mm_works(condition.device):
        raise Unavailable("torch has no row-wise fp8 products on this device")
    to_fp8(generator)
    return lambda: generator.generate_grids(condition)


def _offloaded(generator: ParameterGenerator, condition: Condition) -> Run:
    call = condition.batch_size, condition.num_tokens
    generator.memory_budget = 1 << 50
    plan = generator.memory_plan(*call)
    least = plan.fixed_bytes + min(SLOTS, plan.num_blocks) * plan.block_bytes + plan.working_bytes
    weights = plan.fixed_bytes + plan.num_blocks * plan.block_bytes
    generator.memory_budget = OFFLOADED_BYTES if weights > OFFLOADED_BYTES else least
    if not generator.memory_plan(*call).offloads:
        raise Unavailable(f"{plan.num_blocks} blocks: all of them are resident")
    return lambda: generator.generate_grids(condition)


#: In the order they are measured; how long compiling takes can't be foretold, so it comes last.
VARIANTS: dict[str, Callable[[ParameterGenerator, Condition], Run]] = {
    "eager": _eager,
    "ours": _plain,
    "graph": _graph,
    "fp8": _fp8,
    "offloaded": _offloaded,
    "compiled": _compiled,
}


@contextlib.contextmanager
def variant(name: str, generator: ParameterGenerator, condition: Condition) -> Iterator[Run]:
    """A variant's function; what it holds is freed at the end. Raises Unavailable."""
    run = VARIANTS[name](generator, condition)
    try:
        yield run
    finally:
        generator.forget()
        if name == "compiled":
            torch.compiler.reset()


def relative_difference(values: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over the norm of `expected`, layer by layer in float64 or float32."""
    apart = whole = 0.0
    for value, right in zip(values, expected, strict=True):
        for n in range(right.shape[1]):
            wide = torch.float32 if right.device.type == "mps" else torch.float64
            one, other = value[:, n].to(wide), right[:, n].to(wide)
            apart += (one - other).square().sum().item()
            whole += other.square().sum().item()
    return (apart / whole) ** 0.5
