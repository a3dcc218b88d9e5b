"""The workflows of the conflict demos on the weights that come along: each edit goes its own way."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import dev
from hywu_core.editor.checkpoint import VARIABLE
from hywu_core.headless.client import run_sync
from hywu_core.headless.graph import read_graph
from workflows.demo import sharpness

FOLDER = dev.ROOT / "workflows"


@pytest.fixture(scope="module")
def shipped(comfyui: dev.Host, tmp_path_factory: pytest.TempPathFactory):
    """A server that reads the checkout's weights, whatever the other tests use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        with dev.server_of(comfyui, tmp_path_factory.mktemp("shipped")) as running:
            yield running


def run(server, name: str) -> dict[str, np.ndarray]:
    """Title of a SaveImage node -> its picture ``[H, W, 3]`` in levels of 255."""
    graph = read_graph(FOLDER / "api" / f"{name}.json")
    record, _ = run_sync(server.url, graph, timeout=600)
    found = {}
    for ident, node in graph.items():
        if node["class_type"] == "SaveImage":
            (item,) = record["outputs"][ident]["images"]
            path = server.base / "output" / item["subfolder"] / item["filename"]
            with Image.open(path) as file:
                found[node["_meta"]["title"]] = np.asarray(file.convert("RGB"), dtype=np.float64)
    return found


def given(name: str) -> np.ndarray:
    return np.asarray(Image.open(FOLDER / "inputs" / name).convert("RGB"), dtype=np.float64)


def colourfulness(image: np.ndarray) -> float:
    """Mean distance of the channels from their mean, in levels."""
    return float(np.abs(image - image.mean(2, keepdims=True)).mean())


def test_blur_and_deblur_go_opposite_ways(shipped):
    found = run(shipped, "conflict_blur_deblur")
    values = [
        sharpness(Image.fromarray(image.astype(np.uint8)))
        for image in (found["Result: blur"], given("hywu_cat_soft.png"), found["Result: deblur"])
    ]
    assert values[0] < 0.8 * values[1]
    assert values[2] > 1.03 * values[1]


def test_age_fades_the_colours_and_restore_brings_them_back(shipped):
    found = run(shipped, "conflict_age_restore")
    source = colourfulness(given("hywu_astronaut_aged.png"))
    assert colourfulness(found["HY-WU: age"]) < 0.9 * source
    assert colourfulness(found["HY-WU: restore"]) > 1.1 * source
