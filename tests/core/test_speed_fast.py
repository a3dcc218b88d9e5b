"""The fast path's parts: fp8 layers, compiled blocks, graphs, no waiting for the device."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from bench.sizes import make, random_condition, reduced
from bench.variants import relative_difference, variant
from hywu_core import Condition, GeneratorConfig, HYWUError, LoRALayout, inject
from hywu_core.generator.checkpoints import save_generator
from hywu_core.generator.speed import fp8, graphs, passes
from hywu_core.generator.speed.fp8 import Fp8Linear, quantize_rows, to_fp8
from hywu_core.generator.speed.graphs import compile_blocks
from hywu_core.layout import Module, Stack

CPU = torch.device("cpu")


def small(num_blocks: int = 2) -> GeneratorConfig:
    stacks = (
        Stack(("d.0", "d.1"), (Module("qkv", 24, 72), Module("proj", 24, 24))),
        Stack(("s.0", "s.1", "s.2"), (Module("linear1", 24, 100),)),
    )
    layout = LoRALayout(stacks, 4, 8.0)
    return GeneratorConfig(layout, {"a": 12, "b": 20}, 16, 2, 32, 8, num_blocks)


def grids(generator, condition) -> list[torch.Tensor]:
    with torch.no_grad():
        return generator.generate_grids(condition)


# -- fp8 ------------------------------------------------------------------------------------------


def test_rows_are_quantized_within_half_a_step_of_e4m3():
    x = torch.randn(50, 300) * torch.logspace(-6, 6, 50)[:, None]
    x[7] = 0
    values, scale = quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    error = (values.float() * scale - x).abs()
    # three bits of mantissa: half a step is 1/16 of a value, or of the smallest normal number
    assert (error <= torch.maximum(x.abs() / 16, scale * 2**-10) * 1.001).all()
    assert not error[7].any()


def test_an_fp8_layer_multiplies_the_quantized_values():
    linear = nn.Linear(40, 24)
    x = torch.randn(2, 5, 40)
    weight, weight_scale = quantize_rows(linear.weight.detach())
    rows, row_scale = quantize_rows(x.view(10, 40))
    expected = (rows.double() * row_scale) @ (weight.double() * weight_scale).t() + linear.bias
    value = Fp8Linear(linear)(x)
    torch.testing.assert_close(value.view(10, 24).double(), expected, rtol=1e-5, atol=1e-5)


def test_fp8_stays_within_its_stated_error():
    config = reduced()
    condition = random_condition(config, 50, CPU, torch.float32)
    expected = grids(make(config), condition)
    rounded = to_fp8(make(config))
    error = relative_difference(grids(rounded, condition), expected)
    assert 0.005 < error < 0.08
    layers = [m for m in rounded.modules() if isinstance(m, Fp8Linear)]
    assert len(layers) == 8 * config.num_blocks  # all but the condition's keys and values


def test_fp8_generators_stream_but_are_not_saved(tmp_path):
    config = small(num_blocks=5)
    condition = random_condition(config, 9, CPU, torch.float32)
    generator = to_fp8(make(config))
    expected = grids(generator, condition)
    generator.memory_budget = 1 << 40
    plan = generator.memory_plan(1, 9)
    generator.memory_budget = plan.total_bytes - plan.block_bytes
    offloaded = grids(generator, condition)
    assert generator.residency.offloaded
    assert all(torch.equal(a, b) for a, b in zip(offloaded, expected, strict=True))
    with pytest.raises(HYWUError, match="quantized to fp8"):
        save_generator(generator, tmp_path / "g.safetensors")


def test_fp8_names_what_it_cannot_round():
    class Casting(nn.Linear):
        def resolve(self, like):
            return self.weight, self.bias

    host = type("operations", (), {"Linear": Casting})
    from hywu_core import ParameterGenerator

    with pytest.raises(HYWUError, match="belong to a host"):
        to_fp8(ParameterGenerator(small(), host))


def test_devices_without_e4m3_round_with_torch(monkeypatch):
    """Triton builds no e4m3 kernel for them, though it does the others."""
    built = object()
    monkeypatch.setattr(passes, "fused_kernels", lambda device: built)
    for index, (capability, kernels) in enumerate([((8, 0), None), ((8, 9), built)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert fp8._kernels(torch.device("cuda", 90 + index)) is kernels
    assert fp8._kernels(CPU) is None


# -- compiled blocks and graphs -------------------------------------------------------------------


def test_compiled_blocks_compute_the_same():
    generator = make(small())
    condition = random_condition(small(), 9, CPU, torch.float32)
    expected = grids(generator, condition)
    with variant("compiled", generator, condition) as run, torch.no_grad():  # as the bench runs it
        for _ in range(2):
            for value, right in zip(run(), expected, strict=True):
                torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)


def test_one_compilation_serves_all_blocks():
    """Beyond 8 of them dynamo would give up and run the other blocks as they are, without a word."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    generator = make(small(num_blocks=10))
    condition = random_condition(small(), 9, CPU, torch.float32)
    expected = grids(generator, condition)
    compile_blocks(generator, backend=counting, dynamic=False)
    try:
        for _ in range(2):
            torch.testing.assert_close(grids(generator, condition), expected, rtol=1e-4, atol=1e-5)
        assert len(graphs) == 2  # the first block's has no prefix
    finally:
        torch.compiler.reset()


