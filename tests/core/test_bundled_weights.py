"""The weights that come along: complete, small, made for each other, and doing what they are for."""

from __future__ import annotations

import json

import pytest
import torch

from hywu_core.bases.bundled.checkpoint import BUNDLED, bundled_loras, load_editor
from hywu_core.bases.bundled.engine import BundledEditor
from hywu_core.bases.bundled.training import EditorBase
from hywu_core.experiments.conflict.runs import FILE_LIMIT, FOLDER_LIMIT
from hywu_core.experiments.images import photographs
from hywu_core.experiments.tasks import CONFLICT, make_batch
from hywu_core.files import read_header, read_tensors
from hywu_core.formats import load_lora
from hywu_core.injection import inject

FOLDER = BUNDLED.parent
FILES = sorted(FOLDER.glob("*.safetensors"))
PHOTOS = ("astronaut", "coffee", "flower")


@pytest.fixture(scope="module")
def figures() -> dict:
    return json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def engine() -> BundledEditor:
    return BundledEditor.load(BUNDLED, FOLDER / "generator.safetensors")


def crops(size: int = 64) -> torch.Tensor:
    """The middle of each photograph, at a third of its size, which keeps detail."""
    found = []
    for name in PHOTOS:
        image = photographs()[name].float()[None] / 255
        image = torch.nn.functional.interpolate(image, scale_factor=1 / 3, mode="area")
        top, left = ((side - size) // 2 for side in image.shape[2:])
        found.append(image[..., top : top + size, left : left + size])
    return torch.cat(found)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean((1, 2, 3))).mean())


def test_all_are_there_and_small():
    names = {path.stem for path in FILES}
    assert names == {"editor", "generator", "shared", *(f"single_{task}" for task in CONFLICT)}
    assert bundled_loras() == ["shared", *(f"single_{task}" for task in sorted(CONFLICT))]
    sizes = [path.stat().st_size for path in FOLDER.iterdir()]
    assert max(sizes) <= FILE_LIMIT
    assert sum(sizes) <= FOLDER_LIMIT


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_is_in_half_precision_and_says_where_it_comes_from(path):
    tensors = read_tensors(path)[0]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    text = json.dumps(read_header(path))
    for word in ("commit", "steps", "seed", "comfyui-workflow-templates-media"):
        assert word in text, word


def test_generator_and_static_loras_fit_the_editor(engine):
    layout = engine.generator.config.layout
    base = EditorBase(engine.editor)
    for name in bundled_loras():
        lora = load_lora(FOLDER / f"{name}.safetensors")
        assert lora.rank == layout.rank
        with inject(base.module, lora):
            pass


def test_the_figures_are_of_this_experiment(figures, engine):
    assert figures["plan"]["main_rank"] == engine.generator.config.layout.rank
    assert set(figures["plan"]["tasks"]) == set(CONFLICT)
    # phrasings that came in since are learned with the next weights; held-out ones never
    seen = {(task, text) for task in CONFLICT for text in CONFLICT[task].seen}
    held_out = {(task, text) for task in CONFLICT for text in CONFLICT[task].held_out}
    assert len(engine.known) > 800
    assert set(engine.known) <= seen
    assert not set(engine.known) & held_out


@pytest.mark.parametrize("task", CONFLICT)
def test_an_edit_comes_nearer_to_its_target_than_the_opposite_edit(engine, task):
    clean = crops()
    batch = make_batch(clean, [task] * len(clean), torch.Generator().manual_seed(0))
    opposite = CONFLICT[CONFLICT[task].opposite].phrasings[0]
    own, other = [], []
    for source in batch.source:
        own.append(engine.edit(source, CONFLICT[task].phrasings[0]).image)
        other.append(engine.edit(source, opposite).image)
    gap = psnr(torch.stack(own), batch.target) - psnr(torch.stack(other), batch.target)
    assert gap > 1


def test_the_editor_leaves_an_image_alone_when_asked_to():
    base = EditorBase(load_editor(BUNDLED), 4)
    clean = crops()
    batch = make_batch(clean, ["identity"] * len(clean), torch.Generator().manual_seed(0))
    assert psnr(base.edit(base.module, batch, 0), clean) > 40
