"""The bundled editor as a benchmark's editor: generated LoRAs, static ones, none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import make_editor, make_random

from hywu_core.bases.bundled.checkpoint import VARIABLE
from hywu_core.bases.bundled.engine import BundledEditor
from hywu_core.cli import main
from hywu_core.evaluation.benchmarks import BENCHMARKS
from hywu_core.evaluation.results import read_failures
from hywu_core.files import read_header, read_tensors, save_tensors


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A tiny random editor, its generator, and random LoRAs as `shared` and single."""
    folder = make_random(tmp_path / "weights", ("blur",))
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def generate(out, method: str, *more: str) -> int:
    given = ["--benchmark", "folder", "--data", "samples", "--out", str(out), "--steps", "1"]
    return main(["eval", "generate", *given, "--editor", "bundled", "--method", method, *more])


def images(out, method: str) -> dict[str, np.ndarray]:
    return {p.stem: np.asarray(Image.open(p)) for p in sorted((out / method).glob("*.png"))}


def test_each_item_gets_the_edit_that_the_engine_makes(weights, tmp_path):
    out = tmp_path / "results"
    assert generate(out, "hywu") == 0
    made = images(out, "hywu")
    assert list(made) == ["astronaut", "rocket"]
    engine = BundledEditor.load(weights / "editor.safetensors", weights / "generator.safetensors")
    row = json.loads((BENCHMARKS["folder"].sample / "items.jsonl").read_text().splitlines()[0])
    source = np.array(Image.open(BENCHMARKS["folder"].sample / row["source"]).convert("RGB"))
    pixels = torch.from_numpy(source).permute(2, 0, 1)
    wanted = engine.edit(pixels, row["instruction"], seed=0, steps=1).image
    wanted = (wanted * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(made["astronaut"], wanted)


def test_static_loras_and_none_are_other_methods(weights, tmp_path):
    out = tmp_path / "results"
    for method, lora in (("shared", "shared"), ("alone", "none")):
        assert generate(out, method, "--lora", lora) == 0
    assert generate(out, "hywu") == 0
    found = [images(out, method)["rocket"] for method in ("shared", "alone", "hywu")]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (found[a] != found[b]).any()
    file = str(weights / "shared.safetensors")
    assert generate(out, "by_path", "--lora", file) == 0
    np.testing.assert_array_equal(images(out, "by_path")["rocket"], found[0])


def test_a_strength_of_zero_is_the_editor_alone(weights, tmp_path):
    out = tmp_path / "results"
    assert generate(out, "alone", "--lora", "none") == 0
    assert generate(out, "zero", "--strength", "0") == 0
    assert (
        np.abs(images(out, "zero")["rocket"].astype(int) - images(out, "alone")["rocket"]).max()
        <= 1
    )


def test_other_weights_under_one_name_are_refused(weights, tmp_path, capsys):
    out = tmp_path / "results"
    assert generate(out, "hywu") == 0
    assert generate(out, "hywu", "--strength", "0.5") == 1
    assert "choose another name" in capsys.readouterr().err
    assert generate(out, "unexpected", "--lora", "nothing_like_it") == 1
    assert "the bundled ones are shared, single_blur, none" in capsys.readouterr().err
    (weights / "generator.safetensors").unlink()
    assert generate(out, "gone") == 1
    assert "generator.safetensors" in capsys.readouterr().err


def test_another_generators_file_edits_and_is_told_apart(weights, tmp_path, capsys):
    out, file = tmp_path / "results", str(weights / "generator.safetensors")
    assert generate(out, "usual") == 0
    assert generate(out, "named", "--generator", file) == 0
    np.testing.assert_array_equal(images(out, "named")["rocket"], images(out, "usual")["rocket"])
    header, tensors = read_header(file), read_tensors(file)[0]
    changed = {k: v + 0.05 if v.is_floating_point() else v for k, v in tensors.items()}
    save_tensors(tmp_path / "mine.safetensors", changed, header)
    mine = ("--generator", str(tmp_path / "mine.safetensors"))
    assert generate(out, "mine", *mine) == 0
    assert np.abs(images(out, "mine")["rocket"].astype(int) - images(out, "usual")["rocket"]).max()
    assert generate(out, "usual", *mine) == 1
    assert "choose another name" in capsys.readouterr().err
    assert generate(out, "both", *mine, "--lora", "shared") == 1
    assert "leave it out, or 'shared'" in capsys.readouterr().err


def test_another_editors_file_is_the_base_and_is_told_apart(weights, tmp_path, capsys):
    out, file = tmp_path / "results", tmp_path / "editor.safetensors"
    assert generate(out, "usual", "--lora", "none") == 0
    make_editor(file, seed=1)
    other = ("--lora", "none", "--editor-file", str(file))
    assert generate(out, "other", *other) == 0
    assert np.abs(images(out, "other")["rocket"].astype(int) - images(out, "usual")["rocket"]).max()
    assert generate(out, "usual", *other) == 1
    assert "choose another name" in capsys.readouterr().err


def test_one_lora_a_task_and_a_task_without_one_is_listed(weights, tmp_path):
    out = tmp_path / "results"
    assert generate(out, "single", "--lora", "single_{task}") == 3
    assert list(images(out, "single")) == ["astronaut"]
    assert read_failures(out / "single") == {
        "brighten/en/rocket": "there is no LoRA for the task 'brighten' (single_{task} "
        f"{_digest_of(out)}: blur)"
    }
    assert generate(out, "one", "--lora", "single_blur") == 0
    blur = images(out, "one")["astronaut"]
    np.testing.assert_array_equal(images(out, "single")["astronaut"], blur)
    by_path = str(weights / "single_{task}.safetensors")
    assert generate(out, "by_path", "--lora", by_path, "--tasks", "blur") == 0
    np.testing.assert_array_equal(images(out, "by_path")["astronaut"], blur)


def _digest_of(out) -> str:
    manifest = json.loads((out / "single" / "hywu_run.json").read_text())
    return manifest["editor"]["lora"].split()[1]


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error(weights, tmp_path, capsys, device):
    assert generate(tmp_path, "hywu", "--device", device) == 1
    assert f"device '{device}'" in capsys.readouterr().err
    assert not (tmp_path / "hywu").exists()
