"""The generator: golden vectors of the official one, its extensions, its gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hywu_core import (
    Condition,
    GeneratorConfig,
    HYWUError,
    LoRALayout,
    ParameterGenerator,
    inject,
    load_generator,
)
from hywu_core.generator.official import read_config
from hywu_core.generator.rope import axis_table, rotate
from hywu_core.layout import Module, Stack

GOLDEN = Path(__file__).parent / "golden"
CASES = ["dense", "ragged", "moe", "long"]
MODES = {
    "fp32": (torch.float32, "float32", 1e-5),
    "fp32_bf16_rope": (torch.float32, "bfloat16", 1e-5),
    "bf16": (torch.bfloat16, "bfloat16", 2e-2),
}


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    value, expected = value.detach().float(), expected.float()
    return ((value - expected).norm() / expected.norm()).item()


def worst(lora, expected: dict, prefix: str) -> float:
    keys = {key for key in expected if key.startswith(f"{prefix}/") and "lora_" in key}
    seen = {f"{prefix}/{path}.lora_{side}" for path in lora for side in "AB"}
    assert keys == seen
    return max(
        relative(getattr(pair, side), expected[f"{prefix}/{path}.lora_{side}"])
        for path, pair in lora.items()
        for side in "AB"
    )


def two_stack_config(**changes) -> GeneratorConfig:
    layout = LoRALayout(
        (
            Stack(("double.0", "double.1"), (Module("qkv", 24, 72), Module("proj", 24, 24))),
            Stack(("single.0", "single.1", "single.2"), (Module("linear1", 24, 100),)),
        ),
        rank=4,
        alpha=8.0,
    )
    values = {
        "layout": layout,
        "condition": {"vision": 12, "text": 20},
        "token_dim": 16,
        "dim_accumulation": 2,
        "d_model": 32,
        "head_dim": 8,
        "num_blocks": 2,
        **changes,
    }
    return GeneratorConfig(**values)


def random_generator(config: GeneratorConfig, seed: int = 0) -> ParameterGenerator:
    torch.manual_seed(seed)
    generator = ParameterGenerator(config)
    generator.reset_parameters()
    nn.init.normal_(generator.model.proj_out_B.weight, std=0.1)
    return generator.eval()


def two_part_condition(batch: int = 3, seed: int = 1, pad: int = 0) -> Condition:
    rng = torch.Generator().manual_seed(seed)
    parts = {
        "vision": torch.randn(batch, 5, 12, generator=rng),
        "text": torch.randn(batch, 7, 20, generator=rng),
    }
    if not pad:
        return Condition(parts)
    padded, masks = {}, {}
    for name, tokens in parts.items():
        rubbish = torch.full((batch, pad, tokens.shape[2]), float("nan"))
        padded[name] = torch.cat([tokens, rubbish], dim=1)
        masks[name] = torch.arange(tokens.shape[1] + pad).expand(batch, -1) < tokens.shape[1]
    return Condition(padded, masks)


# -- golden vectors -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("autograd", [False, True])
def test_agrees_with_the_official_generator(case, mode, autograd):
    dtype, rope, tolerance = MODES[mode]
    expected = load_file(GOLDEN / case / "expected.safetensors")
    generator = load_generator(GOLDEN / case, dtype=dtype, rope_precision=rope)
    generator.requires_grad_(autograd)
    with torch.set_grad_enabled(autograd):
        lora = generator(expected["condition"])
    assert worst(lora, expected, mode) < tolerance
    assert lora.scale == expected[f"{mode}/scale"].item()
    if mode == "bf16":
        for path, pair in lora.items():
            for side in "AB":
                key = f"{path}.lora_{side}"
                precise = expected[f"fp32_bf16_rope/{key}"]
                ours = relative(getattr(pair, side), precise)
                assert ours <= 1.5 * relative(expected[f"bf16/{key}"], precise)


@pytest.mark.parametrize("case", CASES)
def test_official_checkpoints_run_with_bfloat16_tables_unless_told(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    generator = load_generator(GOLDEN / case)
    with torch.no_grad():
        assert worst(generator(expected["condition"]), expected, "fp32_bf16_rope") < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_batch_permuted_padded_and_masked(case, mode):
    dtype, rope, tolerance = MODES[mode]
    expected = load_file(GOLDEN / case / "expected.safetensors")
    generator = load_generator(GOLDEN / case, dtype=dtype, rope_precision=rope)
    tokens = expected["condition"]
    batch = torch.cat([tokens, tokens.flip(1), tokens])
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))
    pad = torch.full((len(batch), 6, tokens.shape[2]), float("nan"))
    front = torch.arange(tokens.shape[1] + 6).expand(len(batch), -1) >= 6
    behind = front.flip(1)
    with torch.no_grad():
        reference = generator(batch)
        permuted = generator(batch[order])
        others = [permuted.select(order.argsort())]
        for padded, mask in (
            (torch.cat([batch, pad], 1), behind),
            (torch.cat([pad, batch], 1), front),
        ):
            masked = Condition({"hidden_states": padded}, {"hidden_states": mask})
            others.append(generator(masked))
    for lora in (reference, *others):
        # the first and the last items are those of the golden case
        for items in (slice(0, len(tokens)), slice(-len(tokens), None)):
            assert worst(lora.select(items), expected, mode) < tolerance
    for lora in others:
        for key, value in reference.factors.items():
            assert relative(lora.factors[key], value) < tolerance


# -- beyond the official architecture -----------------------------------------------------------


def test_several_stacks_and_parts_in_batches():
    generator = random_generator(two_stack_config())
    condition = two_part_condition()
    with torch.no_grad():
        lora = generator(condition)
        assert set(lora) == {t.path for t in generator.config.layout.targets()}
        assert lora["single.2.linear1"].B.shape == (3, 100, 4)
        for i in range(3):
            alone = generator(condition.select(i))
            for key, value in lora.factors.items():
                torch.testing.assert_close(value[i : i + 1], alone.factors[key])
        assert not torch.allclose(lora["double.0.qkv"].A[0], lora["double.0.qkv"].A[1])


def test_masked_parts_equal_unpadded_ones():
    generator = random_generator(two_stack_config())
    with torch.no_grad():
        plain = generator(two_part_condition())
        padded = generator(two_part_condition(pad=4))
    for key, value in plain.factors.items():
        torch.testing.assert_close(padded.factors[key], value)


def test_masked_tokens_of_one_item_are_left_out_where_nobody_waits():
    generator = random_generator(two_stack_config())
    with torch.no_grad():
        plain = generator(two_part_condition(batch=1))
        padded = generator(two_part_condition(batch=1, pad=4))
        nothing = two_part_condition(batch=1)
        masks = {"text": torch.zeros(1, 7, dtype=torch.bool)}
        without = generator(Condition(nothing.parts, masks))
        other = Condition({**nothing.parts, "text": torch.randn(1, 7, 20)}, masks)
        still = generator(other)
    for key, value in plain.factors.items():
        assert torch.equal(padded.factors[key], value)
        assert torch.equal(without.factors[key], still.factors[key])


def test_condition_of_length_one():
    generator = load_generator(GOLDEN / "dense")
    tokens = torch.randn(2, 1, 48)
    with torch.no_grad():
        one = generator(tokens)
        # attention to two equal tokens is attention to one of them, wherever they stand
        twice = generator(tokens.repeat(1, 2, 1))
    for key, value in one.factors.items():
        torch.testing.assert_close(twice.factors[key], value)


def test_output_is_views_of_one_buffer_a_stack():
    generator = load_generator(GOLDEN / "dense")
    with torch.no_grad():
        lora = generator(torch.randn(1, 4, 48))
    pointers = {value.untyped_storage().data_ptr() for value in lora.factors.values()}
    assert pointers == {lora.grids[0].untyped_storage().data_ptr()}


def test_inference_equals_autograd_whatever_the_chunks():
    generator = random_generator(two_stack_config(lora_b_scale=0.5))
    condition = two_part_condition()
    graph = generator(condition)
    assert graph["double.0.qkv"].A.requires_grad
    assert not generator.prefixes.found  # a kept one would cut the graph
    for chunk_bytes in (1, 600, 5000, None):
        generator.chunk_bytes = chunk_bytes
        with torch.no_grad():
            lora = generator(condition)
        for key, value in graph.factors.items():
            torch.testing.assert_close(lora.factors[key], value.detach())


def test_inference_under_autocast_is_that_of_training_under_it():
    generator, condition = random_generator(two_stack_config()), two_part_condition()
    with torch.autocast("cpu", torch.bfloat16):
        trained = generator(condition)
        with torch.no_grad():
            inferred = generator(condition)
    for path in trained:
        for side in "AB":
            one, other = (getattr(lora[path], side) for lora in (inferred, trained))
            assert relative(one, other) < 2e-2, (path, side)


def test_prefix_cache_follows_the_weights():
    generator = random_generator(two_stack_config())
    condition = two_part_condition(batch=1)
    with torch.no_grad():
        before = generator(condition)
        assert generator.prefixes.found
        again = generator(condition)
        generator.model.hw_pos[0].weight.mul_(1.5)
        changed = generator(condition)
        generator.prefixes.clear()
        fresh = generator(condition)
    for key, value in before.factors.items():
        assert torch.equal(again.factors[key], value)
        assert torch.equal(fresh.factors[key], changed.factors[key])
    assert not torch.equal(changed.factors[0, 0, "A"], before.factors[0, 0, "A"])


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        generator = random_generator(two_stack_config())
        generator.checkpointing = checkpointing
        lora = generator(two_part_condition())
        sum(value.square().sum() for value in lora.factors.values()).backward()
        grads.append([p.grad for p in generator.parameters()])
    assert all(g is not None for g in grads[0])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_compiles():
    generator = random_generator(two_stack_config())
    condition = two_part_condition()
    compiled = torch.compile(generator.generate_grids, backend="aot_eager")
    with torch.no_grad():
        expected = generator.generate_grids(condition)
        for value, reference in zip(compiled(condition), expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


def test_compiles_with_gradients():
    gradients = []
    for compiled in (False, True):
        generator = random_generator(two_stack_config(num_blocks=1))
        run = generator.generate_grids
        if compiled:
            run = torch.compile(run, backend="aot_eager")
        sum(grid.square().sum() for grid in run(two_part_condition(batch=1))).backward()
        gradients.append([p.grad for p in generator.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_progress_and_interruption():
    generator = random_generator(two_stack_config())
    seen = []
    with torch.no_grad():
        generator(two_part_condition(), on_block=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 2), (2, 2)]

        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generator(two_part_condition(), on_block=stop)
        assert bool(generator(two_part_condition()).is_finite())


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(6, 6)}) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block["fc"](x))
        return x


def test_gradcheck_through_injection():
    base = Toy().double().requires_grad_(False)
    layout = LoRALayout.of(base, rank=2)
    config = GeneratorConfig(layout, {"c": 4}, 4, 2, 8, 4, 1)
    generator = random_generator(config).double()
    condition = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    x = torch.randn(2, 5, 6, dtype=torch.double)
    names, parameters = zip(*generator.named_parameters(), strict=True)

    def run(condition, *values):
        with torch.nn.utils.parametrize.cached():
            lora = torch.func.functional_call(
                generator, dict(zip(names, values, strict=True)), (condition,)
            )
        with inject(base, lora, strength=0.7):
            return base(x)

    assert torch.autograd.gradcheck(run, (condition, *parameters), fast_mode=True)


# -- parts ----------------------------------------------------------------------------------------


def test_bfloat16_tables_collapse_positions_as_published():
    table = axis_table(1379, 64, "bfloat16", torch.device("cpu"))
    positions = torch.arange(1379, dtype=torch.float32).bfloat16()
    assert positions.unique().numel() == 557
    assert table.flatten(1).unique(dim=0).shape[0] <= 557


def test_rotation_matches_the_matrix():
    table = axis_table(7, 8, "float32", torch.device("cpu"), offset=3)
    x = torch.randn(7, 8)
    cos, sin = table.unbind(-1)
    matrix = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    expected = (matrix @ x.view(7, 4, 2, 1)).view(7, 8)
    torch.testing.assert_close(rotate(x, table), expected)


def test_default_size_counts_as_published():
    experts = {"lora_A_dim": 4096, "lora_B_dim": 3072}
    config = read_config(
        {
            "model_type": "parameter_generator",
            "token_dim": 1024,
            "rank": 16,
            "alpha": 64,
            "input_dim": 4096,
            "dim_accumulation": 4,
            "d_model": 4096,
            "head_dim": 128,
            "num_base_model_layers": 32,
            "output_dim": 1024,
            "num_pg_layers": 24,
            "prefix": "model.layers.",
            "pg_mapping": {
                "self_attn.qkv_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
                "self_attn.o_proj": {"lora_A_dim": 4096, "lora_B_dim": 4096},
                "mlp.shared_mlp.gate_and_up_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
                "mlp.shared_mlp.down_proj": {"lora_A_dim": 3072, "lora_B_dim": 4096},
                "mlp.experts": {
                    "type": "grouped",
                    "num_experts": 64,
                    "sub_weights": {
                        "w1": experts,
                        "w2": {"lora_A_dim": 3072, "lora_B_dim": 4096},
                        "w3": experts,
                    },
                },
            },
        }
    )
    grid = config.grids[0]
    assert (grid.num_a_tokens, grid.num_tokens) == (719, 1379)
    assert config.num_positions == 176_512
    assert config.layout.num_values == 722_993_152
    assert config.flops(4000) == pytest.approx(3.229e15, rel=2e-3)
    with torch.device("meta"):
        generator = ParameterGenerator(config)
    assert sum(p.numel() for p in generator.parameters()) == 8_096_647_168


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim_accumulation": 3}, "rank 4 must be divisible by dim_accumulation 3"),
        ({"head_dim": 12}, "d_model 32 must be divisible by head_dim 12"),
        ({"head_dim": 2}, "head_dim 2 must be divisible by 4"),
        ({"rope_precision": "float16"}, "rope_precision 'float16' is unknown"),
        ({"condition": {}}, "at least one condition part"),
        ({"num_blocks": 0}, "num_blocks is 0"),
    ],
)
def test_wrong_numbers_are_named(changes, words):
    with pytest.raises(HYWUError, match=words):
        two_stack_config(**changes)


def test_wrong_conditions_are_named():
    generator = random_generator(two_stack_config())
    with pytest.raises(HYWUError, match=r"vision \(13 wide\).*takes vision \(12 wide\)"):
        generator(Condition({"vision": torch.randn(1, 2, 13), "text": torch.randn(1, 2, 20)}))
    with pytest.raises(HYWUError, match="no zero among them"):
        generator(torch.randn(1, 0, 12))
    tokens = {"vision": torch.randn(1, 2, 12), "text": torch.full((1, 2, 20), float("nan"))}
    lora = generator(Condition(tokens))
    with pytest.raises(HYWUError, match="not finite"):
        lora.check_finite()
