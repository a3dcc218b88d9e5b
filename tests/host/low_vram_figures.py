"""Run inside ComfyUI's tree by test_low_vram.py: a generator short of memory, figures as JSON.

Arguments: ComfyUI's tree, this extension's folder, a folder to write to. Memory runs out where the test
says so: the exception of CUDA's allocator is raised in the middle of a block, or while weights are loaded.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path

from inside_comfyui import ARGUMENTS, EXTENSION, error, load_as, load_nodes, show

# isort: split
import comfy.model_management as mm
import torch
from utils.extra_config import load_extra_path_config

FOLDER = Path(ARGUMENTS[0])
# a folder of the user's own, as main.py reads it before the nodes are imported
elsewhere = FOLDER / "extra_model_paths.yaml"
elsewhere.write_text(f"elsewhere:\n  base_path: {FOLDER}\n  hywu: generators\n")
load_extra_path_config(str(elsewhere))
NODES = load_nodes()
from hywu_nodes.hywu_core.condition import Condition  # noqa: E402
from hywu_nodes.hywu_core.generator.checkpoints import load_generator, save_generator  # noqa: E402
from hywu_nodes.hywu_core.generator.config import GeneratorConfig  # noqa: E402
from hywu_nodes.hywu_core.generator.model import ParameterGenerator  # noqa: E402
from hywu_nodes.hywu_core.generator.speed.fp8 import quantize_rows  # noqa: E402
from hywu_nodes.hywu_core.layout import LoRALayout, Module, Stack  # noqa: E402
from hywu_nodes.nodes.host import generators  # noqa: E402
from hywu_nodes.nodes.host.cache import CACHE  # noqa: E402

measure = load_as("measure", f"{EXTENSION}/bench/measure.py")


def checkpoint() -> Path:
    """Six blocks that outweigh everything else; half of each block's file is its feed-forward."""
    modules = (Module("qkv", 64, 192), Module("proj", 64, 64))
    layout = LoRALayout((Stack(tuple(f"b.{i}" for i in range(4)), modules),), 4, 4.0)
    config = GeneratorConfig(
        layout, {"hidden_states": 24}, 16, 2, 256, 32, 6, base="none", encoder={"type": "comfyui"}
    )
    torch.manual_seed(0)
    made = ParameterGenerator(config)
    made.reset_parameters()
    torch.nn.init.normal_(made.model.proj_out_B.weight, std=0.02)
    (FOLDER / "generators").mkdir()
    return save_generator(made, FOLDER / "generators" / "g.safetensors")


def tokens(batch: int = 2, seed: int = 1) -> Condition:
    rng = torch.Generator().manual_seed(seed)
    return Condition.of(torch.randn(batch, 7, 24, generator=rng))


