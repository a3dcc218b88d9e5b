"""A real server runs the shipped workflows and the demo, and the edits are what they say."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from PIL import Image, ImageFilter

import dev
from hywu_core.bases.bundled.checkpoint import VARIABLE
from hywu_core.cli import main
from hywu_core.headless.client import run_sync
from hywu_core.headless.graph import find_node, read_graph
from workflows import build, demo
from workflows.thumbnails import with_stand_in

FOLDER = dev.ROOT / "workflows"
#: tests/host/test_evaluation_nodes.py runs the benchmarks, test_train_server.py the training, test_hunyuan.py
#: HunyuanImage-3.
EDITS = [
    name
    for name in build.names()
    if name not in ("wu_eval", "train_your_own", "hunyuan_image3")
    and not name.startswith("benchmark_")
]
INPUTS = FOLDER / "inputs"


def api(name: str) -> dict:
    return read_graph(FOLDER / "api" / f"{name}.json")


def image(server, item: dict) -> np.ndarray:
    """``[H, W, 3]`` in levels of 255."""
    with Image.open(server.base / "output" / item["subfolder"] / item["filename"]) as file:
        return np.asarray(file.convert("RGB"), dtype=np.float64)


def run(server, graph: dict) -> dict[str, np.ndarray]:
    """ "TITLE" or "TITLE:NUMBER" of every SaveImage node -> its image."""
    record, _ = run_sync(server.url, graph, timeout=600)
    found = {}
    for ident, node in graph.items():
        if node["class_type"] == "SaveImage":
            items = record["outputs"][ident]["images"]
            title = node["_meta"]["title"]
            for number, item in enumerate(items):
                found[title if len(items) == 1 else f"{title}:{number}"] = image(server, item)
    return found


def shipped(name: str) -> np.ndarray:
    return np.asarray(Image.open(INPUTS / name).convert("RGB"), dtype=np.float64)


def test_all_six_are_there():
    wanted = {"edit_bundled", "conflict_blur_deblur", "conflict_age_restore", "batch_per_image"}
    assert {*wanted, "save_and_reuse_lora", "apply_to_your_model"} == set(EDITS)


@pytest.mark.parametrize("name", EDITS)
def test_a_server_runs_it(server, weights, name):
    graph = with_stand_in(api(name))
    found = run(server, graph)
    sizes = {image.shape for image in found.values()}
    assert sizes == {(256, 256, 3)}
    assert len(found) == (3 if name == "batch_per_image" else len(saves(graph)))
    for image in found.values():
        assert image.std() > 5
    for one, two in itertools.combinations(found.values(), 2):
        assert np.abs(one - two).max() > 2  # every branch has a LoRA of its own, or another source


def saves(graph: dict) -> list[str]:
    return [i for i, node in graph.items() if node["class_type"] == "SaveImage"]


def sharpness(image: np.ndarray) -> float:
    return demo.sharpness(Image.fromarray(image.astype(np.uint8)))


def colourfulness(image: np.ndarray) -> float:
    """Mean distance of the channels from their mean, in levels."""
    return float(np.abs(image - image.mean(2, keepdims=True)).mean())


@pytest.fixture(scope="module")
def real(comfyui: dev.Host, tmp_path_factory: pytest.TempPathFactory):
    """A server on the weights that come along, whatever the other tests use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        with dev.server_of(comfyui, tmp_path_factory.mktemp("real")) as running:
            yield running


def test_blur_and_deblur_go_opposite_ways(real):
    found = run(real, api("conflict_blur_deblur"))
    source = shipped("hywu_cat_soft.png")
    blur, deblur = found["Result: blur"], found["Result: deblur"]
    assert np.abs(blur - source).max() > 2
    assert np.abs(deblur - source).max() > 2
    assert sharpness(blur) < 0.8 * sharpness(source)
    assert sharpness(deblur) > 1.1 * sharpness(source)


def test_age_fades_the_colours_and_restore_brings_them_back(real):
    found = run(real, api("conflict_age_restore"))
    source = colourfulness(shipped("hywu_astronaut_aged.png"))
    assert colourfulness(found["HY-WU: age"]) < 0.9 * source
    assert colourfulness(found["HY-WU: restore"]) > 1.1 * source


