"""A straightforward eager implementation of the official generator's published function.

The yardstick of the benchmarks: separate q/k/v, position tables built per call, whole tensors, its
own operations and SDPA; no deliberate slowness. tests/core/test_bench.py holds it equal to the engine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hywu_core.generator.config import GeneratorConfig


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def rope(positions: Tensor, dim: int, precision: str) -> Tensor:
    """2x2 rotation matrices ``[..., dim / 2, 2, 2]``."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, device=positions.device).float() / dim)
    positions = positions.float()
    if precision == "bfloat16":
        positions, frequencies = positions.bfloat16(), frequencies.bfloat16()
    angles = positions[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)).float()


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """x: ``[B, H, L, hd]``; table: ``[L, hd / 2, 2, 2]``."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = wide.unflatten(-1, (-1, 1, 2))
    out = table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]
    return out.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.W_q, self.W_k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.W_v, self.W_o = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor, q_table: Tensor, k_table: Tensor) -> Tensor:
        q = apply_rope(self.heads(self.W_q(x)), q_table)
        k = apply_rope(self.heads(self.W_k(context)), k_table)
        v = self.heads(self.W_v(context))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.W_o(out.transpose(1, 2).flatten(2))


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        dim = config.d_model
        self.self_attn_n = Attention(dim, config.head_dim)
        self.self_attn_hw = Attention(dim, config.head_dim)
        self.self_attn_cross = Attention(dim, config.head_dim)
        self.feed_forward = FeedForward(dim)
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.norm3, self.norm4 = Norm(dim), Norm(dim)

    def forward(self, x: Tensor, condition: Tensor, tables: dict[str, Tensor]) -> Tensor:
        batch, layers, length, dim = x.shape
        h = self.norm1(x).transpose(1, 2).reshape(batch * length, layers, dim)
        h = self.self_attn_n(h, h, tables["layers"], tables["layers"])
        x = x + h.view(batch, length, layers, dim).transpose(1, 2)
        h = self.norm2(x).view(batch * layers, length, dim)
        h = self.self_attn_hw(h, h, tables["within"], tables["within"])
        x = x + h.view(batch, layers, length, dim)
        h = self.norm3(x).view(batch, layers * length, dim)
        h = self.self_attn_cross(h, condition, tables["query"], tables["key"])
        x = x + h.view(batch, layers, length, dim)
        return x + self.feed_forward(self.norm4(x))


class Body(nn.Module):
    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        dim, packed = config.d_model, config.d_model // config.dim_accumulation
        grid = config.grids[0]
        self.norm_input, self.norm_tokens, self.norm_final = Norm(dim), Norm(dim), Norm(dim)
        self.hw_pos = nn.Embedding(grid.num_tokens * config.layout.rank, packed)
        self.layer_pos = nn.Embedding(grid.num_layers, packed)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.proj_out_A = nn.Linear(packed, config.token_dim)
        self.proj_out_B = nn.Linear(packed, config.token_dim)


class EagerGenerator(nn.Module):
    """One stack, one condition part; parameters under the official names."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_in = nn.Linear(next(iter(config.condition.values())), config.d_model)
        self.model = Body(config)

    def tables(self, condition_tokens: int, device: torch.device) -> dict[str, Tensor]:
        config, grid = self.config, self.config.grids[0]
        head, rows, precision = config.head_dim, config.rows_per_token, config.rope_precision
        tokens, layers = grid.num_tokens, grid.num_layers
        length = tokens * rows

        def two(first: Tensor, second: Tensor) -> Tensor:
            halves = [rope(p, head // 2, precision) for p in (first, second)]
            return torch.cat(halves, dim=-3)

        flat = torch.arange(length, device=device)
        layer = torch.arange(layers, device=device)
        key = torch.arange(condition_tokens, device=device) + max(tokens, rows)
        return {
            "layers": rope(layer, head, precision),
            "within": two(flat // rows, flat % rows),
            "query": two(layer.repeat_interleave(length), flat.repeat(layers)),
            "key": two(key, key),
        }

    def forward(self, condition: Tensor) -> Tensor:
        """``[B, L, C]`` -> token grid ``[B, layers, tokens, rank, token_dim]``."""
        config, grid, model = self.config, self.config.grids[0], self.model
        condition = model.norm_input(self.hidden_in(condition))
        batch, rank = condition.shape[0], config.layout.rank
        tables = self.tables(condition.shape[1], condition.device)
        x = model.hw_pos.weight[None] + model.layer_pos.weight[:, None]
        x = x.view(1, grid.num_layers, -1, config.d_model).expand(batch, -1, -1, -1)
        x = model.norm_tokens(x)
        for block in model.blocks:
            x = block(x, condition, tables)
        x = model.norm_final(x).view(batch, grid.num_layers, grid.num_tokens, rank, -1)
        a, b = x.split([grid.num_a_tokens, grid.num_tokens - grid.num_a_tokens], dim=2)
        return torch.cat([model.proj_out_A(a), model.proj_out_B(b)], dim=2)