class Replayed(graphs.Graphs):
    """Its graphs are recorded runs that are run again: everything around a graph, without one."""

    recorded = 0

    def _record(self, run):
        self.recorded += 1
        outputs = run()

        def replay():
            for output, value in zip(outputs, run(), strict=True):
                output.copy_(value)

        return outputs, replay


@torch.no_grad()
def test_graphs_are_kept_by_padded_shape_and_results_are_their_own(monkeypatch):
    monkeypatch.setattr(graphs, "suits", lambda generator, condition: True)
    generator = make(small())
    kept = generator.graphs = Replayed()
    conditions = [random_condition(small(), n, CPU, torch.float32) for n in (9, 9, 6, 32, 34)]
    conditions[1] = Condition({n: t * 2 for n, t in conditions[1].parts.items()}, fingerprint="x")
    seen = []
    results = [
        graphs.generate(generator, condition, lambda *done: seen.append(done))
        for condition in conditions
    ]
    # two parts of 4 to 5 tokens each are padded to 16, those of 16 as they are, those of 17 to 32
    assert kept.recorded == 3
    assert seen == [(2, 2)] * 5
    for condition, lora in zip(conditions, results, strict=True):
        expected = generator(condition)
        assert lora.provenance == expected.provenance
        for key, value in expected.factors.items():
            torch.testing.assert_close(lora.factors[key], value, rtol=1e-4, atol=1e-5)

    def follows() -> None:
        torch.testing.assert_close(
            graphs.generate(generator, conditions[0])["d.0.qkv"].A,
            generator(conditions[0])["d.0.qkv"].A,
        )

    generator.model.hw_pos[0].weight.mul_(1.5)  # the prefix is another one
    follows()
    assert kept.recorded == 4
    feed_forward = generator.model.blocks[1].feed_forward
    feed_forward.fc1.weight = nn.Parameter(feed_forward.fc1.weight * 1.5, requires_grad=False)
    follows()
    assert kept.recorded == 5
    feed_forward.fc2.weight.data = feed_forward.fc2.weight * 2  # as ComfyUI moves weights
    follows()
    assert kept.recorded == 6
    for n in range(1, 1 + graphs.GRAPHS):
        graphs.generate(generator, random_condition(small(), 64 * n, CPU, torch.float32))
    assert len(kept._graphs) == graphs.GRAPHS
    generator.to(torch.float64)
    assert generator.graphs is None


@torch.no_grad()
def test_a_mask_of_the_condition_goes_into_the_graph(monkeypatch):
    monkeypatch.setattr(graphs, "suits", lambda generator, condition: True)
    generator = make(small())
    generator.graphs = Replayed()
    condition = random_condition(small(), 9, CPU, torch.float32)
    masks = [torch.rand(1, condition.parts["b"].shape[1]) > share for share in (0.3, 0.8)]
    for mask in masks:
        mask[:, 0] = True
        given = Condition(condition.parts, {"b": mask})
        for key, value in generator(given).factors.items():
            made = graphs.generate(generator, given).factors[key]
            torch.testing.assert_close(made, value, rtol=1e-4, atol=1e-5)
    assert generator.graphs.recorded == 1


def test_lengths_fall_into_few_buckets():
    assert [graphs.bucket(n) for n in (1, 16, 17, 64, 65, 129)] == [16, 16, 32, 64, 128, 192]


