"""A generator on the CPU whose blocks stay in the checkpoint's file: same bits, hardly any memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bench.sizes import make
from hywu_core import Condition, GeneratorConfig, HYWUError, LoRALayout, load_generator
from hywu_core.generator.checkpoints import save_generator
from hywu_core.generator.official import save_official
from hywu_core.generator.speed.memory import SLOTS
from hywu_core.layout import Module, Stack

TOKENS = 6
#: Above everything that these generators could take.
ENOUGH = 1 << 40


def config(**changes) -> GeneratorConfig:
    modules = (Module("qkv", 32, 96), Module("proj", 32, 32))
    layout = LoRALayout((Stack(("b.0", "b.1"), modules),), 4, 4.0)
    values = {"d_model": 64, "head_dim": 16, "num_blocks": 6, **changes}
    return GeneratorConfig(layout, {"hidden_states": 24}, 16, 2, **values)


def other():
    """As `make(config())`, with another last block."""
    generator = make(config())
    generator.model.blocks[-1].feed_forward.fc2.weight.mul_(1.1)
    return generator


def condition() -> Condition:
    return Condition.of(torch.randn(1, TOKENS, 24, generator=torch.Generator().manual_seed(1)))


def grid(generator) -> torch.Tensor:
    with torch.no_grad():
        return generator.generate_grids(condition())[0]


def offloaded_budget(path: Path, **options) -> int:
    """The least under which no block stays in memory and chunks are as large as ever."""
    plan = load_generator(path, memory_budget=ENOUGH, **options).memory_plan(1, TOKENS)
    return plan.fixed_bytes + SLOTS * plan.block_bytes + plan.working_bytes


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["file", "shards"])
def test_blocks_read_from_the_file_give_the_same_bits(tmp_path, dtype, kind):
    original = make(config())
    path = tmp_path / "g.safetensors"
    if kind == "file":
        save_generator(original, path)
    else:
        path = save_official(original, tmp_path / "official", shard_bytes=200_000)
        assert len(list(path.glob("*.safetensors"))) > 3
    expected = grid(load_generator(path, dtype=dtype))
    generator = load_generator(path, dtype=dtype, memory_budget=offloaded_budget(path, dtype=dtype))
    plan = generator.memory_plan(1, TOKENS)
    assert (plan.resident_blocks, generator.residency.offloaded) == (0, True)
    for budget in (generator.memory_budget, ENOUGH, None):
        generator.memory_budget = budget
        assert torch.equal(grid(generator), expected)
    assert not torch.equal(grid(other()), expected)  # the comparison sees the last block's weights


def test_it_can_be_saved_but_not_moved_or_trained(tmp_path):
    path = save_generator(make(config()), tmp_path / "g.safetensors")
    generator = load_generator(path, memory_budget=offloaded_budget(path))
    again = save_generator(generator, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(HYWUError, match="can't be moved or cast"):
        generator.to(torch.float64)
    generator.requires_grad_(True)
    with pytest.raises(HYWUError, match="in inference only"):
        generator(condition())


def test_a_file_that_changed_is_not_read(tmp_path):
    path = save_generator(make(config()), tmp_path / "g.safetensors")
    generator = load_generator(path, memory_budget=offloaded_budget(path))
    grid(generator)
    save_generator(other(), path, overwrite=True)
    with pytest.raises(HYWUError, match="changed since the generator was loaded"):
        grid(generator)
    path.unlink()
    with pytest.raises(HYWUError, match="changed since the generator was loaded"):
        grid(generator)


def test_values_that_are_not_finite_are_found_in_blocks_that_stay_in_the_file(tmp_path):
    broken = make(config())
    broken.model.blocks[4].feed_forward.fc1.weight[3, 5] = torch.inf
    path = save_generator(broken, tmp_path / "g.safetensors")
    with pytest.raises(HYWUError, match=r"not finite in model.blocks.4.feed_forward.fc1.weight"):
        load_generator(path, memory_budget=ENOUGH)


MEASURE = """
    import json, sys
    import torch
    sys.path.insert(0, "tests/helpers")
    from hywu_core import Condition, load_generator
    from resident import Watch

    small, path, budget, tokens = *sys.argv[1:3], int(sys.argv[3]), torch.randn(1, 6, 24)
    torch.set_num_threads(1)
    # torch imports parts of itself at the first generator, which is no memory of this one
    with torch.no_grad():
        load_generator(small, memory_budget=1 << 40)(Condition.of(tokens))
    with Watch() as watch:
        generator = load_generator(path, memory_budget=budget or None)
        with torch.no_grad():
            for _ in range(3):
                lora = generator(Condition.of(tokens))
    print(json.dumps(watch.peak))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_offloading_holds_under_a_quarter_of_the_weights(tmp_path):
    """Anonymous resident memory of a process of its own, over load and three generations."""
    path = tmp_path / "g.safetensors"
    small = save_generator(make(config()), tmp_path / "small.safetensors")
    generator = make(config(d_model=384, head_dim=64, num_blocks=12))
    save_generator(generator, path)
    weights = sum(p.nbytes for p in generator.parameters())
    del generator
    gc.collect()
    budget = offloaded_budget(path)
    plan = load_generator(path, memory_budget=budget).memory_plan(1, TOKENS)
    peaks = {}
    for name, number in (("resident", 0), ("offloaded", budget)):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEASURE), small, path, str(number)],
            capture_output=True, text=True, timeout=600, check=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        peaks[name] = json.loads(done.stdout)
    print({"weights": weights, "working": plan.working_bytes, **peaks})
    assert weights > 1e8
    assert peaks["resident"] > 0.95 * weights  # the measurement sees weights
    assert peaks["resident"] < 1.2 * weights + plan.working_bytes  # never two copies of them
    assert peaks["offloaded"] < 0.25 * weights + plan.working_bytes
