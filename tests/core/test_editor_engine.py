"""The bundled editor as one call and as `hywu edit`; `hywu train` on a user's own pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_editor import random_editor

from hywu_core.bases.bundled.checkpoint import load_editor, save_editor
from hywu_core.bases.bundled.engine import BundledEditor
from hywu_core.bases.bundled.sampling import edit
from hywu_core.bases.bundled.training import EditorBase
from hywu_core.cli import main
from hywu_core.errors import HYWUError
from hywu_core.formats import load_lora
from hywu_core.generator.checkpoints import load_generator, save_generator
from hywu_core.generator.config import GeneratorConfig
from hywu_core.generator.model import ParameterGenerator
from hywu_core.injection import inject
from hywu_core.layout import LoRALayout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_editor(random_editor(), folder / "editor.safetensors", {"seed": 0})
    base = EditorBase(load_editor(folder / "editor.safetensors"))
    layout = LoRALayout.of(base.module, 2, exclude="text.*")
    config = GeneratorConfig(
        layout, dict(base.condition_parts), token_dim=24, dim_accumulation=2, d_model=16, head_dim=8,
        num_blocks=1, encoder=dict(base.encoder), base=base.name,
        provenance={"phrasings": {"blur": ["blur the image"]}},
    )  # fmt: skip
    generator = ParameterGenerator(config)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_generator(generator, folder / "generator.safetensors")
    return folder


@pytest.fixture
def engine(files) -> BundledEditor:
    return BundledEditor.load(files / "editor.safetensors", files / "generator.safetensors")


def photo(height: int = 40, width: int = 70) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def test_edit_is_the_sampling_with_the_generated_lora(engine):
    image = photo()
    result = engine.edit(image, "blur the image", seed=3, steps=2)
    assert result.image.shape == image.shape
    assert set(result.seconds) == {"encode", "generate", "sample"}
    assert result.warning == ""
    source = image[None].float() / 255
    with inject(engine.editor, result.lora):
        again = edit(engine.editor, source, ["blur the image"], seed=3, steps=2)
    assert torch.equal(result.image, again[0])
    plain = edit(engine.editor, source, ["blur the image"], seed=3, steps=2)
    assert not torch.allclose(result.image, plain[0], atol=1e-3), "the LoRA changes the edit"
    off = engine.edit(image, "blur the image", seed=3, steps=2, strength=0.0)
    assert torch.allclose(off.image, plain[0], atol=1e-5)


def test_float_and_bytes_are_the_same_image(engine):
    image = photo(9, 5)
    one = engine.edit(image, "blur the image", steps=1).image
    two = engine.edit(image.float() / 255, "blur the image", steps=1).image
    assert torch.allclose(one, two)


def test_unknown_and_empty_instructions(engine):
    warning = engine.edit(photo(8, 8), "add a giraffe", steps=1).warning
    assert "blur" in warning
    with pytest.raises(HYWUError, match="empty"):
        engine.edit(photo(8, 8), "  ")
    with pytest.raises(HYWUError, match="height, width"):
        engine.edit(photo(8, 8)[:1], "blur the image")


def test_a_generator_of_another_editor_is_refused(files, tmp_path):
    save_editor(random_editor(seed=9), tmp_path / "other.safetensors", {})
    with pytest.raises(HYWUError, match="made together"):
        BundledEditor.load(tmp_path / "other.safetensors", files / "generator.safetensors")


def arguments(files, image, out, *more: str) -> list[str]:
    weights = ["--editor", str(files / "editor.safetensors")]
    weights += ["--generator", str(files / "generator.safetensors")]
    return [
        "edit",
        str(image),
        "blur the image",
        "--out",
        str(out),
        "--steps",
        "1",
        *weights,
        *more,
    ]


def test_command_writes_image_and_lora(files, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    out, lora = tmp_path / "out.png", tmp_path / "lora.safetensors"
    assert main(arguments(files, tmp_path / "in.png", out, "--save-lora", str(lora))) == 0
    with Image.open(out) as image:
        assert image.size == (30, 20)
    assert load_lora(lora).batch_size == 1
    printed = capsys.readouterr().out
    for stage in ("load", "encode", "generate", "sample"):
        assert stage in printed
    before = out.read_bytes()
    assert main(arguments(files, tmp_path / "in.png", out)) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(arguments(files, tmp_path / "in.png", tmp_path / "out.tiff")) == 1
    assert main(arguments(files, tmp_path / "no.png", tmp_path / "x.png")) == 1
    assert "no.png" in capsys.readouterr().err


def test_train_on_own_pairs_goes_on_and_exports(files, tmp_path, capsys, write_pairs):
    write_pairs(tmp_path, 4)
    with (tmp_path / "pairs.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"source": "gone.png", "target": "0.png", "instruction": "x"}\n')
    out = tmp_path / "run"
    command = [
        "train", "--out", str(out), "--data", str(tmp_path / "pairs.jsonl"), "--steps", "3",
        "--batch-size", "2", "--d-model", "64", "--blocks", "1", "--rank", "1", "--device", "cpu",
        "--editor", str(files / "editor.safetensors"), "--save-every", "1", "--sample-every", "0",
    ]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "4 pairs, 1 rows skipped" in printed
    assert "gone.png" in printed
    generator = load_generator(out / "weights.safetensors")
    assert generator.config.provenance["phrasings"]["custom"][0].startswith("negate")
    BundledEditor.load(files / "editor.safetensors", out / "weights.safetensors")
    assert main([*command, "--lr", "0.5"]) == 1
    assert "other settings" in capsys.readouterr().err
    row = {"source": "0.png", "target": "0.png", "instruction": "x", "references": ["1.png"]}
    (tmp_path / "more.jsonl").write_text(json.dumps(row), encoding="utf-8")
    command[4] = str(tmp_path / "more.jsonl")
    assert main(command) == 1
    assert "more.jsonl: The bundled editor reads one image" in capsys.readouterr().err
