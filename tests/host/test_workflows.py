"""The shipped workflows: both forms are one graph, and nothing in them is unset."""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dev
from hywu_core.headless.graph import read_graph
from hywu_core.headless.local import get_json
from workflows import blueprints, build, wires
from workflows.canvas import INPUT, default_of, has_control, inputs_of, is_widget
from workflows.thumbnails import THUMBNAIL

FOLDER = dev.ROOT / "workflows"
NAMES = build.names()
LIBRARY = sorted(path.name for path in build.SUBGRAPHS.glob("*.json"))
INPUTS = FOLDER / "inputs"
#: Least height of a node with an image in Nodes 2.0, sockets, one widget and the image's size included.
IMAGE_HEIGHT = 304


def api(name: str) -> dict:
    return read_graph(FOLDER / "api" / f"{name}.json")


def saved(name: str) -> dict:
    return json.loads(build.file_of(name).read_text(encoding="utf-8"))


def levels(workflow: dict) -> list[dict]:
    """The graph and its subgraphs, all with links as [id, source, output, target, input, type]."""
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    inner = [
        {**one, "links": [[link[key] for key in keys] for link in one["links"]]}
        for one in workflow["definitions"]["subgraphs"]
    ]
    return [workflow, *inner]


@pytest.fixture(scope="module")
def info(server) -> dict:
    return get_json(f"{server.url}/object_info", timeout=60)


class Queued:
    """The graph that the frontend would queue: subgraphs unfolded, widget values by their order."""

    def __init__(self, workflow: dict, info: dict) -> None:
        self.info, self.levels = info, {one.get("id"): one for one in levels(workflow)}
        self.graph: dict[str, dict] = {}
        self.unfold(workflow["id"], "", {})

    def unfold(self, level: str, path: str, given: dict) -> dict[str, list]:
        """Add the nodes of a level; given: what its inputs bring. Returns its outputs by name."""
        here = self.levels[level]
        links = {link[0]: link for link in here["links"]}
        nodes = {node["id"]: node for node in here["nodes"] if node["type"] != "MarkdownNote"}
        outputs: dict[int, dict[str, list]] = {}

        def value(link: int):
            _, source, slot, *_ = links[link]
            if source == INPUT:
                return given[here["inputs"][slot]["name"]]
            node = nodes[source]
            if node["type"] not in self.levels:
                return [f"{path}{source}", slot]
            if source not in outputs:
                enter(node)
            return outputs[source][node["outputs"][slot]["name"]]

        def linked(node: dict) -> dict:
            sockets = [one for one in node["inputs"] if one["link"] is not None]
            found = {one["name"]: value(one["link"]) for one in sockets}
            return {name: one for name, one in found.items() if one is not None}

        def enter(node: dict) -> None:
            widgets = [one["name"] for one in node["inputs"] if "widget" in one]
            values = dict(zip(widgets, node["widgets_values"], strict=True))
            sockets = dict.fromkeys(one["name"] for one in node["inputs"])
            brought = {**sockets, **values, **linked(node)}
            outputs[node["id"]] = self.unfold(node["type"], f"{path}{node['id']}:", brought)

        for node in nodes.values():
            if node["type"] in self.levels and node["id"] not in outputs:
                enter(node)
            elif node["type"] not in self.levels:
                made = {**self.widgets(node), **linked(node)}
                self.graph[f"{path}{node['id']}"] = {"class_type": node["type"], "inputs": made}
        ends = {one["name"]: one["linkIds"][0] for one in here.get("outputs", [])}
        return {name: value(link) for name, link in ends.items()}

    def widgets(self, node: dict) -> dict:
        values, found = iter(node["widgets_values"]), {}
        for key, spec, _ in inputs_of(self.info[node["type"]]):
            if not is_widget(spec):
                continue
            found[key] = next(values)
            options = spec[1] if len(spec) > 1 else {}
            if has_control(key, options):
                assert next(values) == "fixed"
            if options.get("image_upload"):
                assert next(values) == "image"
        assert list(values) == []
        return found


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_graph(name, info):
    """Nodes that stand for one of the API file are alike; a text there may be a widget's value here."""
    queued, wanted, ids = Queued(saved(name), info).graph, api(name), build.api_ids(name)
    texts = {i: n["inputs"]["value"] for i, n in wanted.items() if n["class_type"] == build.TEXT}
    kept = set(ids.values())
    assert ids.keys() == queued.keys()
    assert kept | texts.keys() == wanted.keys()
    for key, node in queued.items():
        links = {k: [ids[v[0]], v[1]] for k, v in node["inputs"].items() if isinstance(v, list)}
        given = {**node["inputs"], **links}
        expected = {
            k: texts[v[0]] if isinstance(v, list) and v[0] in texts.keys() - kept else v
            for k, v in wanted[ids[key]]["inputs"].items()
        }
        assert node["class_type"] == wanted[ids[key]]["class_type"]
        # inputs that came later keep their defaults
        specs = {name: spec for name, spec, _ in inputs_of(info[node["class_type"]])}
        later = {name: default_of(specs[name]) for name in given.keys() - expected.keys()}
        assert given == {**later, **expected}, key


