"""Memory of a generation: what it needs, and how a budget is met.

A budget is met with the largest chunks and the most resident blocks that fit, in this order: all
blocks resident; blocks offloaded to host memory; smaller chunks. Offloading comes before smaller
chunks because it leaves every bit of the result as it was, and costs little where a block computes
longer than it is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...errors import HYWUError
from ..config import GeneratorConfig
from .prefix import PREFIX_CACHE_BYTES

if TYPE_CHECKING:
    from ..model import ParameterGenerator

#: Bytes of one chunk's widest intermediate: large enough for full matrix products on the device,
#: small enough to stay in the caches of a CPU and far below the weights of a GPU. On CUDA four waves of
#: tiles on 132 multiprocessors at the official width: 16,896 rows.
CHUNK_BYTES = {"cpu": 12 << 20, "cuda": 16_896 * 4 * 4096 * 2}

#: Slots that offloaded blocks take turns in: one computes while the next is copied.
SLOTS = 2

#: Chunks are not made smaller than this many rows of the hidden states.
LEAST_ROWS = 64

#: Bytes that matrix products may take for themselves: oneDNN packs bf16 operands on some CPUs with AMX.
PRODUCT_SCRATCH = 1 << 15


@dataclass(frozen=True)
class MemoryPlan:
    """How a generation keeps to a budget; sizes in bytes, on the generator's device.

    chunk_bytes: size of a chunk's widest intermediate.
    resident_blocks: how many of num_blocks stay on the device, the others are offloaded.
    fixed_bytes: weights outside the blocks.
    block_bytes: one block's weights.
    working_bytes: hidden states, condition and intermediates at their most.
    keep_prefix: whether the constant prefix is kept between calls (counted in working_bytes).
    """

    chunk_bytes: int
    resident_blocks: int
    num_blocks: int
    fixed_bytes: int
    block_bytes: int
    working_bytes: int
    keep_prefix: bool

    @property
    def offloads(self) -> bool:
        return self.resident_blocks < self.num_blocks

    @property
    def total_bytes(self) -> int:
        held = self.resident_blocks + min(SLOTS, self.num_blocks - self.resident_blocks)
        return self.fixed_bytes + held * self.block_bytes + self.working_bytes


@dataclass(frozen=True)
class Sizes:
    """What a plan depends on beside the budget: the config, the weights' bytes, one call's shape.

    element_size: bytes of a value of the hidden states.
    default_chunk_bytes: the device's.
    prefix_cache_bytes: the most that a kept prefix may take.
    """

    config: GeneratorConfig
    fixed_bytes: int
    block_bytes: int
    element_size: int
    batch_size: int
    condition_tokens: int
    default_chunk_bytes: int
    prefix_cache_bytes: int

    @property
    def hidden_bytes(self) -> int:
        """The hidden states of one batch item."""
        return self.config.num_positions * self.config.d_model * self.element_size

    def working_bytes(self, chunk_bytes: int) -> int:
        """The most that a call holds beside the weights, an upper bound.

        Bounds the eager path; fused kernels hold less. Attention that falls back to whole matrices
        of scores (no flash or memory-efficient kernel for the dtype) is not covered.
        """
        config, size, batch = self.config, self.element_size, self.batch_size
        d, condition = config.d_model, batch * self.condition_tokens
        values = config.values_per_position
        widest = max(config.condition.values())
        # tokens in a wider dtype while they are turned, and the product
        turned = 0 if size == 4 else 8
        lengths = [g.num_tokens * config.rows_per_token for g in config.grids]
        layers = [g.num_layers for g in config.grids]
        whole = batch * max(n * m for n, m in zip(lengths, layers, strict=True))
        rows = min(whole, max(1, chunk_bytes // (4 * d * size)))
        # a chunk holds one sequence of every batch item at least
        attended = max(rows, *(batch * n for n in (*lengths, *layers)))
        out_rows = min(whole, max(4 * rows, *(batch * n for n in lengths)))
        chunk = max(
            attended * d * max(6 * size, 5 * size + 2 * turned),
            rows * d * 6 * size,
            out_rows * (2 * d * size + 2 * values * size),
        )
        # kv, turned keys (a copy per stack), beside the projected condition itself
        keys = condition * d * (4 * size + turned + 4)
        projecting = condition * (widest + 4 * d) * size
        tables = sum(
            2 * 4 * config.head_dim * (n + m) for n, m in zip(lengths, layers, strict=True)
        )
        hidden = batch * self.hidden_bytes + (self.hidden_bytes if batch > 1 else 0)
        output = 0 if values == d else batch * config.num_positions * values * size
        return hidden + output + max(keys + chunk, projecting) + tables + PRODUCT_SCRATCH


def plan_memory(sizes: Sizes, budget: int) -> MemoryPlan:
    """The plan that keeps to `budget` bytes. Raises HYWUError naming the least that works."""
    config = sizes.config
    blocks, block = config.num_blocks, sizes.block_bytes
    least_chunk = LEAST_ROWS * 4 * config.d_model * sizes.element_size
    chunk = sizes.default_chunk_bytes
    while True:
        working = sizes.working_bytes(chunk)
        room = budget - sizes.fixed_bytes - working
        if room >= min(SLOTS, blocks) * block:
            break
        if chunk <= least_chunk:
            least = budget - room + min(SLOTS, blocks) * block
            raise HYWUError(
                f"memory_budget is {budget:,} bytes, but this generator needs at least {least:,} "
                f"for a batch of {sizes.batch_size} and {sizes.condition_tokens} condition tokens "
                f"({SLOTS} of {blocks} blocks on the device, the smallest chunks); raise it, or "
                "generate fewer items at once."
            )
        chunk = max(least_chunk, chunk // 2)
    resident = blocks if room >= blocks * block else max(0, room // block - SLOTS)
    held = resident + min(SLOTS, blocks - resident)
    spare = room - held * block
    prefix = sizes.hidden_bytes
    keep = prefix <= min(spare, sizes.prefix_cache_bytes)
    return MemoryPlan(
        chunk,
        resident,
        blocks,
        sizes.fixed_bytes,
        block,
        working + (prefix if keep else 0),
        keep,
    )


def default_chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def memory_plan(
    generator: ParameterGenerator, batch_size: int, condition_tokens: int
) -> MemoryPlan | None:
    """How a call of this size keeps to the generator's budget; None without one. Raises HYWUError."""
    if generator.memory_budget is None:
        return None
    blocks, like = generator.model.blocks, generator.model.norm_input.weight
    block_bytes = tensor_bytes(blocks[0])
    limit = generator.prefix_cache_bytes
    sizes = Sizes(
        generator.config,
        tensor_bytes(generator) - len(blocks) * block_bytes,
        block_bytes,
        like.element_size(),
        batch_size,
        condition_tokens,
        generator.chunk_bytes or default_chunk_bytes(like.device),
        PREFIX_CACHE_BYTES if limit is None else limit,
    )
    return plan_memory(sizes, generator.memory_budget)