class Warnings(logging.Handler):
    """Keeps the extension's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        generators.log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def generate(made, condition=None):
    """Through the node, from scratch."""
    CACHE._kept.clear()
    return NODES["HYWUGenerateLoRA"]().generate(made, condition or tokens())["result"][0]


def flat(lora) -> torch.Tensor:
    return torch.cat([f.flatten() for path in lora for f in lora[path]]).float()


@contextmanager
def trouble(made, times: int, where: str, problem: type[RuntimeError] = torch.OutOfMemoryError):
    """The first `times` attempts end in `problem`: in the fourth "block", or in "load"."""
    left = [times]

    def fail(*_) -> None:
        if left[0]:
            left[0] -= 1
            raise problem("CUDA out of memory." if problem is torch.OutOfMemoryError else "other")

    original = mm.load_models_gpu
    handles = []
    if where == "block":
        handles.append(made.patcher.model.model.blocks[3].register_forward_pre_hook(fail))
    else:
        mm.load_models_gpu = lambda *args, **kwargs: (fail(), original(*args, **kwargs))
    try:
        yield
    finally:
        mm.load_models_gpu = original
        for handle in handles:
            handle.remove()


def once(made, where: str) -> dict:
    """One failure, then what the second attempt gave and how it ran."""
    expected, said = flat(generate(made)), Warnings()
    with trouble(made, 1, where):
        lora = generate(made)
    # ComfyUI marks the layers that it leaves in host memory
    layers = [m for m in made.patcher.model.modules() if isinstance(m, torch.nn.Linear)]
    left = [m for m in layers if hasattr(m, "prev_comfy_cast_weights")]
    streamed = made.patcher.loaded_size()
    after = generate(made)
    generators.log.removeHandler(said)
    return {
        "same": torch.equal(flat(lora), expected),
        "after": torch.equal(flat(after), expected),
        "warnings": said.texts,
        "left_in_host_memory": len(left),
        "layers": len(layers),
        "loaded_while_streaming": streamed,
        "loaded_after": made.patcher.loaded_size(),
        "size": made.patcher.model_size(),
    }


def twice(made) -> dict:
    expected = flat(generate(made))
    with trouble(made, 2, "block"):
        text = error(lambda: generate(made))
    return {"error": text, "after": torch.equal(flat(generate(made)), expected)}


def other(made) -> dict:
    """An error that has nothing to do with memory: no second attempt, no warning."""
    said, text = Warnings(), ""
    with trouble(made, 1, "block", RuntimeError):
        try:
            generate(made)
        except RuntimeError as problem:
            text = str(problem)
    generators.log.removeHandler(said)
    return {"error": text, "warnings": said.texts}


def precisions(path: Path) -> dict:
    """Weights' bytes, and the LoRA's difference from float32's, for each choice of the widget."""
    node, found, exact = NODES["HYWULoadGenerator"], {}, None
    choices = node.INPUT_TYPES()["required"]["precision"][0]
    for name in ("float32", *(c for c in choices if c != "float32")):
        made = generators.load(path.name, name)
        lora = flat(generate(made))
        exact = lora if exact is None else exact
        found[name] = {
            "bytes": made.patcher.model_size(),
            "error": float((lora - exact).norm() / exact.norm()),
            "identity": made.identity[1],
            "compute": str(made.dtype),
        }
    return found


def rounded(path: Path) -> dict:
    """fp8-weights against the engine on weights that were rounded and cast back beforehand."""
    plain = load_generator(path)
    with torch.no_grad():
        for block in plain.model.blocks:
            for linear in (m for m in block.modules() if isinstance(m, torch.nn.Linear)):
                values, scale = quantize_rows(linear.weight)
                linear.weight.copy_(values.float() * scale)
        expected = flat(plain(tokens()))
    made = generators.load(path.name, "fp8-weights")
    before = flat(generate(made))
    with trouble(made, 1, "block"):
        streamed = flat(generate(made))
    return {
        "same": torch.equal(before, expected),
        "streamed": torch.equal(streamed, expected),
        "dtype": str(made.patcher.model.model.blocks[2].feed_forward.fc1.weight.dtype),
    }


def estimate(made) -> dict:
    """What the memory manager is told, beside the measured peak of the same call."""
    told, original = [], mm.load_models_gpu
    mm.load_models_gpu = lambda models, memory_required=0, **more: (
        told.append(memory_required),
        original(models, memory_required=memory_required, **more),
    )
    condition = tokens(8)
    generate(made, condition)
    mm.load_models_gpu = original
    made.patcher.model.forget()  # so that the prefix is made again, and counted
    with torch.no_grad():
        peak = measure.peak_memory(lambda: made.patcher.model(condition))
    return {"told": told, "peak": peak}


path = checkpoint()
made = generators.load(path.name, "float32")
show({
    "listed": NODES["HYWULoadGenerator"].INPUT_TYPES()["required"]["checkpoint"][0],
    "block": once(made, "block"),
    "load": once(made, "load"),
    "twice": twice(made),
    "other": other(made),
    "precisions": precisions(path),
    "rounded": rounded(path),
    "estimate": estimate(made),
})  # fmt: skip
