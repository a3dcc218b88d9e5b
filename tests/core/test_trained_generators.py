"""What `hywu train` writes is used by every command that takes a generator."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from hywu_core.cli import main
from hywu_core.formats import load_lora

FORMER = Path(__file__).with_name("former_runs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A generator of two steps on the tiny editor."""
    out = tmp_path_factory.mktemp("run")
    command = ["train", "--out", out, "--data", FORMER / "pairs.jsonl", "--steps", 2, "--batch-size", 2,
               "--d-model", 64, "--editor", FORMER / "editor.safetensors", "--sample-every", 0,
               "--device", "cpu"]  # fmt: skip
    assert main(list(map(str, command))) == 0
    return out / "weights.safetensors"


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source.png"
    Image.open(FORMER / "coffee.png").convert("RGB").resize((48, 32)).save(path)
    return path


def test_edit_and_condition_with_generate_give_one_lora(trained, source, tmp_path):
    edited, kept = tmp_path / "edited.png", tmp_path / "kept.safetensors"
    command = ["edit", source, "blur it", "--generator", trained, "--out", edited,
               "--editor", FORMER / "editor.safetensors", "--save-lora", kept]  # fmt: skip
    assert main(list(map(str, command))) == 0
    assert Image.open(edited).size == (48, 32)
    condition, lora = tmp_path / "condition.safetensors", tmp_path / "lora.safetensors"
    command = ["condition", "--checkpoint", trained, "--image", source, "--instruction", "blur it",
               "--editor", FORMER / "editor.safetensors", "--out", condition]  # fmt: skip
    assert main(list(map(str, command))) == 0
    command = ["generate", "--checkpoint", trained, "--condition", condition, "--out", lora]
    assert main(list(map(str, command))) == 0
    one, other = load_lora(kept), load_lora(lora)
    assert max(float(one[path].B.abs().max()) for path in one) > 0
    for path in one:
        assert (one[path].A - other[path].A).abs().max() < 1e-5
        assert (one[path].B - other[path].B).abs().max() < 1e-5


def test_a_condition_of_another_editor_is_refused(trained, source, tmp_path, capsys):
    out = tmp_path / "condition.safetensors"
    command = ["condition", "--checkpoint", trained, "--image", source, "--instruction", "x"]
    assert main([*map(str, command), "--out", str(out)]) == 1
    assert "editor" in capsys.readouterr().err
    assert not out.exists()
