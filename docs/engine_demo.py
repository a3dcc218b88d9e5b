"""The engine alone: condition -> generator -> LoRA -> frozen model, on random weights.

`python -m docs.engine_demo` from the checkout. It shows the path and its times, not an edit.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from hywu_core import Condition, GeneratorConfig, LoRALayout, ParameterGenerator, inject
from hywu_core.console import say


class Block(nn.Module):
    """One residual block of the stand-in for a base model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


@torch.inference_mode()
def main() -> None:
    """Generate two LoRAs from two conditions and apply each to its own item of a batch."""
    torch.manual_seed(0)
    base = nn.Sequential(*(Block(128) for _ in range(6)))
    layout = LoRALayout.of(base, rank=8)
    config = GeneratorConfig(
        layout=layout, condition={"text": 64}, token_dim=128, dim_accumulation=2,
        d_model=256, head_dim=64, num_blocks=4,
    )  # fmt: skip
    generator = ParameterGenerator(config)
    generator.reset_parameters()
    # An untrained generator writes B = 0, no change at all: give it something to show.
    nn.init.normal_(generator.model.proj_out_B.weight, std=1e-4)
    generator.eval()

    started = time.perf_counter()
    lora = generator(Condition({"text": torch.randn(2, 77, 64)}))
    generated = time.perf_counter() - started
    x = torch.randn(1, 32, 128).repeat(2, 1, 1)
    plain = base(x)
    with inject(base, lora):
        changed = base(x)
    say(f"two LoRAs for {len(lora)} modules, rank {lora.rank}: {generated * 1000:.0f} ms")
    say(f"one input, two conditions: outputs differ by {(changed[0] - changed[1]).norm():.3f}")
    say(f"undone exactly: {torch.equal(base(x), plain)}")


if __name__ == "__main__":
    main()
