"""Tiny random weights laid out as the bundled ones, for tests of the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tiny_editor import TINY, random_editor

from hywu_core.bases.bundled.checkpoint import editor_identity, load_editor, save_editor
from hywu_core.bases.bundled.engine import BundledEditor
from hywu_core.bases.bundled.model import Editor
from hywu_core.generator.checkpoints import save_generator
from hywu_core.generator.config import GeneratorConfig
from hywu_core.generator.model import ParameterGenerator
from hywu_core.layout import LoRALayout


def make_editor(path: Path, seed: int = 0, steer: int = 8) -> Editor:
    """An editor that changes images, written to `path`."""
    save_editor(random_editor(replace(TINY, steer=steer), seed), path, {})
    return load_editor(path)


def make_weights(folder: Path, tasks: Sequence[str] = ()) -> Path:
    """editor, generator, shared, and single_<task>: LoRAs that the generator wrote."""
    folder.mkdir()
    editor = make_editor(folder / "editor.safetensors")
    config = GeneratorConfig(
        LoRALayout.of(editor, 2), dict(TINY.condition_parts), 16, 2, 32, 16, 2,
        base="hywu-bundled-editor-2",
        encoder={"type": "bundled_editor", "editor": editor_identity(editor)},
    )  # fmt: skip
    generator = ParameterGenerator(config)
    generator.reset_parameters()
    torch.nn.init.normal_(generator.model.proj_out_A.weight, std=0.1)
    torch.nn.init.normal_(generator.model.proj_out_B.weight, std=0.1)
    save_generator(generator, folder / "generator.safetensors")
    engine = BundledEditor.load(folder / "editor.safetensors", folder / "generator.safetensors")
    image = torch.rand(3, 32, 32)
    for name in ("shared", *(f"single_{task}" for task in tasks)):
        lora = engine.edit(image, f"{name} the photo", steps=1).lora
        lora.save(folder / f"{name}.safetensors")
    return folder
