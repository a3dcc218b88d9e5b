"""The benchmarks: their yardstick computes the engine's function, their helpers measure."""

from __future__ import annotations

import json
import time

import pytest
import torch

from bench import generator as bench
from bench import measure
from bench.eager import EagerGenerator
from bench.sizes import CPU_SIZES, SIZES
from hywu_core import Condition, GeneratorConfig, LoRALayout, ParameterGenerator
from hywu_core.generator.tensors import file_tensors
from hywu_core.layout import Module, Stack


def small_config(precision: str) -> GeneratorConfig:
    """One stack whose matrices leave their last tokens partly empty."""
    modules = (Module("qkv", 20, 60), Module("proj", 20, 36))
    layout = LoRALayout((Stack(("b.0", "b.1", "b.2"), modules),), 4, 4.0)
    return GeneratorConfig(layout, {"hidden_states": 24}, 16, 2, 32, 8, 3, precision)


def relative(value, expected) -> float:
    return ((value - expected).norm() / expected.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_eager_twin_computes_the_engines_function(precision, chunk_bytes):
    config = small_config(precision)
    generator = bench.make(config)
    generator.chunk_bytes = chunk_bytes  # 1: every chunk is as small as can be
    eager = EagerGenerator(config).eval()
    eager.load_state_dict(dict(file_tensors(generator)))
    tokens = torch.randn(2, 11, 24)
    expected, grids = eager(tokens), generator.generate_grids(Condition.of(tokens))
    assert len(grids) == 1
    assert grids[0].shape == expected.shape == (2, 3, config.grids[0].num_tokens, 4, 16)
    assert relative(grids[0], expected) < 2e-6
    # the comparison sees a weight that differs in the last sublayer of the last block
    eager.model.blocks[-1].feed_forward.fc2.weight.mul_(1.01)
    assert relative(grids[0], eager(tokens)) > 1e-4


def test_the_sizes_are_those_they_claim():
    config = bench.cpu_config()
    grid = config.grids[0]
    assert (grid.num_layers, grid.num_tokens, config.layout.rank) == (8, 80, 16)
    assert (config.d_model, config.head_dim, config.num_blocks) == (512, 64, 10)
    assert config.dim_accumulation == 4
    official = bench.official_config()
    assert official.num_positions == 176_512
    with torch.device("meta"):
        generator = ParameterGenerator(official)
    assert sum(p.numel() for p in generator.parameters()) == 8_096_647_168


def test_paired_runs_in_turn_and_reads_both_clocks():
    calls = []

    def sleeps():
        calls.append("sleeps")
        time.sleep(0.02)

    def computes():
        calls.append("computes")
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    times = measure.paired({"sleeps": sleeps, "computes": computes}, 3)
    assert calls == ["sleeps", "computes"] * 4  # the first round warms up
    assert all(len(v) == 3 for clocks in times.values() for v in clocks.values())
    assert min(times["sleeps"]["wall_s"]) >= 0.02
    assert min(times["computes"]["cpu_s"]) >= 0.02
    assert max(times["sleeps"]["cpu_s"]) < 0.02


def test_an_interrupted_measurement_keeps_whole_rounds():
    calls = []

    def stops():
        calls.append(1)
        if len(calls) == 4:  # after the warm-up and two rounds
            raise KeyboardInterrupt

    times = measure.paired({"other": lambda: None, "stops": stops}, 9)
    assert [len(v) for clocks in times.values() for v in clocks.values()] == [2, 2, 2, 2]
    calls[:] = [1, 1]
    with pytest.raises(KeyboardInterrupt):
        measure.paired({"stops": stops}, 9)


def test_summary_divides_medians_and_pairs():
    times = {"a": {"wall_s": [4.0, 6.0, 8.0]}, "b": {"wall_s": [2.0, 4.0, 2.0]}}
    figures = measure.summary(times, "a")
    b = figures["b"]["wall_s"]
    assert (b["median"], b["min"], b["max"]) == (2.0, 2.0, 4.0)
    assert b["speedup"] == 3.0  # 6 / 2
    assert b["paired_speedup"] == 2.0  # the middle one of 2, 1.5 and 4
    assert figures["a"]["wall_s"]["speedup"] == 1.0


def test_peak_memory_counts_what_is_held_at_once():
    size = 1 << 20  # float32 values: 4 MiB a tensor

    def three_at_once():
        kept = torch.empty(size)
        for _ in range(4):
            torch.empty(2 * size).fill_(0)  # freed before the next
        return kept

    assert measure.peak_memory(three_at_once) == 3 * 4 * size
    assert measure.peak_memory(lambda: torch.empty(size)) == 4 * size


def test_json_says_what_it_was_measured_with(tmp_path):
    path = tmp_path / "new" / "figures.json"
    measure.write_json(path, {"seconds": 2})
    data = json.loads(path.read_text())
    assert data["seconds"] == 2
    assert data["environment"]["torch"] == torch.__version__
    measure.write_json(None, {})


@torch.no_grad()
def test_the_forward_stays_under_half_the_memory_of_the_twin():
    config = bench.cpu_config().with_(num_blocks=2)  # the peak doesn't depend on how many there are
    generator, eager = bench.make(config), EagerGenerator(config).eval()
    tokens = torch.randn(1, 1000, 512)
    condition = Condition.of(tokens)
    theirs = measure.peak_memory(lambda: eager(tokens))
    for kept in ("prefix computed", "prefix cached"):
        ours = measure.peak_memory(lambda: generator.generate_grids(condition))
        assert 0 < ours < theirs / 2, (kept, ours, theirs)


def test_both_sizes_stand_in_one_table(monkeypatch, capsys):
    tiny = {name: SIZES[name].tiny() for name in CPU_SIZES}
    monkeypatch.setattr(bench, "SIZES", tiny)
    found = bench.cpu(1)
    assert set(found) == {"bundled", "engine"}
    lines = capsys.readouterr().out.splitlines()
    for size, figures in found.items():
        assert figures["relative_difference"] < 1e-5
        assert sum(line.startswith(f"{size} ") for line in lines) == 2  # plain eager, ours
        assert set(figures["peak_bytes"]) == set(figures["time"]) == {"plain eager", "ours"}
