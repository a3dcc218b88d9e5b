"""Decoder layers: attention, then a shared MLP beside the experts that a router chose for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...grouped import GroupedLinear
from .attention import Attention, KVCache, Norm, Rows
from .config import HunyuanConfig

#: Official runs multiply the router in bfloat16 (autocast); float32 is what its stored precision means.
RouterPrecision = Literal["float32", "bfloat16"]

#: Rows (a token and one of its experts) that go through the experts at once: bounds their intermediates.
EXPERT_ROWS = 32_768


class GatedMLP(nn.Module):
    """down(up · silu(gate)); the first half of `gate_and_up_proj`'s rows is up, the second gate."""

    def __init__(self, hidden: int, width: int, operations: Any = nn) -> None:
        super().__init__()
        self.gate_and_up_proj = operations.Linear(hidden, 2 * width, bias=False)
        self.down_proj = operations.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_and_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * F.silu(gate))


class Router(nn.Module):
    """The top experts of each token and their weights."""

    def __init__(self, config: HunyuanConfig, layer: int) -> None:
        super().__init__()
        self.top_k, self.normalize = config.top_k[layer], config.normalize_top_k
        self.precision: RouterPrecision = "float32"
        # a plain Linear: its weight stays float32 in a bfloat16 model
        self.wg = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[T, hidden]`` -> weights float32 ``[T, k]`` and experts int64 ``[T, k]``."""
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        logits = F.linear(x.to(dtype), self.wg.weight.to(x.device, dtype))
        weights, chosen = logits.float().softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-8)
        return weights, chosen


class Experts(nn.Module):
    """Banks ``[experts, out, in]``: w3 up, w1 gate, w2 down; addressable by expert."""

    def __init__(self, config: HunyuanConfig, layer: int, grouped: Any = GroupedLinear) -> None:
        super().__init__()
        count, hidden, width = config.num_experts, config.hidden_size, config.expert_widths[layer]
        self.w1 = grouped(count, hidden, width)
        self.w2 = grouped(count, width, hidden)
        self.w3 = grouped(count, hidden, width)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor, items: Tensor) -> Tensor:
        """The weighted sum over each token's experts.

        x ``[T, hidden]``; weights, chosen ``[T, k]``; items int64 ``[T]``: each token's batch item, for
        adapters that differ by item. Never waits for the device.
        """
        experts, k = self.w1.num_experts, chosen.shape[1]
        order = torch.argsort(chosen.flatten(), stable=True)
        token = order // k
        bounds = torch.arange(experts, device=x.device)
        ends = torch.searchsorted(chosen.flatten()[order], bounds, right=True).to(torch.int32)
        # in the order of tokens, so that the sum over experts has one order
        out = x.new_empty(order.numel(), x.shape[1])
        # split by expert, not by token: a part's experts are few, so that hardly one is fetched twice
        for first in range(0, order.numel(), EXPERT_ROWS):
            part = slice(first, first + EXPERT_ROWS)
            inside = (ends - first).clamp(0, order[part].numel())
            out[order[part]] = self._products(x, token[part], inside, items)
        return out.unflatten(0, (-1, k)).mul_(weights[..., None].to(out.dtype)).sum(dim=1)

    def _products(self, x: Tensor, token: Tensor, ends: Tensor, items: Tensor) -> Tensor:
        """``[R, hidden]`` of the tokens ``[R]``, sorted by expert, through their experts."""
        rows, items = x[token], items[token]
        up = self.w3(rows, ends, items=items)
        gate = self.w1(rows, ends, items=items)
        del rows
        up = up * F.silu(gate)
        del gate
        return self.w2(up, ends, items=items)


class MixtureOfExperts(nn.Module):
    """The shared MLP, which sees every token, plus the experts."""

    def __init__(
        self, config: HunyuanConfig, layer: int, operations: Any = nn, grouped: Any = GroupedLinear
    ) -> None:
        super().__init__()
        width = config.expert_widths[layer] * config.shared_experts[layer]
        self.gate = Router(config, layer)
        self.shared_mlp = GatedMLP(config.hidden_size, width, operations)
        self.experts = Experts(config, layer, grouped)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[B, S, hidden]``."""
        tokens = x.flatten(0, 1)
        items = torch.arange(x.shape[0], device=x.device).repeat_interleave(x.shape[1])
        routed = self.experts(tokens, *self.gate(tokens), items)
        return self.shared_mlp(x) + routed.view_as(x)


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += shared(norm(x)) + experts(norm(x))."""

    def __init__(
        self, config: HunyuanConfig, layer: int, operations: Any = nn, grouped: Any = GroupedLinear
    ) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = Norm(config.hidden_size, config.eps)
        self.self_attn = Attention(config, operations)
        self.post_attention_layernorm = Norm(config.hidden_size, config.eps)
        self.mlp = MixtureOfExperts(config, layer, operations, grouped)

    def forward(
        self, x: Tensor, turn: Tensor, plan: Sequence[Rows], cache: KVCache | None = None
    ) -> Tensor:
        """x ``[B, S, hidden]``.

        turn, plan, cache: see `Attention`.
        """
        x = x + self.self_attn(self.input_layernorm(x), turn, plan, cache, self.layer)
        return x + self.mlp(self.post_attention_layernorm(x))