@pytest.mark.parametrize("name", NAMES)
def test_links_are_the_same_from_both_ends(name):
    for level in levels(saved(name)):
        nodes = {node["id"]: node for node in level["nodes"]}
        for ident, source, out, target, slot, kind in level["links"]:
            if target in nodes:
                assert nodes[target]["inputs"][slot]["link"] == ident
                assert nodes[target]["inputs"][slot]["type"] in (kind, "*")
            else:
                assert level["outputs"][slot]["linkIds"] == [ident]
            if source in nodes:
                assert ident in nodes[source]["outputs"][out]["links"]
                assert nodes[source]["outputs"][out]["type"] == kind
            else:
                assert ident in level["inputs"][out]["linkIds"]
        ends = [e["link"] for n in level["nodes"] for e in n["inputs"] if e["link"] is not None]
        ends += [link for one in level.get("outputs", []) for link in one["linkIds"]]
        assert sorted(ends) == sorted(link[0] for link in level["links"])


@pytest.mark.parametrize("name", NAMES)
def test_no_two_nodes_or_links_of_a_file_have_one_id(name):
    """Frontends give duplicates in subgraphs other ids, with a warning each."""
    found = levels(saved(name))
    for ids in (
        [node["id"] for level in found for node in level["nodes"]],
        [link[0] for level in found for link in level["links"]],
    ):
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", NAMES)
def test_every_widget_is_set_to_a_value_that_it_takes(name, info):
    # files of the user's
    own = {
        ("CheckpointLoaderSimple", "ckpt_name"),
        ("HYWULoadHunyuanImage3", "folder"),
        *([("HYWULoadGenerator", "checkpoint")] if name == "hunyuan_image3" else []),
    }
    for node in api(name).values():
        kind = node["class_type"]
        for key, spec, optional in inputs_of(info[kind]):
            # optional ones that came later have their defaults
            later = optional and key not in node["inputs"]
            if not is_widget(spec) or later or (optional and not kind.startswith("HYWU")):
                continue
            value, options = node["inputs"][key], spec[1] if len(spec) > 1 else {}
            choices = spec[0] if isinstance(spec[0], list) else options.get("options")
            if isinstance(value, list):
                continue
            if choices and (kind, key) not in own:
                assert value in choices, f"{kind}.{key}"
            if spec[0] in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], f"{kind}.{key}"


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_what_its_sources_make(name, info, comfyui):
    made = build.workflow(name, api(name), build.layout_of(name), info)
    same(json.loads(json.dumps(made)), saved(name), comfyui)


@pytest.mark.parametrize("name", LIBRARY)
def test_the_blueprint_is_what_its_source_makes(name, info, comfyui):
    titles = {f"{blueprints.source(one)['title']}.json": one for one in blueprints.names()}
    made = json.loads(json.dumps(blueprints.library_file(titles[name], info)))
    content = (build.SUBGRAPHS / name).read_bytes()
    assert content.isascii()  # ComfyUI 0.3.75 reads it in the system's encoding
    same(made, json.loads(content), comfyui)


def same(made: dict, shipped: dict, comfyui: dev.Host) -> None:
    if comfyui.origin == dev.HOST_PACKAGE:
        assert made == shipped, "run `python3 dev.py workflows`"
    ours = [
        [n for level in levels(one) for n in level["nodes"] if n["type"].startswith("HYWU")]
        for one in (made, shipped)
    ]
    for new, old in zip(*ours, strict=True):  # another ComfyUI's stock nodes may have other sockets
        assert new["widgets_values"] == old["widgets_values"]
        assert new["inputs"] == old["inputs"] or comfyui.origin != dev.HOST_PACKAGE


def test_every_library_blueprint_is_shipped():
    wanted = [blueprints.source(name) for name in blueprints.names()]
    assert sorted(f"{one['title']}.json" for one in wanted if one.get("library")) == LIBRARY


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_is_small_and_its_nodes_do_not_overlap(name):
    """In a window of 1920 x 1080 frontends fit a template into three quarters of about 1850 x 1040."""
    nodes = saved(name)["nodes"]
    boxes = wires.boxes_of(saved(name))
    for a, b in itertools.combinations(boxes, 2):
        assert a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top
    width, height = max(b.right for b in boxes), max(b.bottom for b in boxes)
    assert min(0.75 * 1850 / width, 0.75 * 1040 / height) > 0.65
    assert len([node for node in nodes if node["type"] != "MarkdownNote"]) <= 12


