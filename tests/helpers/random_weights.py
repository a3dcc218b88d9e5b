"""Random weights of a small editor in place of the bundled ones: the tests of nodes, graphs and evaluation
run in a fraction of the time, and what the real ones do is seen in test_workflow_runs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hywu_core.bases.bundled.checkpoint import editor_identity, load_editor, save_editor
from hywu_core.bases.bundled.model import Editor, EditorConfig
from hywu_core.generator.checkpoints import save_generator
from hywu_core.generator.config import GeneratorConfig
from hywu_core.generator.model import ParameterGenerator
from hywu_core.layout import LoRALayout
from hywu_core.lora import GeneratedLoRA

BASE = "hywu-bundled-editor-2"
TASKS = ("blur", "deblur", "age", "restore")


def make_editor(path: Path, seed: int = 0, width: int = 8) -> Editor:
    """An editor that changes images, written to `path`; width: channels at full resolution."""
    torch.manual_seed(seed)
    config = EditorConfig(
        widths=(width, 2 * width, 4 * width),
        encode=(0, 1, 0),
        decode=(1, 1, 2),
        steer=32,
        text_width=64,
        text_depth=1,
        max_pixels=96 * 96,
    )
    editor = Editor(config)
    editor.reset_parameters()
    torch.nn.init.normal_(editor.scales[0].leave.weight, std=0.05)
    for name, value in editor.named_parameters():
        if name.endswith("film.weight"):
            torch.nn.init.normal_(value, std=0.05)
    save_editor(editor, path, {})
    return load_editor(path)


def make_random(folder: Path, tasks: Sequence[str] = TASKS) -> Path:
    """editor, generator, shared, and single_<task>: random, but all of them change the image."""
    folder.mkdir(exist_ok=True)
    editor = make_editor(folder / "editor.safetensors")
    layout = LoRALayout.of(editor, 2)
    config = GeneratorConfig(
        layout, editor.config.condition_parts, 16, 2, 32, 16, 2, base=BASE,
        encoder={"type": "bundled_editor", "editor": editor_identity(editor)},
        provenance={"phrasings": {"blur": ["blur the image"], "deblur": ["sharpen the image"]}},
    )  # fmt: skip
    generator = ParameterGenerator(config)
    generator.reset_parameters()
    torch.nn.init.normal_(generator.model.proj_out_A.weight, std=0.05)
    torch.nn.init.normal_(generator.model.proj_out_B.weight, std=0.05)
    save_generator(generator, folder / "generator.safetensors")
    for name in ("shared", *(f"single_{task}" for task in tasks)):
        _lora(layout).save(folder / f"{name}.safetensors")
    return folder


def _lora(layout: LoRALayout) -> GeneratedLoRA:
    pairs = {
        t.path: (
            torch.randn(1, layout.rank, t.module.in_features) * t.module.in_features**-0.5,
            torch.randn(1, t.module.out_features, layout.rank) * 0.3,
        )
        for t in layout.targets()
    }
    layers = {t.path: layout.stacks[t.stack].layers[t.layer] for t in layout.targets()}
    return GeneratedLoRA.from_pairs(pairs, layout.alpha, layers=layers, provenance={"base": BASE})