def test_sharpness_falls_with_blur_and_hardly_moves_with_noise():
    photo = Image.open(INPUTS / "hywu_coffee.png").convert("RGB")
    radii = [sharpness(np.asarray(photo.filter(ImageFilter.GaussianBlur(r)))) for r in (0, 1, 2, 4)]
    assert radii == sorted(radii, reverse=True)
    noise = np.random.default_rng(0).normal(0, 2, (256, 256, 1))
    noisy = (np.asarray(photo, dtype=np.float64) + noise).round().clip(0, 255)
    assert sharpness(noisy) < 1.05 * radii[0]


def test_age_and_restore_share_seed_source_and_model():
    graph = api("conflict_age_restore")
    samplers = [n["inputs"] for n in graph.values() if n["class_type"] == "KSampler"]
    assert len(samplers) == 6
    assert len({sampler["seed"] for sampler in samplers}) == 1
    applied = [n["inputs"] for n in graph.values() if n["class_type"] == "HYWUApplyLoRA"]
    assert {tuple(apply["model"]) for apply in applied} == {
        (find_node(graph, "HYWULoadBundledEditor"), 0)
    }
    kinds = [graph[apply["lora"][0]]["class_type"] for apply in applied]
    assert kinds.count("HYWUGenerateLoRA") == 2
    loaded = {n["inputs"]["lora"] for n in graph.values() if n["class_type"] == "HYWULoadLoRA"}
    assert loaded == {"bundled: shared", "bundled: single age", "bundled: single restore"}


def test_the_saved_lora_makes_the_image_that_the_stock_node_made_from_memory(server, weights):
    graph = api("save_and_reuse_lora")
    graph[find_node(graph, "Instruction")]["inputs"]["value"] = "blur"  # saved anew, by this test
    record, _ = run_sync(server.url, graph, timeout=600)
    name = record["outputs"][find_node(graph, "Save for stock loaders")]["text"][0]
    folder = record["outputs"][find_node(graph, "Save for diffusers and PEFT")]["text"][0]
    for kept in (name, folder):
        graph[find_node(graph, "Load a saved LoRA")]["inputs"]["lora"] = kept.removeprefix("loras/")
        again, _ = run_sync(server.url, graph, timeout=600)
        outputs = {**record["outputs"], **again["outputs"]}
        titles = ("Reused by a stock node", "Reused from a file")
        memory, file = (
            image(server, outputs[find_node(graph, title)]["images"][0]) for title in titles
        )
        assert np.abs(memory - file).max() <= 1


def test_the_command_line_takes_titles_and_a_photograph(server, weights, tmp_path):
    words = ["comfy", "run", str(FOLDER / "api" / "edit_bundled.json"), "--server", server.url]
    words += ["--image", str(INPUTS / "hywu_rocket.png"), "--set", "Instruction.value=more blur"]
    assert main([*words, "--set", "Sample.steps=2", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").glob("edited*.png")] != []


def test_the_demo_shows_images_sharpness_and_times(server, weights, tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    monkeypatch.setattr(sys, "argv", ["demo", "--server", server.url, "--out", str(out)])
    assert demo.main() == 0
    names = {"source", "blur", "deblur", "source_blur_deblur"}
    assert {path.stem for path in out.iterdir()} == names
    shown = capsys.readouterr().out
    assert all(str(out / f"{name}.png") in shown for name in names)
    assert all(word in shown for word in ("sharpness", "encode", "generate", "whole"))
    with Image.open(out / "source_blur_deblur.png") as together:
        assert together.size == (768, 256)
    assert np.array_equal(np.asarray(Image.open(out / "source.png")), shipped("hywu_cat_soft.png"))


def test_the_demo_says_in_one_sentence_that_no_server_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["demo", "--server", "http://127.0.0.1:9", "--out", str(tmp_path)]
    )
    assert demo.main() == 3
    assert "can't be reached" in capsys.readouterr().out
