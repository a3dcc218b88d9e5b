"""Which weights made a LoRA: a file in another's place, with its size, its times or its digest, is another one."""

from __future__ import annotations

import itertools
import os
import shutil

import pytest
import torch
from hywu_nodes.hywu_core.condition import Condition
from hywu_nodes.hywu_core.generator.checkpoints import save_generator
from hywu_nodes.hywu_core.generator.config import GeneratorConfig
from hywu_nodes.hywu_core.generator.model import ParameterGenerator
from hywu_nodes.hywu_core.layout import LoRALayout, Module, Stack


def config() -> GeneratorConfig:
    layout = LoRALayout((Stack(("blocks.0", "blocks.1"), (Module("fc", 32, 32),)),), 2, 2.0)
    return GeneratorConfig(layout, {"hidden_states": 8}, 16, 2, 256, 32, 4, base="tiny")


@pytest.fixture(scope="module")
def checkpoint(base):
    """12 MB, far more than the places that a checkpoint's digest looks at."""
    torch.manual_seed(0)
    made = ParameterGenerator(config())
    made.reset_parameters()
    torch.nn.init.normal_(made.model.proj_out_B.weight, std=0.3)
    return save_generator(made, base / "models" / "hywu" / "identity.safetensors", overwrite=True)


@pytest.fixture(scope="module")
def condition():
    return Condition.of(torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)))


def generated(call, name, condition):
    generator = call.HYWULoadGenerator(name, "float32")[0]
    return generator, call.HYWUGenerateLoRA(generator, condition)[0]


def negate_between_the_looks(path) -> None:
    """Turn the signs of all weights that lie between the 16 places, 256 KiB each, of the digest."""
    raw = bytearray(path.read_bytes())
    size, block = len(raw), 1 << 18
    looked = sorted({0, *((size - block) * i // 15 for i in range(16))})
    for start, end in itertools.pairwise(looked):
        for at in range(start + block + 3, end, 4):
            raw[at] ^= 0x80
    path.write_bytes(raw)


def test_a_lora_is_of_the_weights_that_were_loaded(call, checkpoint, condition, tmp_path):
    """Every value counts, also where the checkpoint's own digest doesn't look."""
    generator, lora = generated(call, checkpoint.name, condition)
    digest = generator.config.provenance["checkpoint"]["digest"]
    kept = shutil.copy2(checkpoint, tmp_path)
    negate_between_the_looks(checkpoint)
    try:
        other, another = generated(call, checkpoint.name, condition)
        assert other.config.provenance["checkpoint"]["digest"] == digest
        assert other.identity != generator.identity
        assert not torch.equal(another["blocks.0.fc"].B, lora["blocks.0.fc"].B)
        # and the former one still gives its own
        again = call.HYWUGenerateLoRA(generator, condition)[0]
        assert torch.equal(again["blocks.0.fc"].B, lora["blocks.0.fc"].B)
    finally:
        shutil.copy2(kept, checkpoint)


@pytest.mark.parametrize("way", ["over it", "in its place"])
def test_a_file_swapped_with_its_times_kept_is_loaded_anew(nodes, checkpoint, tmp_path, way):
    node = nodes["HYWULoadGenerator"]
    before, at = node.IS_CHANGED(checkpoint=checkpoint.name, precision="auto"), checkpoint.stat()
    kept = shutil.copy2(checkpoint, tmp_path)
    other = shutil.copy2(checkpoint, tmp_path / "other.safetensors")
    os.utime(other, ns=(at.st_atime_ns, at.st_mtime_ns))
    try:
        if way == "over it":
            shutil.copy2(other, checkpoint)
        else:
            checkpoint.unlink()
            shutil.copy2(other, checkpoint)
        assert checkpoint.stat().st_mtime_ns == at.st_mtime_ns
        assert node.IS_CHANGED(checkpoint=checkpoint.name, precision="auto") != before
    finally:
        shutil.copy2(kept, checkpoint)


def test_nothing_changed_is_the_same(call, nodes, checkpoint, condition):
    stamps = {
        nodes["HYWULoadGenerator"].IS_CHANGED(checkpoint=checkpoint.name, precision="auto")
        for _ in range(3)
    }
    assert len(stamps) == 1
    first, lora = generated(call, checkpoint.name, condition)
    second, same = generated(call, checkpoint.name, condition)
    assert first.identity == second.identity
    assert same is lora  # from the cache


@pytest.mark.parametrize("name", ["condition", "lora"])
def test_conditions_and_loras_are_loaded_anew_too(nodes, base, condition, name):
    folder = base / "input" if name == "condition" else base / "output" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"swapped_{name}.safetensors"
    condition.save(file, True)
    node = nodes["HYWULoadCondition" if name == "condition" else "HYWULoadLoRA"]
    before, at = node.IS_CHANGED(file.name), file.stat()
    other = Condition.of(-condition.parts["hidden_states"]).save(folder / "other.safetensors", True)
    os.utime(other, ns=(at.st_atime_ns, at.st_mtime_ns))
    os.replace(other, file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (at.st_size, at.st_mtime_ns)
    assert node.IS_CHANGED(file.name) != before
