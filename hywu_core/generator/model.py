"""ParameterGenerator: the HY-WU hypernetwork. Condition in, generated LoRA out.

With one stack and one condition part it computes exactly what the official generator computes
(Tencent HY-WU, facts only); beyond that, several stacks share one body, conditions have several parts,
and everything works for any batch size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..condition import Condition, clear_masked
from ..errors import HYWUError
from ..lora import GeneratedLoRA
from .config import GeneratorConfig
from .layers import Context, RMSNorm, Transformer, even_step, fused_kernels, linear, weights
from .rope import StackTables
from .speed.memory import STARTING, BlockStreamer, MemoryPlan, Sizes, plan_memory, tensor_bytes
from .speed.prefix import Shared
from .tensors import MappedBlocks

#: Bytes of one chunk's widest intermediate: large enough for full matrix products on the device,
#: small enough to stay in the caches of a CPU and far below the weights of a GPU.
CHUNK_BYTES = {"cpu": 12 << 20, "cuda": 512 << 20}

#: The constant prefix is kept when it is no larger than this.
PREFIX_CACHE_BYTES = 256 << 20


class ParameterGenerator(nn.Module):
    """Hypernetwork of a `GeneratorConfig`.

    operations: a namespace with ``Linear`` (default torch.nn), so that a host can bring layers that
    it moves and casts itself. checkpointing: recompute each block in the backward pass.
    chunk_bytes: size of the widest intermediate in inference, None for the device's default.
    memory_budget: bytes that weights and intermediates may take on the generator's device in
    inference, None for no limit; chunk sizes and which blocks are streamed from host memory follow
    from it at each call. kernels: the fast path's Triton kernels, "auto" where the device has them.
    Threads may share a generator; where blocks are streamed they take turns.
    """

    def __init__(self, config: GeneratorConfig, operations: Any = nn) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.chunk_bytes: int | None = None
        self.memory_budget: int | None = None
        self.kernels: ModuleType | Literal["auto"] | None = "auto"
        self.prefix_cache_bytes = PREFIX_CACHE_BYTES
        dim = config.d_model
        parts = {name: operations.Linear(width, dim) for name, width in config.condition.items()}
        single = len(parts) == 1
        self.hidden_in = next(iter(parts.values())) if single else nn.ModuleDict(parts)
        self.model = Transformer(config, operations)
        self._tables: dict[tuple[str, torch.device], tuple[list[StackTables], Shared]] = {}
        self._prefix: tuple[tuple, list[Tensor], Shared] | None = None
        self._streamer: BlockStreamer | None = None
        self.mapped: MappedBlocks | None = None  # where blocks are read from files
        self._epoch = 0

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values for training: lora_B starts at zero, so that the base starts unchanged."""
        for module in self.modules():
            if hasattr(module, "in_features"):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for block in self.model.blocks:
            for out in (
                block.self_attn_n.W_o,
                block.self_attn_hw.W_o,
                block.self_attn_cross.W_o,
                block.feed_forward.fc2,
            ):
                out.weight.mul_((4 * len(self.model.blocks)) ** -0.5)
            # attention that starts nearly uniform tells every position the same of the condition; it
            # takes hundreds of steps before values at different positions differ by it
            block.self_attn_cross.W_q.weight.mul_(4.0)
        # a LoRA's A is usually drawn with std 1/sqrt(in): the widest input sets one scale for all
        widest = max(m.in_features for s in self.config.layout.stacks for m in s.modules)
        self.model.proj_out_A.weight.mul_(widest**-0.5 / self.config.lora_a_scale)
        nn.init.zeros_(self.model.proj_out_B.weight)

    # -- forward ---------------------------------------------------------------------------------

    def forward(
        self,
        condition: Condition | Tensor,
        on_block: Callable[[int, int], None] | None = None,
    ) -> GeneratedLoRA:
        """Write a LoRA for every item of the condition.

        condition: a Condition, or a tensor ``[B, L, C]`` where there is one part. It is moved to the
        generator's device and dtype. on_block: called after each block with (done, total), for
        progress; what it raises ends the generation.
        Returns a GeneratedLoRA on the generator's device. Never waits for the device.
        Raises HYWUError when the condition's parts or widths are not the checkpoint's.
        """
        condition = Condition.of(condition, next(iter(self.config.condition)))
        return self.lora(condition, self.generate_grids(condition, on_block))

    def lora(self, condition: Condition, grids: list[Tensor]) -> GeneratedLoRA:
        """The LoRA of grids generated from `condition`."""
        provenance = {
            **condition.origin,
            "condition_fingerprint": condition.fingerprint,
            "base": self.config.base,
            **{k: v for k, v in self.config.provenance.items() if k == "checkpoint"},
        }
        return GeneratedLoRA.from_grids(self.config.layout, grids, provenance)

    def generate_grids(
        self, condition: Condition, on_block: Callable[[int, int], None] | None = None
    ) -> list[Tensor]:
        """Token grids ``[B, layers, tokens, rank, token_dim]``, one a stack: the LoRA's only buffers."""
        tokens, mask = self._project(condition)
        in_place = not (torch.is_grad_enabled() and self._needs_grad(tokens))
        plan = self.memory_plan(*tokens.shape[:2], in_place)
        tables = self._tables_on(tokens.device)
        context = self._context(tokens, mask, tables, in_place, plan)
        total = len(self.model.blocks)
        with contextlib.closing(self._blocks(plan)) as blocks:
            for i, block in enumerate(blocks):
                if i == 0:
                    streams = self._initial_streams(block, tables, context, plan)
                if self.checkpointing and not in_place:
                    streams = checkpoint(
                        block, streams, tables, context, i == 0, use_reentrant=False
                    )
                else:
                    streams = block(streams, tables, context, i == 0)
                if on_block is not None:
                    on_block(i + 1, total)
        return [self._to_grid(s, streams, context) for s in range(len(streams))]

    # -- memory ----------------------------------------------------------------------------------

    def memory_plan(
        self, batch_size: int, condition_tokens: int, inference: bool = True
    ) -> MemoryPlan | None:
        """How a call of this size keeps to `memory_budget`; None without one.

        Raises HYWUError when it can't, or when blocks are streamed and inference is False.
        """
        if not inference and self.streaming:
            raise HYWUError(
                "this generator's blocks are streamed from host memory, which works in inference "
                "only; load it without memory_budget to train it."
            )
        if self.memory_budget is None or not inference:
            return None
        blocks, like = self.model.blocks, self.model.norm_input.weight
        block_bytes = tensor_bytes(blocks[0])
        sizes = Sizes(
            self.config,
            tensor_bytes(self) - len(blocks) * block_bytes,
            block_bytes,
            like.element_size(),
            batch_size,
            condition_tokens,
            self.chunk_bytes or _default_chunk_bytes(like.device),
            self.prefix_cache_bytes,
        )
        return plan_memory(sizes, self.memory_budget)

    @property
    def streaming(self) -> bool:
        """Whether the blocks' weights rest in host memory."""
        return self._streamer is not None

    def forget(self) -> None:
        """Drop what was derived from the weights: the constant prefix and the streamed copies."""
        self._prefix = self._streamer = None
        self._epoch += 1

    def weights_key(self) -> tuple:
        """Changes when anything that was derived from the weights is no longer true."""
        return (self._epoch, self._prefix_key(self.model.norm_input.weight))

    def _apply(self, fn: Callable, recurse: bool = True) -> ParameterGenerator:
        if self.mapped is not None:
            raise HYWUError("blocks read from a file can't be moved or cast; load the file anew.")
        self.forget()  # .to() and the like make other tensors of the weights
        return super()._apply(fn, recurse)

    def offload(self) -> None:
        """Move the blocks' weights to host memory; from there they are streamed, or kept besides."""
        with STARTING:
            device = self.model.norm_input.weight.device
            if self._streamer is None:
                self._streamer = BlockStreamer(self.model.blocks, device, self.mapped)

    def _blocks(self, plan: MemoryPlan | None) -> Iterator[nn.Module]:
        if self._streamer is None:
            if self.mapped is None and (plan is None or not plan.streamed):
                yield from self.model.blocks
                return
            self.offload()
        resident = len(self.model.blocks) if plan is None else plan.resident_blocks
        yield from self._streamer.run(resident)

    def _project(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Condition tokens ``[B, L, d]`` after input projection and norm, and their mask ``[B, L]``."""
        self.config.check_condition(condition.widths)
        like = self.model.norm_input.weight
        projected, masks = [], []
        for name in self.config.condition:
            tokens, mask = condition.parts[name], condition.masks.get(name)
            if mask is not None:
                mask = mask.to(like.device)
            tokens = clear_masked(tokens.to(device=like.device, dtype=like.dtype), mask)
            layer = self.hidden_in if len(self.config.condition) == 1 else self.hidden_in[name]
            projected.append(linear(tokens, *weights(layer, tokens)))
            masks.append(mask)
        tokens = self.model.norm_input(torch.cat(projected, dim=1))
        if all(mask is None for mask in masks):
            return tokens, None
        whole = [
            torch.ones(t.shape[:2], dtype=torch.bool, device=t.device) if mask is None else mask
            for t, mask in zip(projected, masks, strict=True)
        ]
        return tokens, torch.cat(whole, dim=1)

    def _needs_grad(self, tokens: Tensor) -> bool:
        return tokens.requires_grad or any(p.requires_grad for p in self.model.parameters())

    def _tables_on(self, device: torch.device) -> list[StackTables]:
        key = (self.config.rope_precision, device)
        found = self._tables.get(key)
        if found is None:
            made = [StackTables(self.config, s, device) for s in range(len(self.config.grids))]
            found = made, Shared(t for table in made for t in table.tensors())
            self._tables[key] = found
        tables, shared = found
        shared.take()
        return tables

    def _context(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        tables: list[StackTables],
        in_place: bool,
        plan: MemoryPlan | None,
    ) -> Context:
        chunk_bytes = self.chunk_bytes or _default_chunk_bytes(tokens.device)
        if plan is not None:
            chunk_bytes = plan.chunk_bytes
        rows = chunk_bytes // (4 * self.config.d_model * tokens.element_size())
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_(min=0)
        attend = None if mask is None else mask[:, None, None]
        keys = [table.key(tokens.shape[1], positions) for table in tables]
        kernels = self._kernels_for(tokens) if in_place else None
        return Context(tokens, attend, keys, in_place, max(1, rows), kernels)

    def _kernels_for(self, tokens: Tensor) -> ModuleType | None:
        if torch.compiler.is_compiling() or tokens.dtype == torch.float64:
            return None
        return fused_kernels(tokens.device) if self.kernels == "auto" else self.kernels

    # -- the constant prefix ---------------------------------------------------------------------

    def _initial_streams(
        self,
        block: nn.Module,
        tables: list[StackTables],
        context: Context,
        plan: MemoryPlan | None,
    ) -> list[Tensor]:
        """Streams ``[B, N, S, d]`` up to the first attention to the condition; the caller's own."""
        batch = context.condition.shape[0]
        streams, kept = self._constant_prefix(block, tables, context, plan)
        copies = context.in_place and (kept or batch > 1)
        streams = [s.expand(batch, *s.shape[1:]) for s in streams]
        return [s.clone() for s in streams] if copies else streams

    def _constant_prefix(
        self,
        block: nn.Module,
        tables: list[StackTables],
        context: Context,
        plan: MemoryPlan | None,
    ) -> tuple[list[Tensor], bool]:
        """The prefix of one batch item, and whether it is kept (so that nobody may write to it)."""
        if not context.in_place or torch.compiler.is_compiling():
            return self._compute_prefix(block, tables, context), False
        key = self._prefix_key(context.condition)
        found = self._prefix  # read once: another thread may replace it
        if found is not None and found[0] == key and (plan is None or plan.keep_prefix):
            found[2].take()
            return found[1], True
        self._prefix = found = None
        streams = self._compute_prefix(block, tables, context)
        size = sum(s.nbytes for s in streams)
        if plan.keep_prefix if plan is not None else size <= self.prefix_cache_bytes:
            self._prefix = (key, streams, Shared(streams))
            return streams, True
        return streams, False

    def _compute_prefix(
        self, block: nn.Module, tables: list[StackTables], context: Context
    ) -> list[Tensor]:
        streams = [self._initial_tokens(s, context) for s in range(len(tables))]
        return block.prefix(streams, tables, context)

    def _initial_tokens(self, stack: int, context: Context) -> Tensor:
        """Packed and normed token embeddings ``[1, N, S, d]`` of a stack."""
        tokens, layers = self.model.embeddings(stack)
        grid, rows = self.config.grids[stack], self.config.rows_per_token
        x = tokens[None] + layers[:, None]
        x = x.view(1, grid.num_layers, grid.num_tokens * rows, self.config.d_model)
        if not context.in_place:
            return self.model.norm_tokens(x)
        for part in x.unbind(1):  # one by one: x and its norm never exist both
            part.copy_(self.model.norm_tokens(part))
        return x

    def _prefix_key(self, tokens: Tensor) -> tuple:
        """What the prefix depends on: device, dtype, precision, and whether a weight was written."""
        block = self.model.blocks[0]
        used = [
            *self.model.hw_pos.parameters(),
            *self.model.layer_pos.parameters(),
            *self.model.norm_tokens.parameters(),
            *block.self_attn_n.parameters(),
            *block.self_attn_hw.parameters(),
            *block.norm1.parameters(),
            *block.norm2.parameters(),
        ]
        # inference tensors keep no version; they can't be trained either
        versions = tuple(0 if p.is_inference() else p._version for p in used)
        pointers = tuple(id(p) for p in used)
        return (tokens.device, tokens.dtype, self.config.rope_precision, versions, pointers)

    # -- output ----------------------------------------------------------------------------------

    def _to_grid(self, stack: int, streams: list[Tensor], context: Context) -> Tensor:
        """Final norm, unpacking and output projections; over the stream itself where sizes agree."""
        config, grid, model = self.config, self.config.grids[stack], self.model
        x, streams[stack] = streams[stack], None  # type: ignore[call-overload]
        batch, packed = x.shape[0], config.d_model // config.dim_accumulation
        rank, cut = config.layout.rank, grid.num_a_tokens * config.rows_per_token
        reuse = context.in_place and packed == config.token_dim
        shape = (batch, grid.num_layers, grid.num_tokens, rank, config.token_dim)
        sides = (
            (slice(0, cut), model.proj_out_A, config.lora_a_scale),
            (slice(cut, None), model.proj_out_B, config.lora_b_scale),
        )
        if not context.in_place:
            return torch.cat([self._project_out(x[:, :, at], p, f) for at, p, f in sides], dim=2)
        width = config.values_per_position
        out = x if reuse else x.new_empty(batch, grid.num_layers, x.shape[2], width)
        step = even_step(grid.num_layers, 4 * context.chunk_rows // (batch * x.shape[2]))
        for at, projection, factor in sides:
            for n in range(0, grid.num_layers, step):
                view = x[:, n : n + step, at]
                values = self._project_out(view, projection, factor)
                out[:, n : n + step, at] = values.flatten(2).view(*view.shape[:3], width)
        return out.view(shape)

    def _project_out(self, x: Tensor, projection: nn.Module, factor: float) -> Tensor:
        """``[B, n, positions, d]`` -> ``[B, n, tokens, rank, token_dim]`` of one side."""
        config = self.config
        rows = self.model.norm_final(x).reshape(
            *x.shape[:2], -1, config.layout.rank, config.d_model // config.dim_accumulation
        )
        weight, bias = weights(projection, rows)
        if factor != 1.0:
            weight, bias = weight * factor, None if bias is None else bias * factor
        return F.linear(rows, weight, bias)


def _default_chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