@pytest.mark.parametrize("name", NAMES)
def test_nodes_of_images_have_the_height_that_nodes_2_gives_them_after_a_run(name):
    """They would grow over the nodes below."""
    kinds = ("LoadImage", "SaveImage", "PreviewImage")
    heights = [n["size"][1] for n in saved(name)["nodes"] if n["type"] in kinds]
    assert min(heights, default=IMAGE_HEIGHT) >= IMAGE_HEIGHT


@pytest.mark.parametrize("name", NAMES)
def test_no_wire_runs_behind_or_along_a_node(name):
    assert wires.behind(wires.wires_of(saved(name)), wires.boxes_of(saved(name))) == []


def test_a_wire_that_runs_behind_or_along_a_node_is_told():
    boxes = [wires.Box(1, "a", 0, 0, 100, 100), wires.Box(2, "between", 150, 0, 250, 100)]
    over = wires.Wire(1, 3, (100, 50), (300, 50))
    beside = wires.Wire(1, 3, (100, 105), (300, 105))  # 5 below
    below = wires.Wire(1, 3, (100, 110), (300, 110))
    assert wires.behind([over], boxes) == ["the wire from 'a' to 'the edge' runs behind 'between'"]
    assert len(wires.behind([beside], boxes)) == 1
    assert wires.behind([below], boxes) == []
    back = wires.Wire(1, 1, (100, 20), (0, 80))  # to a socket on its own left, behind itself
    assert wires.behind([back], boxes[:1]) == ["the wire from 'a' to 'a' runs behind 'a'"]


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail_and_notes(name):
    path = build.file_of(name).with_suffix(".jpg")
    assert path.stat().st_size < 40_000
    with Image.open(path) as image:
        assert image.size == THUMBNAIL
        assert np.asarray(image).std() > 10
    notes = [n["widgets_values"][0] for n in saved(name)["nodes"] if n["type"] == "MarkdownNote"]
    assert len(notes) >= 2
    assert any("**Run**" in text for text in notes)
    assert not any("`" in text for text in notes)  # Nodes 2.0 has code in blue, on the notes' brown


@pytest.mark.parametrize("name", [name for name in NAMES if "app" in build.layout_of(name)])
def test_an_app_names_widgets_and_outputs_that_there_are(name, info):
    workflow = saved(name)
    app = workflow["extra"]["linearData"]
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for ident, widget in app["inputs"]:
        (named,) = [one for one in nodes[ident]["inputs"] if one["name"] == widget]
        assert "widget" in named
        assert named["label"][0].isupper()
    assert {nodes[ident]["type"] for ident in app["outputs"]} == {"SaveImage"}


# -- the photographs ------------------------------------------------------------------------------


def examples(folder: Path, monkeypatch):
    """nodes/host/examples.py, with `folder` as ComfyUI's input folder."""
    host = types.SimpleNamespace(get_input_directory=lambda: str(folder))
    monkeypatch.setitem(sys.modules, "folder_paths", host)
    for name, path in {"": "", ".nodes": "nodes", ".nodes.host": "nodes/host"}.items():
        package = types.ModuleType(f"hywu_extension{name}")  # empty: importing them needs ComfyUI
        package.__path__ = [str(dev.ROOT / path)]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    name = "hywu_extension.nodes.host.examples"
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_photographs_are_offered_and_a_file_of_the_users_stays(tmp_path, monkeypatch):
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "hywu_coffee.png").write_bytes(b"mine")
    examples(folder, monkeypatch).offer_inputs()
    assert (folder / "hywu_coffee.png").read_bytes() == b"mine"
    names = {path.name for path in INPUTS.glob("*.png")}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "hywu_rocket.png").read_bytes() == (INPUTS / "hywu_rocket.png").read_bytes()


def test_an_input_folder_that_cannot_be_written_is_only_logged(tmp_path, monkeypatch, caplog):
    (tmp_path / "input").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        examples(tmp_path / "input", monkeypatch).offer_inputs()
    assert caplog.text.count("was not copied") == len(list(INPUTS.glob("*.png")))


def test_every_photograph_of_the_workflows_is_shipped_with_its_licence():
    used = {
        node["inputs"]["image"]
        for name in NAMES
        for node in api(name).values()
        if node["class_type"] == "LoadImage"
    }
    assert used == {path.name for path in INPUTS.glob("*.png")}
    licences = (INPUTS / "LICENSES.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in licences for name in used)
