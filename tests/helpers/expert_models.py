"""A mixture of experts in the forms that models keep them in, and LoRAs on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hywu_core import GeneratedLoRA
from hywu_core.grouped import GroupedLinear

FORMS = ("grouped", "list", "parameters", "banks")


def act(gate, up):
    return F.silu(gate) * up


class FusedExpert(nn.Module):
    """One expert as HunyuanImage-3 stores it: up, then gate, in one matrix."""

    def __init__(self, up, gate, down) -> None:
        super().__init__()
        (width, dim) = up.shape
        self.gate_and_up_proj = nn.Linear(dim, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)
        self.gate_and_up_proj.weight.data.copy_(torch.cat((up, gate)))
        self.down_proj.weight.data.copy_(down)

    def forward(self, x):
        up, gate = self.gate_and_up_proj(x).chunk(2, -1)
        return self.down_proj(act(gate, up))


class FusedBank(nn.Module):
    """Experts as transformers keeps them: parameters of one module, gate, then up."""

    def __init__(self, up, gate, down) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.cat((gate, up), dim=1))
        self.down_proj = nn.Parameter(down.clone())

    def forward(self, x, e):
        gate, up = F.linear(x, self.gate_up_proj[e]).chunk(2, -1)
        return F.linear(act(gate, up), self.down_proj[e])


class Bank(nn.Module):
    """A module with one three-dimensional weight that is called in its own way."""

    def __init__(self, weight) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x, e):
        return F.linear(x, self.weight[e])


class Mixture(nn.Module):
    """Every expert sees every token; their sum. `form`: how the experts are kept."""

    def __init__(self, form: str, experts: int = 4, dim: int = 8, width: int = 6) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(4)
        up, gate = (torch.randn(experts, width, dim, generator=rng) for _ in range(2))
        down = torch.randn(experts, dim, width, generator=rng)
        self.form = form
        if form == "list":
            self.experts = nn.ModuleList(map(FusedExpert, up, gate, down))
        elif form == "parameters":
            self.experts = FusedBank(up, gate, down)
        else:
            grouped = form == "grouped"
            kinds = {"w1": gate, "w2": down, "w3": up}
            self.experts = nn.ModuleDict(
                {
                    name: GroupedLinear(experts, w.shape[2], w.shape[1]) if grouped else Bank(w)
                    for name, w in kinds.items()
                }
            )
            for name, w in kinds.items():
                self.experts[name].weight.data.copy_(w)

    def forward(self, x):
        rows = x.flatten(0, 1)
        if self.form == "list":
            made = [expert(rows) for expert in self.experts]
        elif self.form == "parameters":
            made = [self.experts(rows, e) for e in range(4)]
        elif self.form == "banks":
            w1, w2, w3 = (self.experts[name] for name in ("w1", "w2", "w3"))
            made = [w2(act(w1(rows, e), w3(rows, e)), e) for e in range(4)]
        else:
            count, many = len(rows), rows.repeat(4, 1)
            ends = torch.arange(1, 5, dtype=torch.int32) * count
            items = torch.arange(x.shape[0]).repeat_interleave(x.shape[1]).repeat(4)
            w1, w2, w3 = (self.experts[name] for name in ("w1", "w2", "w3"))
            gate, up = (w(many, ends, items=items) for w in (w1, w3))
            made = w2(act(gate, up), ends, items=items).split(count)
        return sum(made).view_as(x)


def expert_pairs(batch: int = 1, prefix: str = "layer") -> dict:
    rng = torch.Generator().manual_seed(9)
    shapes = {"w1": (8, 6), "w2": (6, 8), "w3": (8, 6)}
    return {
        f"{prefix}.experts.{name}": (
            torch.randn(batch, 4, 2, in_, generator=rng) * 0.3,
            torch.randn(batch, 4, out, 2, generator=rng) * 0.3,
        )
        for name, (in_, out) in shapes.items()
    }


def expert_lora(batch: int = 1) -> GeneratedLoRA:
    return GeneratedLoRA.from_pairs(expert_pairs(batch), alpha=4)
