"""API-format graphs: addressing nodes, setting inputs, safe output names."""

from __future__ import annotations

import json

import pytest

from hywu_core import HYWUError
from hywu_core.cli.comfy import free_path, safe_name
from hywu_core.headless.client import describe_refusal
from hywu_core.headless.graph import find_node, image_node, read_graph, set_input


@pytest.fixture
def graph():
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "2": {"class_type": "KSampler", "inputs": {"seed": 1}, "_meta": {"title": "First"}},
        "3": {"class_type": "KSampler", "inputs": {"seed": 1}},
    }


def test_ui_format_is_explained(tmp_path):
    path = tmp_path / "ui.json"
    path.write_text(json.dumps({"nodes": [], "links": []}))
    with pytest.raises(HYWUError, match=r"UI format.*Export \(API\)"):
        read_graph(path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": 1}', "not json"])
def test_what_is_no_workflow_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(HYWUError, match=r"other\.json"):
        read_graph(path)


def test_nodes_by_id_title_and_class(graph):
    assert find_node(graph, "3") == "3"
    assert find_node(graph, "First") == "2"
    assert find_node(graph, "LoadImage") == "1"
    with pytest.raises(HYWUError, match="2, 3"):
        find_node(graph, "KSampler")


def test_set_keeps_the_type(graph):
    set_input(graph, "First.seed=7")
    set_input(graph, "LoadImage.image=12")
    assert graph["2"]["inputs"]["seed"] == 7
    assert graph["1"]["inputs"]["image"] == "12"


@pytest.mark.parametrize("bad", ["First.sed=7", "Nobody.seed=7", "seed=7", "First.seed"])
def test_set_refuses_what_does_not_exist(graph, bad):
    before = json.dumps(graph)
    with pytest.raises(HYWUError):
        set_input(graph, bad)
    assert json.dumps(graph) == before


def test_image_goes_to_the_only_loader_or_the_named_one(graph):
    assert image_node(graph, "photo.png") == ("1", "photo.png")
    graph["9"] = {"class_type": "LoadImage", "inputs": {"image": "b.png"}}
    assert image_node(graph, "9=photo.png") == ("9", "photo.png")
    with pytest.raises(HYWUError, match="1, 9"):
        image_node(graph, "photo.png")


@pytest.mark.parametrize("name", ["../../a.png", "/etc/a.png", "C:\\x\\a.png", "..\\a.png"])
def test_names_cannot_escape(name):
    assert safe_name(name) == "a.png"


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a.png").touch()
    assert free_path(tmp_path / "a.png").name == "a-2.png"


def test_refusal_without_node_errors():
    assert "no outputs" in describe_refusal({"error": {"message": "Prompt has no outputs"}})
