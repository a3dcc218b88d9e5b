"""The shipped workflows: both forms are one graph, nothing in them is unset, and a real server runs them."""

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
from PIL import Image, ImageFilter

import dev
from hywu_core.bases.bundled.checkpoint import VARIABLE
from hywu_core.cli import main
from hywu_core.headless.client import run_sync
from hywu_core.headless.graph import find_node, read_graph
from hywu_core.headless.local import get_json
from workflows import blueprints, build, demo
from workflows.canvas import INPUT, default_of, has_control, inputs_of, is_widget
from workflows.thumbnails import THUMBNAIL, with_stand_in

FOLDER = dev.ROOT / "workflows"
NAMES = build.names()
LIBRARY = sorted(path.name for path in build.SUBGRAPHS.glob("*.json"))
#: tests/host/test_evaluation_nodes.py runs the benchmarks, test_train_server.py the training, test_hunyuan.py
#: HunyuanImage-3.
EDITS = [
    name
    for name in NAMES
    if name not in ("wu_eval", "train_your_own", "hunyuan_image3")
    and not name.startswith("benchmark_")
]
INPUTS = FOLDER / "inputs"


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


# -- the files ------------------------------------------------------------------------------------


def test_all_six_are_there():
    wanted = {"edit_bundled", "conflict_blur_deblur", "conflict_age_restore", "batch_per_image"}
    assert {*wanted, "save_and_reuse_lora", "apply_to_your_model"} == set(EDITS)


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

    def box(node: dict) -> tuple[float, ...]:
        (x, y), (width, height) = node["pos"], node["size"]
        return x, y - 30, x + width, y + height  # the title stands above

    boxes = [box(node) for node in nodes]
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    width, height = max(b[2] for b in boxes), max(b[3] for b in boxes)
    assert min(0.75 * 1850 / width, 0.75 * 1040 / height) > 0.65
    assert len([node for node in nodes if node["type"] != "MarkdownNote"]) <= 12


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


# -- the runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(server, weights) -> dict[str, dict[str, np.ndarray]]:
    """name -> images of the one run that several tests look at."""
    return {}


@pytest.mark.parametrize("name", EDITS)
def test_a_server_runs_it(server, weights, name, results):
    graph = with_stand_in(api(name))
    results[name] = run(server, graph)
    sizes = {image.shape for image in results[name].values()}
    assert sizes == {(256, 256, 3)}
    assert len(results[name]) == (3 if name == "batch_per_image" else len(saves(graph)))
    for image in results[name].values():
        assert image.std() > 5
    for one, two in itertools.combinations(results[name].values(), 2):
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
