"""Generators to measure: the official size, without experts, Flux-size, bundled, the CPU's; random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hywu_core import Condition, GeneratorConfig, LoRALayout, ParameterGenerator
from hywu_core.layout import Module, Stack


@dataclass(frozen=True)
class Size:
    """One size: how it is made, the condition's length in all, and how much time it may take.

    share: part of the time left that it may use.
    least_s: with less left a variant isn't begun.
    """

    words: str
    config: Callable[[], GeneratorConfig]
    condition_tokens: int
    target: str
    share: float
    least_s: float

    def tiny(self) -> Size:
        """The same stacks, modules and condition parts, almost no width, layers or blocks."""
        return replace(self, config=lambda: shrunk(self.config()), condition_tokens=10, least_s=0.1)

    def shortened(self, num_blocks: int) -> Size:
        """The same with so many blocks; every block asks for the same."""
        return replace(self, config=lambda: self.config().with_(num_blocks=num_blocks))


def shrunk(config: GeneratorConfig) -> GeneratorConfig:
    stacks = []
    for stack in config.layout.stacks:
        modules = tuple(
            Module(m.name, 32, 48, min(2, m.num_experts), m.conv) for m in stack.modules
        )
        stacks.append(Stack(stack.layers[:2], modules))
    rank = config.layout.rank
    layout = LoRALayout(tuple(stacks), rank, config.layout.alpha)
    acc = config.dim_accumulation
    return config.with_(
        layout=layout,
        condition=dict.fromkeys(config.condition, 24),
        token_dim=16,
        d_model=64 if 64 % acc == 0 else 64 * acc,
        head_dim=16,
        num_blocks=2,
    )


def cpu_config() -> GeneratorConfig:
    """8 layers x 80 tokens of 16 x 128: four modules whose A and B take ten tokens each."""
    modules = tuple(Module(name, 1280, 1280) for name in ("qkv", "proj", "up", "down"))
    layers = tuple(f"layers.{i}" for i in range(8))
    layout = LoRALayout((Stack(layers, modules),), 16, 16.0)
    return GeneratorConfig(layout, {"hidden_states": 512}, 128, 4, 512, 64, 10)


def official_config() -> GeneratorConfig:
    """The published default: 8.1 billion parameters, 176,512 positions."""
    modules = (
        Module("self_attn.qkv_proj", 4096, 6144),
        Module("self_attn.o_proj", 4096, 4096),
        Module("mlp.shared_mlp.gate_and_up_proj", 4096, 6144),
        Module("mlp.shared_mlp.down_proj", 3072, 4096),
        Module("mlp.experts.w1", 4096, 3072, 64),
        Module("mlp.experts.w2", 3072, 4096, 64),
        Module("mlp.experts.w3", 4096, 3072, 64),
    )
    layers = tuple(f"model.layers.{i}" for i in range(32))
    layout = LoRALayout((Stack(layers, modules),), 16, 64.0)
    return GeneratorConfig(layout, {"hidden_states": 4096}, 1024, 4, 4096, 128, 24, "bfloat16")


def reduced(num_blocks: int = 8) -> GeneratorConfig:
    """Small enough for float64, large enough that rounding adds up as at full size."""
    modules = (Module("qkv", 512, 768), Module("proj", 512, 512), Module("experts.w1", 256, 512, 4))
    layout = LoRALayout((Stack(tuple(f"model.layers.{i}" for i in range(4)), modules),), 16, 64.0)
    return GeneratorConfig(layout, {"hidden_states": 128}, 128, 4, 256, 64, num_blocks, "bfloat16")


def dense_config() -> GeneratorConfig:
    """The official generator with the experts left out of its targets: 4,480 positions."""
    config = official_config()
    (stack,) = config.layout.stacks
    dense = Stack(stack.layers, tuple(m for m in stack.modules if not m.num_experts))
    return config.with_(layout=LoRALayout((dense,), 16, 64.0))


def flux_config() -> GeneratorConfig:
    """19 double and 38 single blocks of Flux at full width, a generator of 12 blocks, d_model 1024."""
    width, hidden = 3072, 12288
    double = tuple(
        module
        for side in ("img", "txt")
        for module in (
            Module(f"{side}_attn.qkv", width, 3 * width),
            Module(f"{side}_attn.proj", width, width),
            Module(f"{side}_mlp.0", width, hidden),
            Module(f"{side}_mlp.2", hidden, width),
        )
    )
    single = (
        Module("linear1", width, 3 * width + hidden),
        Module("linear2", width + hidden, width),
    )
    stacks = (
        Stack(tuple(f"double_blocks.{i}" for i in range(19)), double),
        Stack(tuple(f"single_blocks.{i}" for i in range(38)), single),
    )
    layout = LoRALayout(stacks, 16, 16.0)
    return GeneratorConfig(layout, {"hidden_states": 4096}, 1024, 4, 1024, 128, 12)


def bundled_config() -> GeneratorConfig:
    """The bundled generator's, from its checkpoint; without one, what the experiment trains."""
    from hywu_core.bases.bundled.checkpoint import weights_folder
    from hywu_core.bases.bundled.model import Editor
    from hywu_core.bases.bundled.training import EditorBase
    from hywu_core.experiments.conflict.plan import ConflictPlan
    from hywu_core.experiments.conflict.runs import Runs
    from hywu_core.generator.checkpoints import open_checkpoint

    path = weights_folder() / "generator.safetensors"
    if path.is_file():
        return open_checkpoint(path).config
    base, plan = EditorBase(Editor()), ConflictPlan()
    runs = Runs(base, None, plan, path.parent)
    return runs.generator_config(plan.main_rank)