def test_without_cuda_the_generator_is_called_as_it_is():
    generator = make(small())
    condition = random_condition(small(), 9, CPU, torch.float32)
    assert not graphs.suits(generator, condition)
    seen = []
    with torch.no_grad():
        lora = graphs.generate(generator, condition, lambda *done: seen.append(done))
        assert torch.equal(lora["s.1.linear1"].B, generator(condition)["s.1.linear1"].B)
    assert seen == [(1, 2), (2, 2)]


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_sublayers_that_take_turns_on_chunks_compute_the_same(monkeypatch, masked):
    """The order of the loop, in plain torch; test_speed_kernels.py has it with the kernels, in fp8."""
    generator = make(small(num_blocks=3))
    for name, parameter in generator.named_parameters():  # biases are zero at first
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    parts = random_condition(small(), 9, CPU, torch.float32).parts
    parts = {name: torch.cat([tokens, -tokens]) for name, tokens in parts.items()}
    mask = torch.ones(parts["b"].shape[:2], dtype=torch.bool)
    mask[0, 1:] = False
    condition = Condition(parts, {"b": mask} if masked else {})
    expected = generator.generate_grids(condition)
    added = []
    own = passes.Passes.add_norm
    monkeypatch.setattr(passes.Passes, "takes_turns", lambda *arguments: True)
    monkeypatch.setattr(
        passes.Passes, "add_norm", lambda *args: (added.append(args[2].shape[1]), own(*args))[1]
    )
    for chunk_bytes, cut in ((None, {2, 3}), (1, {1})):
        generator.chunk_bytes = chunk_bytes
        generator.forget()
        added.clear()
        made = generator.generate_grids(condition)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
        assert set(added) == cut


def test_attention_takes_no_more_sequences_than_a_grid_has(monkeypatch):
    generator = make(small())
    condition = random_condition(small(), 9, CPU, torch.float32)
    expected = grids(generator, condition)
    batches = []
    attention = passes.attention

    def watched(q, k, v, *others):
        batches.append(q.shape[0])
        return attention(q, k, v, *others)

    monkeypatch.setattr(passes, "attention", watched)
    monkeypatch.setattr(passes, "MOST_SEQUENCES", 2)
    generator.forget()
    torch.testing.assert_close(grids(generator, condition), expected)
    assert max(batches) == 2


# -- residence ------------------------------------------------------------------------------------


def test_runs_are_equal():
    for dtype in (torch.float32, torch.bfloat16):
        condition = random_condition(small(), 9, CPU, dtype)
        generator = make(small(), dtype=dtype)
        runs = [grids(generator, condition) for _ in range(3)]
        fresh = grids(make(small(), dtype=dtype), condition)
        for run in (*runs[1:], fresh):
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="waiting for a device is detected by CUDA alone"
)
@pytest.mark.parametrize("how", ["plain", "masked", "offloaded", "graph", "fp8"])
def test_the_path_to_an_applied_lora_never_waits_for_the_device(how):
    device = torch.device("cuda")
    base = nn.ModuleDict(
        {"b": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(64, 64)}) for _ in "ab")}
    )
    base.to(device)
    config = GeneratorConfig(LoRALayout.of(base, 4), {"a": 16}, 16, 2, 64, 16, 4)
    generator = make(config, "cuda", torch.bfloat16 if how == "fp8" else torch.float32)
    tokens = torch.randn(2, 9, 16, device=device, dtype=generator.model.norm_input.weight.dtype)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    condition = Condition({"a": tokens}, {"a": mask} if how == "masked" else {})
    if how == "fp8":
        to_fp8(generator)
    if how == "offloaded":
        generator.memory_budget = 1 << 40
        plan = generator.memory_plan(2, 9)
        generator.memory_budget = plan.total_bytes - plan.block_bytes
    generate = partial(graphs.generate, generator) if how == "graph" else generator
    x = torch.randn(2, 3, 64, device=device)
    with torch.no_grad():
        for attempt in range(3):
            # the first call builds kernels and tables, moves weights, records the graph
            torch.cuda.set_sync_debug_mode("error" if attempt else "default")
            try:
                lora = generate(condition)
                with inject(base, lora.to(dtype=torch.float32)):
                    y = base["b"][1]["fc"](base["b"][0]["fc"](x))
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert y.isfinite().all()
    assert generator.residency.offloaded == (how == "offloaded")
