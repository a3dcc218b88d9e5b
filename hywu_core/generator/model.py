"""ParameterGenerator: the HY-WU hypernetwork. Condition in, generated LoRA out.

With one stack and one condition part it computes exactly what the official generator computes
(Tencent HY-WU, read off its published code); beyond that, several stacks share one body, conditions have several parts,
and everything works for any batch size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..condition import Condition, clear_masked
from ..errors import HYWUError
from ..lora import GeneratedLoRA
from .config import GeneratorConfig
from .layers import Block, Context, RMSNorm, Transformer, linear, weights
from .rope import StackTables
from .speed.memory import MemoryPlan, memory_plan
from .speed.offload import Residency
from .speed.passes import Switches, passes_for
from .speed.prefix import Kept, constant_prefix, prefix_key

if TYPE_CHECKING:
    from .speed.graphs import Graphs


class ParameterGenerator(nn.Module):
    """Hypernetwork of a `GeneratorConfig`.

    operations: a namespace with ``Linear`` (default torch.nn), so that a host can bring layers that it moves
        and casts itself.
    checkpointing: recompute each block in the backward pass.
    chunk_bytes: size of the widest intermediate in inference, None for the device's default.
    prefix_cache_bytes: the most that the kept constant prefix may take, None for what the device has room
        for.
    kernels: the fast path's Triton kernels, "auto" where the device has them.
    switches: the fast path's parts.
    memory_budget: bytes that weights and intermediates may take on the generator's device in inference, None
        for no limit; chunk sizes and which blocks are offloaded to host memory follow from it at each call.
    residency: where the blocks' weights rest.
    Threads may share a generator; where blocks are offloaded they take turns.
    """

    def __init__(self, config: GeneratorConfig, operations: Any = nn) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.chunk_bytes: int | None = None
        self.prefix_cache_bytes: int | None = None
        self.kernels: ModuleType | Literal["auto"] | None = "auto"
        self.switches = Switches()
        self.memory_budget: int | None = None
        self.residency = Residency()
        self.tables, self.prefixes = Kept(), Kept(only_last=True)
        self.graphs: Graphs | None = None  # see speed/graphs.py
        self._epoch = 0
        dim = config.d_model
        parts = {name: operations.Linear(width, dim) for name, width in config.condition.items()}
        single = len(parts) == 1
        self.hidden_in = next(iter(parts.values())) if single else nn.ModuleDict(parts)
        self.model = Transformer(config, operations)

    def forward(
        self,
        condition: Condition | Tensor,
        on_block: Callable[[int, int], None] | None = None,
    ) -> GeneratedLoRA:
        """Write a LoRA for every item of the condition.

        condition: a Condition, or a tensor ``[B, L, C]`` where there is one part. It is moved to the
            generator's device and dtype.
        on_block: called after each block with (done, total), for progress; what it raises ends the
            generation.
        Returns a GeneratedLoRA on the generator's device. Never waits for the device. Raises HYWUError when
        the condition's parts or widths are not the checkpoint's.
        """
        condition = Condition.of(condition, next(iter(self.config.condition)))
        return self.lora(condition, self.generate_grids(condition, on_block))

    def generate_grids(
        self, condition: Condition, on_block: Callable[[int, int], None] | None = None
    ) -> list[Tensor]:
        """Token grids ``[B, layers, tokens, rank, token_dim]`` per stack: the LoRA's only buffers."""
        # the condition, and all that blocks need beside the hidden states
        tokens, mask = self.project(condition)
        in_place = not (torch.is_grad_enabled() and self._needs_grad(tokens))
        plan = self.memory_plan(*tokens.shape[:2], in_place)
        context = self.context(tokens, mask, in_place, plan)
        # blocks; all up to the first attention to the condition is the same for every condition
        total = len(self.model.blocks)
        with contextlib.closing(self.residency.blocks(self.model, plan)) as blocks:
            for i, block in enumerate(blocks):
                if i == 0:
                    hidden = constant_prefix(self, block, context, plan)
                if self.checkpointing and not in_place:
                    hidden = checkpoint(block, hidden, context, i == 0, use_reentrant=False)
                else:
                    hidden = block(hidden, context, i == 0)
                if on_block is not None:
                    on_block(i + 1, total)
        # final norm and output projections
        return [self.head(stack, hidden, context) for stack in range(len(hidden))]

    # -- the condition ---------------------------------------------------------------------------

    def project(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Condition tokens ``[B, L, d]`` after input projection and norm, and their mask ``[B, L]``."""
        self.config.check_condition(condition.widths)
        like = self.model.norm_input.weight
        projected, masks = [], []
        for name in self.config.condition:
            tokens, mask = _counted(condition.parts[name], condition.masks.get(name))
            if mask is not None:
                mask = mask.to(like.device, non_blocking=True)
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

    def context(
        self, tokens: Tensor, mask: Tensor | None, in_place: bool, plan: MemoryPlan | None
    ) -> Context:
        """What blocks need beside the hidden states; a masked token takes no position."""
        device = tokens.device
        key = (self.config.rope_precision, device)
        tables = self.tables.get(key)
        if tables is None:
            tables = [StackTables(self.config, s, device) for s in range(len(self.config.grids))]
            self.tables.put(key, tables, [t for table in tables for t in table.tensors()])
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_(min=0)
        keys = [table.key(tokens.shape[1], positions) for table in tables]
        attend = None if mask is None else mask[:, None, None]
        return Context(tokens, attend, tables, keys, passes_for(self, tokens, in_place, plan))

    # -- the constant prefix ---------------------------------------------------------------------

    def prefix(self, block: Block, context: Context) -> list[Tensor]:
        """Hidden states ``[1, N, S, d]`` per stack up to the first attention to the condition."""
        hidden = [self._tokens(s, context) for s in range(len(context.tables))]
        return block.prefix(hidden, context)

    def _tokens(self, stack: int, context: Context) -> Tensor:
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

    # -- the output ------------------------------------------------------------------------------

    def head(self, stack: int, hidden: list[Tensor], context: Context) -> Tensor:
        """Final norm, unpacking and output projections; over the hidden states where sizes agree."""
        config, grid, model = self.config, self.config.grids[stack], self.model
        x, hidden[stack] = hidden[stack], None  # type: ignore[call-overload]
        batch, packed = x.shape[0], config.d_model // config.dim_accumulation
        cut = grid.num_a_tokens * config.rows_per_token
        sides = (
            (slice(0, cut), model.proj_out_A, config.lora_a_scale),
            (slice(cut, None), model.proj_out_B, config.lora_b_scale),
        )
        if not context.in_place:
            values = [self._project_out(x[:, :, at], p, f, context) for at, p, f in sides]
            return torch.cat(values, dim=2)
        width = config.values_per_position
        reuse = packed == config.token_dim
        out = x if reuse else x.new_empty(batch, grid.num_layers, x.shape[2], width)
        for at, projection, factor in sides:
            for n in context.passes.head_chunks(grid.num_layers, batch * x.shape[2]):
                view = x[:, n, at]
                values = self._project_out(view, projection, factor, context)
                out[:, n, at] = values.flatten(2).view(*view.shape[:3], width)
        rank = config.layout.rank
        return out.view(batch, grid.num_layers, grid.num_tokens, rank, config.token_dim)

    def _project_out(
        self, x: Tensor, projection: nn.Module, factor: float, context: Context
    ) -> Tensor:
        """``[B, n, positions, d]`` -> ``[B, n, tokens, rank, token_dim]`` of one side."""
        config = self.config
        rows = context.passes.norm(self.model.norm_final, x).reshape(
            *x.shape[:2], -1, config.layout.rank, config.d_model // config.dim_accumulation
        )
        weight, bias = weights(projection, rows)
        if factor != 1.0:
            weight, bias = weight * factor, None if bias is None else bias * factor
        return F.linear(rows, weight, bias)

    def lora(self, condition: Condition, grids: list[Tensor]) -> GeneratedLoRA:
        """The LoRA of grids generated from `condition`."""
        provenance = {
            **condition.origin,
            "condition_fingerprint": condition.fingerprint,
            "base": self.config.base,
            **{k: v for k, v in self.config.provenance.items() if k == "checkpoint"},
        }
        return GeneratedLoRA.from_grids(self.config.layout, grids, provenance)

    # -- weights and memory ----------------------------------------------------------------------

    def memory_plan(
        self, batch_size: int, condition_tokens: int, inference: bool = True
    ) -> MemoryPlan | None:
        """How a call of this size keeps to `memory_budget`; None without one.

        Raises HYWUError when it can't, or when blocks are offloaded and inference is False.
        """
        if inference:
            return memory_plan(self, batch_size, condition_tokens)
        if self.residency.offloaded:
            raise HYWUError(
                "this generator's blocks are offloaded to host memory, which works in inference "
                "only; load it without memory_budget to train it."
            )
        return None

    def _needs_grad(self, tokens: Tensor) -> bool:
        return tokens.requires_grad or any(p.requires_grad for p in self.model.parameters())

    def forget(self) -> None:
        """Drop what was derived from the weights: constant prefix, graphs, copies of offloaded blocks."""
        self.residency.forget()
        self.prefixes.clear()
        self.graphs = None
        self._epoch += 1

    def weights_key(self) -> tuple:
        """Changes when anything that was derived from the weights is no longer true."""
        return (self._epoch, prefix_key(self, self.model.norm_input.weight))

    def _apply(self, fn: Callable, recurse: bool = True) -> ParameterGenerator:
        self.forget()  # .to() and the like make other tensors of the weights
        return super()._apply(fn, recurse)

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


def _counted(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``tokens [B, L, C]`` and their mask; of one item only those that count, if no device must be asked."""
    asks = torch.compiler.is_compiling() or mask is None or mask.device.type != "cpu"
    if asks or mask.shape[0] != 1 or not bool(mask.any()):
        return tokens, mask
    kept = mask[0].nonzero()[:, 0].to(tokens.device, non_blocking=True)
    return tokens.index_select(1, kept), None
