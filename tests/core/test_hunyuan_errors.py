"""What quantized experts change of an image at a middle size, beside what bfloat16 itself changes, by medians.

Medians, because a router's choice that flips changes a token wholly: a few values far away say nothing of the rest.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import cache

import pytest
import torch

from bench import hunyuan_base
from hywu_core.bases.hunyuan_image3.editing import Denoiser, Sampling, sample

CPU = torch.device("cpu")
SEEDS, STEPS = 3, 2


def config():
    """Four layers of 16 experts, 38 million numbers in all."""
    return replace(
        hunyuan_base.config_of(4, tiny=True), hidden_size=512, head_dim=64, num_heads=8, num_kv_heads=4,
        num_experts=16, expert_widths=(384,) * 4, top_k=(4,) * 4,
    )  # fmt: skip


@cache
def latents(method: str | None, dtype: torch.dtype) -> torch.Tensor:
    """An edit's latents ``[SEEDS, C, h, w]``, float32: guided steps from the same noise in every variant."""
    settings, sizes = config(), hunyuan_base.Sizes.tiny()
    base = hunyuan_base.build(settings, CPU, dtype, method, streamed=False)
    sequences = hunyuan_base.sequences(settings, sizes)
    shown = hunyuan_base.source(settings, sizes, CPU, dtype)
    made = []
    for seed in range(SEEDS):
        shape = (1, settings.vae.latent_channels, sizes.grid, sizes.grid)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        with Denoiser(base.model, sequences, [[shown], [shown]]) as denoiser:
            made.append(sample(denoiser, noise, Sampling(STEPS, 2.5, 3.0), guided=True))
    return torch.cat(made)


def median_error(method: str | None, dtype: torch.dtype) -> float:
    """The median over seeds of the median distance from float32, over the median size."""
    exact, here = latents(None, torch.float32), latents(method, dtype)
    each = [(a - b).abs().median() / b.abs().median() for a, b in zip(here, exact, strict=True)]
    return float(statistics.median(each))


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    with torch.no_grad():
        found = {"bf16": median_error(None, torch.bfloat16)}
        for method in ("int8", "fp8", "nf4"):
            found[method] = median_error(method, torch.float32)
    print(
        {
            name: f"{value:.2e} ({value / found['bf16']:.2f} of bf16's)"
            for name, value in found.items()
        }
    )
    return found


def test_errors_end_to_end_beside_those_of_bfloat16(errors):
    assert 0 < errors["bf16"] < 0.1
    assert errors["int8"] < 1.5 * errors["bf16"]
    assert errors["int8"] < errors["fp8"] < errors["nf4"] < 5 * errors["bf16"]