#: What a CPU can run at full size, with float32 weights.
CPU_SIZES = ("bundled", "engine")

#: The largest first: what it says is worth most where time is short.
SIZES = {
    "official": Size(
        "8.1 B parameters, 176,512 positions, condition 4,000", official_config, 4000,
        ">= 85 % of sustained matmul, 1.15x eager in bf16, 2x in fp8, peak <= 4 GB over the weights",
        0.85, 45,
    ),
    "official_dense": Size(
        "official, experts left out, condition 4,000", dense_config, 4000, "<= 200 ms", 0.3, 25
    ),
    "flux": Size(
        "19 double and 38 single blocks, d_model 1024, 12 blocks, condition 1,000",
        flux_config, 1000, "<= 25 ms", 0.15, 10,
    ),
    "bundled": Size(
        "the bundled editor's generator", bundled_config, 160, "<= 3 ms (graph)", 0.1, 5
    ),
    "engine": Size(
        "d_model 512, 10 blocks, 640 tokens, condition 1,000", cpu_config, 1000, "none", 0.1, 5
    ),
}  # fmt: skip


def make(config: GeneratorConfig, device: str = "cpu", dtype=torch.float32) -> ParameterGenerator:
    """A generator with random weights, made on the device."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            generator = ParameterGenerator(config)
    finally:
        torch.set_default_dtype(default)
    generator.reset_parameters()
    torch.nn.init.normal_(generator.model.proj_out_B.weight, std=0.02)
    return generator.requires_grad_(False).eval()


def random_condition(
    config: GeneratorConfig, tokens: int, device: torch.device, dtype: torch.dtype
) -> Condition:
    """`tokens` random tokens, spread evenly over the config's parts."""
    rng = torch.Generator(device).manual_seed(1)
    names, parts, left = list(config.condition), {}, tokens
    for i, name in enumerate(names):
        count = left // (len(names) - i)
        left -= count
        shape = (1, count, config.condition[name])
        parts[name] = torch.randn(
            shape, generator=rng, device=device, dtype=torch.float32
        ).to(dtype)  # fmt: skip
    return Condition(parts)
