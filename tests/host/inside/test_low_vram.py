"""A generator short of memory inside ComfyUI: precision, the estimate, and weights that are offloaded.

Memory runs out where the test says so: the exception of CUDA's allocator is raised in the middle of a
block, or while weights are loaded.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from hywu_nodes.hywu_core.condition import Condition
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.generator.checkpoints import load_generator, save_generator
from hywu_nodes.hywu_core.generator.config import GeneratorConfig
from hywu_nodes.hywu_core.generator.model import ParameterGenerator
from hywu_nodes.hywu_core.generator.speed import ahead
from hywu_nodes.hywu_core.generator.speed.fp8 import quantize_rows
from hywu_nodes.hywu_core.layout import LoRALayout, Module, Stack
from hywu_nodes.nodes.host import generators, operations, paths
from hywu_nodes.nodes.host.cache import CACHE
from utils.extra_config import load_extra_path_config

from bench.measure import peak_memory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Six blocks that outweigh everything else; half of each block's file is its feed-forward.

    It lies in a folder of the user's own, which main.py reads before the nodes are imported.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    listed = folder / "extra_model_paths.yaml"
    listed.write_text(f"elsewhere:\n  base_path: {folder}\n  hywu: generators\n", encoding="utf-8")
    before = dict(folder_paths.folder_names_and_paths)
    load_extra_path_config(str(listed))
    paths.register()
    folder_paths.filename_list_cache.clear()
    modules = (Module("qkv", 64, 192), Module("proj", 64, 64))
    layout = LoRALayout((Stack(tuple(f"b.{i}" for i in range(4)), modules),), 4, 4.0)
    config = GeneratorConfig(
        layout, {"hidden_states": 24}, 16, 2, 256, 32, 6, base="none", encoder={"type": "comfyui"}
    )
    torch.manual_seed(0)
    made = ParameterGenerator(config)
    made.reset_parameters()
    torch.nn.init.normal_(made.model.proj_out_B.weight, std=0.02)
    (folder / "generators").mkdir()
    yield save_generator(made, folder / "generators" / "short_of_memory.safetensors")
    folder_paths.folder_names_and_paths.update(before)


@pytest.fixture
def made(checkpoint):
    return generators.load(checkpoint.name, "float32")


def tokens(batch: int = 2, seed: int = 1) -> Condition:
    return Condition.of(torch.randn(batch, 7, 24, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def generate(call):
    """All values of the LoRA, through the node, from scratch."""

    def run(made, condition=None) -> torch.Tensor:
        CACHE._kept.clear()
        lora = call.HYWUGenerateLoRA(made, condition or tokens())[0]
        return torch.cat([factor.flatten() for path in lora for factor in lora[path]]).float()

    return run


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


def test_a_folder_of_extra_model_paths_is_listed(nodes, checkpoint):
    listed = nodes["HYWULoadGenerator"].INPUT_TYPES()["required"]["checkpoint"][0]
    assert listed[0] == "bundled"
    assert checkpoint.name in listed


@pytest.mark.parametrize("where", ["block", "load"])
def test_out_of_memory_once_streams_and_gives_the_same_lora(made, generate, caplog, where):
    expected = generate(made)
    with trouble(made, 1, where), caplog.at_level(logging.WARNING):
        assert torch.equal(generate(made), expected)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    (said,) = [text for text in warnings if text.startswith("HY-WU")]
    assert "offloaded to host memory" in said
    # nothing but norms and embeddings was on the device; ComfyUI marks the layers that it leaves
    layers = [m for m in made.patcher.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) > 30
    assert all(hasattr(layer, "prev_comfy_cast_weights") for layer in layers)
    assert made.patcher.loaded_size() < 0.02 * made.patcher.model_size()
    # the next generation is an ordinary one
    assert torch.equal(generate(made), expected)
    assert made.patcher.loaded_size() == made.patcher.model_size()


def test_out_of_memory_twice_is_an_error_that_says_what_to_do(made, generate):
    expected = generate(made)
    with trouble(made, 2, "block"), pytest.raises(HYWUError, match="fewer images") as caught:
        generate(made)
    assert "even with the generator's weights offloaded" in str(caught.value)
    assert torch.equal(generate(made), expected)


def test_other_errors_are_not_tried_again(made, generate, caplog):
    with trouble(made, 1, "block", RuntimeError), pytest.raises(RuntimeError, match="other"):
        generate(made)
    assert "offloaded" not in caplog.text


@pytest.mark.parametrize(
    ("precision", "share", "most"),
    [
        ("float32", 1, 0),
        ("bfloat16", 0.5, 0.03),
        ("float16", 0.5, 0.005),
        ("fp8-weights", 0.25, 0.06),
    ],
)
def test_a_precision_has_its_bytes_and_its_error(
    made, checkpoint, generate, precision, share, most
):
    exact = generate(made)
    other = generators.load(checkpoint.name, precision)
    assert abs(other.patcher.model_size() / made.patcher.model_size() - share) < 0.02
    error = float((generate(other) - exact).norm() / exact.norm())
    assert error <= most
    assert (error > 0) == (most > 0)


def test_results_of_one_precision_are_never_taken_for_anothers(nodes, checkpoint):
    choices = nodes["HYWULoadGenerator"].INPUT_TYPES()["required"]["precision"][0]
    assert set(choices) == {"auto", "float32", "bfloat16", "float16", "fp8-weights"}
    loaded = [generators.load(checkpoint.name, choice) for choice in choices if choice != "auto"]
    assert len({made.identity for made in loaded}) == 4


def test_rounded_weights_are_cast_back_exactly(checkpoint, generate):
    """fp8-weights against the engine on weights that were rounded and cast back beforehand."""
    plain = load_generator(checkpoint)
    with torch.no_grad():
        for block in plain.model.blocks:
            for linear in (m for m in block.modules() if isinstance(m, torch.nn.Linear)):
                values, scale = quantize_rows(linear.weight)
                linear.weight.copy_(values.float() * scale)
        lora = plain(tokens())
    expected = torch.cat([factor.flatten() for path in lora for factor in lora[path]]).float()
    rounded = generators.load(checkpoint.name, "fp8-weights")
    assert torch.equal(generate(rounded), expected)
    with trouble(rounded, 1, "block"):
        assert torch.equal(generate(rounded), expected)
    stored = rounded.patcher.model.model.blocks[2].feed_forward.fc1.weight
    assert stored.dtype == torch.float8_e4m3fn


def test_what_is_cast_for_one_layer_is_given_back_after_its_use(monkeypatch):
    """So that ComfyUI may copy the next weight beside it, on a stream that knows when this one was read."""
    given, own = [], operations.comfy.ops.uncast_bias_weight

    def back(layer, weight, bias, stream):
        given.append((type(layer), weight))
        return own(layer, weight, bias, stream)

    monkeypatch.setattr(operations.comfy.ops, "uncast_bias_weight", back)
    x, ids = torch.randn(1, 4, 3, 3), torch.tensor([1, 0])
    layers = [
        (operations.Linear(3, 5), x, lambda w, b: torch.nn.functional.linear(x, w, b)),
        (operations.Conv2d(4, 2, 1), x, lambda w, b: torch.nn.functional.conv2d(x, w, b)),
        (operations.Embedding(2, 4), ids, lambda w, b: torch.nn.functional.embedding(ids, w)),
    ]
    with torch.no_grad():
        for layer, value, plain in layers:
            torch.nn.init.normal_(layer.weight)
            layer.weight_function = [lambda weight: 2 * weight]  # as a patch of ComfyUI's
            expected = plain(2 * layer.weight, layer.bias)
            torch.testing.assert_close(layer(value), expected)
            (((kind, weight),), given) = (given, [])
            assert kind is type(layer)
            torch.testing.assert_close(weight, 2 * layer.weight)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8-weights"])
def test_offloaded_weights_are_copied_one_sublayer_ahead(
    checkpoint, generate, monkeypatch, precision
):
    """Every layer counts as offloaded, and its copy as one on a device: the same LoRA, bit for bit."""
    made = generators.load(checkpoint.name, precision)
    expected = generate(made)
    monkeypatch.setattr(operations.Linear, "_ready", lambda layer, like: False)
    monkeypatch.setattr(operations, "copies_ahead", lambda layer, like: True)
    monkeypatch.setattr(ahead, "_is_missing", lambda value, device: True)
    fetched, fetch = [], ahead._Slot.fetch

    def counted(slot, group, layers, side):
        fetched.append(group)
        return fetch(slot, group, layers, side)

    monkeypatch.setattr(ahead._Slot, "fetch", counted)
    layers = [m for m in made.patcher.model.modules() if isinstance(m, operations.Linear)]
    for _ in range(2):
        fetched.clear()
        assert torch.equal(generate(made), expected)
        # the prefix is kept from before: neither attention of the first block's that it holds is copied
        assert fetched == list(range(2, 4 * 6))
    assert all(layer.ahead is None for layer in layers)


def test_the_memory_manager_is_told_what_a_generation_needs(made, generate, monkeypatch):
    told, original = [], mm.load_models_gpu
    monkeypatch.setattr(
        mm,
        "load_models_gpu",
        lambda models, memory_required=0, **more: (
            told.append(memory_required),
            original(models, memory_required=memory_required, **more),
        ),
    )
    condition = tokens(8)
    generate(made, condition)
    made.patcher.model.forget()  # so that the prefix is made again, and counted
    with torch.no_grad():
        peak = peak_memory(lambda: made.patcher.model(condition))
    assert peak <= told[0] <= 4 * peak
