"""ParameterGenerator: the HY-WU hypernetwork. Condition in, generated LoRA out.

With one stack and one condition part it computes exactly what the official generator computes
(Tencent HY-WU, facts only); beyond that, several stacks share one body, conditions have several parts,
and everything works for any batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..condition import Condition, clear_masked
from ..errors import HYWUError
from ..lora import GeneratedLoRA
from .config import GeneratorConfig
from .layers import Block, Context, RMSNorm, even_step, weights
from .rope import StackTables

#: Bytes of one chunk's widest intermediate: large enough for full matrix products on the device,
#: small enough to stay in the caches of a CPU and far below the weights of a GPU.
CHUNK_BYTES = {"cpu": 12 << 20, "cuda": 512 << 20}

#: The constant prefix is kept when it is no larger than this.
PREFIX_CACHE_BYTES = 256 << 20


class Transformer(nn.Module):
    """The body: token embeddings of every stack, shared blocks, shared output projections."""

    def __init__(self, config: GeneratorConfig, operations: Any) -> None:
        super().__init__()
        dim, packed = config.d_model, config.d_model // config.dim_accumulation
        rank, grids = config.layout.rank, config.grids
        self.norm_input = RMSNorm(dim)
        self.norm_tokens = RMSNorm(dim)
        self.norm_final = RMSNorm(dim)
        tokens = [nn.Embedding(grid.num_tokens * rank, packed) for grid in grids]
        layers = [nn.Embedding(grid.num_layers, packed) for grid in grids]
        single = len(grids) == 1
        self.hw_pos = tokens[0] if single else nn.ModuleList(tokens)
        self.layer_pos = layers[0] if single else nn.ModuleList(layers)
        self.blocks = nn.ModuleList(Block(config, operations) for _ in range(config.num_blocks))
        self.proj_out_A = operations.Linear(packed, config.token_dim)
        self.proj_out_B = operations.Linear(packed, config.token_dim)

    def embeddings(self, stack: int) -> tuple[Tensor, Tensor]:
        """Token and layer embeddings ``[tokens * rank, d/acc]``, ``[layers, d/acc]`` of a stack."""
        if isinstance(self.hw_pos, nn.Embedding):
            return self.hw_pos.weight, self.layer_pos.weight
        return self.hw_pos[stack].weight, self.layer_pos[stack].weight


class ParameterGenerator(nn.Module):
    """Hypernetwork of a `GeneratorConfig`.

    operations: a namespace with ``Linear`` (default torch.nn), so that a host can bring layers that
    it moves and casts itself. checkpointing: recompute each block in the backward pass.
    chunk_bytes: size of the widest intermediate in inference, None for the device's default.
    """

    def __init__(self, config: GeneratorConfig, operations: Any = nn) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.chunk_bytes: int | None = None
        self.prefix_cache_bytes = PREFIX_CACHE_BYTES
        dim = config.d_model
        parts = {name: operations.Linear(width, dim) for name, width in config.condition.items()}
        single = len(parts) == 1
        self.hidden_in = next(iter(parts.values())) if single else nn.ModuleDict(parts)
        self.model = Transformer(config, operations)
        self._tables: dict[tuple[str, torch.device], list[StackTables]] = {}
        self._prefix: tuple[tuple, list[Tensor]] | None = None

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
        grids = self.generate_grids(condition, on_block)
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
        tables = self._tables_on(tokens.device)
        context = self._context(tokens, mask, tables, in_place)
        streams = self._constant_prefix(tables, context)
        batch = tokens.shape[0]
        streams = [s.expand(batch, *s.shape[1:]) for s in streams]
        if in_place:
            streams = [s.clone() if s.shape[0] > 1 or self._prefix else s for s in streams]
        blocks = self.model.blocks
        for i, block in enumerate(blocks):
            if self.checkpointing and not in_place:
                streams = checkpoint(block, streams, tables, context, i == 0, use_reentrant=False)
            else:
                streams = block(streams, tables, context, i == 0)
            if on_block is not None:
                on_block(i + 1, len(blocks))
        return [self._to_grid(s, streams, context) for s in range(len(streams))]

    def _project(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Condition tokens ``[B, L, d]`` after input projection and norm, and their mask ``[B, L]``."""
        widths = {name: tokens.shape[-1] for name, tokens in condition.parts.items()}
        if widths != dict(self.config.condition):
            raise HYWUError(
                f"The condition has the parts {_widths(widths)}; this generator takes "
                f"{_widths(self.config.condition)}. Encode it with the encoder that the checkpoint "
                "names."
            )
        like = self.model.norm_input.weight
        projected, masks = [], []
        for name in self.config.condition:
            tokens, mask = condition.parts[name], condition.masks.get(name)
            if mask is not None:
                mask = mask.to(like.device)
            tokens = clear_masked(tokens.to(device=like.device, dtype=like.dtype), mask)
            layer = self.hidden_in if len(self.config.condition) == 1 else self.hidden_in[name]
            projected.append(F.linear(tokens, *weights(layer, tokens)))
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
        if key not in self._tables:
            stacks = range(len(self.config.layout.stacks))
            self._tables[key] = [StackTables(self.config, s, device) for s in stacks]
        return self._tables[key]

    def _context(
        self, tokens: Tensor, mask: Tensor | None, tables: list[StackTables], in_place: bool
    ) -> Context:
        default = CHUNK_BYTES.get(tokens.device.type, CHUNK_BYTES["cuda"])
        chunk_bytes = self.chunk_bytes or default
        rows = chunk_bytes // (4 * self.config.d_model * tokens.element_size())
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_(min=0)
        attend = None if mask is None else mask[:, None, None]
        keys = [table.key(tokens.shape[1], positions) for table in tables]
        return Context(tokens, attend, keys, in_place, max(1, rows))

    # -- the constant prefix ---------------------------------------------------------------------

    def _constant_prefix(self, tables: list[StackTables], context: Context) -> list[Tensor]:
        """Streams ``[1, N, S, d]`` up to the first attention to the condition, which is constant."""
        if not context.in_place or torch.compiler.is_compiling():
            return self._compute_prefix(tables, context)
        key = self._prefix_key(context.condition)
        if self._prefix is not None and self._prefix[0] == key:
            return self._prefix[1]
        self._prefix = None
        streams = self._compute_prefix(tables, context)
        if sum(s.numel() * s.element_size() for s in streams) <= self.prefix_cache_bytes:
            self._prefix = (key, streams)
        return streams

    def _compute_prefix(self, tables: list[StackTables], context: Context) -> list[Tensor]:
        streams = [self._initial_tokens(s) for s in range(len(tables))]
        return self.model.blocks[0].prefix(streams, tables, context)

    def _initial_tokens(self, stack: int) -> Tensor:
        """Packed and normed token embeddings ``[1, N, S, d]`` of a stack."""
        tokens, layers = self.model.embeddings(stack)
        grid, rows = self.config.grids[stack], self.config.rows_per_token
        x = tokens[None] + layers[:, None]
        x = x.view(1, grid.num_layers, grid.num_tokens * rows, self.config.d_model)
        return self.model.norm_tokens(x)

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
        out = (
            x
            if reuse
            else x.new_empty(batch, grid.num_layers, x.shape[2], values_per_position(config))
        )
        step = even_step(grid.num_layers, 4 * context.chunk_rows // (batch * x.shape[2]))
        for at, projection, factor in sides:
            for n in range(0, grid.num_layers, step):
                view = x[:, n : n + step, at]
                values = self._project_out(view, projection, factor)
                out[:, n : n + step, at] = values.flatten(2).view(
                    *view.shape[:3], values_per_position(config)
                )
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


def values_per_position(config: GeneratorConfig) -> int:
    """LoRA values that one position of the sequence becomes."""
    return config.dim_accumulation * config.token_dim


def _widths(parts: Any) -> str:
    return ", ".join(f"{name} ({width} wide)" for name, width in parts.items())
