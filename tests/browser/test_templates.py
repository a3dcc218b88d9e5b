"""Templates, apps and blueprints in the real frontends: found, readable, the graphs they say, and run."""

from __future__ import annotations

import json

import actions as do
import pytest
from frontends import everywhere, newest

import dev
from workflows import blueprints, build, screenshots
from workflows.canvas import NEWER

STORED = dev.ROOT / "tests" / "host" / "stored"
FULL = {"width": 1920, "height": 1080}


def queued(page, name: str) -> dict[str, dict]:
    """The open template as the frontend would queue it, by the ids of the API file."""
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    ids = build.api_ids(name)
    return {
        key: {
            name: [ids[value[0]], value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        for key, node in prompt.items()
    }


def wanted(name: str) -> dict[str, dict]:
    """The API file's inputs; a text node that the template has as a widget is its text."""
    graph = json.loads((build.HERE / "api" / f"{name}.json").read_text(encoding="utf-8"))
    kept = set(build.api_ids(name).values())
    texts = {key: node["inputs"]["value"] for key, node in graph.items() if key not in kept}
    return {
        key: {
            name: texts[value[0]] if isinstance(value, list) and value[0] in texts else value
            for name, value in node["inputs"].items()
            if name not in NEWER.get(node["class_type"], {})
        }
        for key, node in graph.items()
        if key in kept
    }


@everywhere
def test_every_template_is_found_readable_and_the_graph_of_its_api_file(
    page, frontend, shot, errors
):
    page.set_viewport_size(FULL)
    for name in build.names():
        screenshots.open_template(page, build.file_of(name).stem)
        shot(f"template_{name}")
        wrong = page.evaluate(
            "window.app.graph._nodes.filter((n) => n.has_errors).map((n) => n.type)"
        )
        # files of the user's own, which current frontends miss
        assert set(wrong) <= {"CheckpointLoaderSimple", "HYWULoadHunyuanImage3"}, name
        graph, ids = wanted(name), build.api_ids(name)
        for key, inputs in queued(page, name).items():
            given = {one: inputs[one] for one in inputs.keys() & graph[ids[key]].keys()}
            assert given == graph[ids[key]], (name, key)
        if (
            frontend == "own"
        ):  # it opens templates as they were saved, wherever that is on the screen
            assert page.evaluate("window.app.canvas.ds.scale") >= screenshots.READABLE
            assert screenshots.overlaps(page.evaluate(screenshots.BOXES)) == []
        else:
            assert screenshots.problems(page) == [], name
    assert errors == []


@newest
def test_templates_stand_in_their_order(page, shot):
    page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("hywu", exact=True).last.click()
    cards = dialog.locator("[data-testid^='template-workflow-']")
    cards.first.wait_for(timeout=15_000)
    page.wait_for_timeout(1000)
    shot("templates")
    found = cards.evaluate_all("all => all.map((card) => card.dataset.testid)")
    files = [build.file_of(name).stem for name in build.names()]
    assert found == [f"template-workflow-{file}" for file in files]
    image = cards.first.locator("img").first
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [400, 400]


@everywhere
def test_the_first_template_runs_and_warns_on_the_node_that_is_seen(page, shot, errors):
    page.set_viewport_size(FULL)
    screenshots.open_template(page, build.file_of("edit_bundled").stem)
    page.evaluate(
        """() => { window.app.graph._nodes.find((n) => n.title === 'Edit')
             .widgets.find((w) => w.name === 'instruction').value = 'add a hat to the dog'; }"""
    )
    do.run(page)
    do.wait_on_screen(page, ".hywu-norm-map", 1)
    page.locator(".hywu-warning", has_text="add a hat to the dog").first.wait_for(timeout=10_000)
    page.wait_for_timeout(500)
    shot("first_template_done")
    assert screenshots.overlaps(page.evaluate(screenshots.BOXES)) == []
    assert errors == []


@everywhere
def test_texts_of_two_subgraphs_are_kept_apart_when_saved_and_loaded(page, errors):
    path = build.file_of("conflict_blur_deblur")
    page.evaluate("(graph) => window.app.loadGraphData(graph)", json.loads(path.read_text()))
    page.evaluate(
        """() => { for (const [title, text] of [['Edit: blur', 'one'], ['Edit: deblur', 'two']])
             window.app.graph._nodes.find((n) => n.title === title)
               .widgets.find((w) => w.name === 'instruction').value = text; }"""
    )
    saved = json.loads(page.evaluate("JSON.stringify(window.app.graph.serialize())"))
    page.evaluate("window.app.graph.clear()")
    page.evaluate("(graph) => window.app.loadGraphData(graph)", saved)
    page.wait_for_timeout(500)
    graph = queued(page, "conflict_blur_deblur")
    ids = build.api_ids("conflict_blur_deblur")
    texts = {
        ids[key]: inputs["instruction"] for key, inputs in graph.items() if "instruction" in inputs
    }
    assert texts == {"5": "one", "14": "two"}
    assert errors == []


@pytest.mark.parametrize("frontend", ["newest, Nodes 2.0"])
def test_apps_show_their_inputs_and_outputs(page, shot, errors):
    page.set_viewport_size(FULL)
    for name in build.names():
        app = build.layout_of(name).get("app")
        if not app:
            continue
        screenshots.open_template(page, build.file_of(name).stem)
        screenshots.toggle_app(page)
        shot(f"app_{name}")
        shown = page.evaluate("document.body.innerText")
        assert [label for *_, label in app["inputs"] if label not in shown] == [], name
        screenshots.toggle_app(page)
    assert errors == []


@pytest.mark.parametrize("frontend", ["newest, Nodes 2.0"])
def test_an_app_runs_warns_over_the_page_and_leaves_its_graph_readable(page, shot, errors):
    """The one with most results; nodes that show images grow."""
    page.set_viewport_size(FULL)
    screenshots.open_template(page, build.file_of("conflict_age_restore").stem)
    screenshots.toggle_app(page)
    page.evaluate(
        """() => { window.app.graph._nodes.find((n) => n.title.startsWith('Age'))
             .widgets.find((w) => w.name === 'instruction').value = 'add a hat to the dog'; }"""
    )
    page.get_by_role("button", name="Run", exact=True).last.click()
    page.wait_for_function(do.SAVED, timeout=240_000)
    page.locator("[role=alert]:visible", has_text="add a hat to the dog").first.wait_for(
        timeout=10_000
    )
    shot("app_done")
    screenshots.toggle_app(page)
    page.wait_for_timeout(1000)
    shot("app_done_graph")
    assert screenshots.problems(page) == []
    assert errors == []


@newest
def test_blueprints_are_in_the_node_search(page, shot, errors):
    page.evaluate("window.app.graph.clear()")
    field = do.open_search(page, (900, 600))
    field.fill("HY-WU Instruction")
    page.get_by_text("HY-WU Instruction to LoRA").first.wait_for(timeout=10_000)
    shot("blueprint_search")
    assert errors == []


@pytest.mark.parametrize("frontend", ["newest, Nodes 2.0"])
def test_blueprints_are_readable_outside_and_inside(page, shot, errors):
    page.set_viewport_size(FULL)
    info = page.evaluate("async () => (await fetch('/api/object_info')).json()")
    inside = screenshots.BOXES.replace("app.graph._nodes", "app.canvas.graph._nodes")
    for name in blueprints.names():
        screenshots.put_blueprint(page, blueprints.library_file(name, info))
        shot(f"blueprint_{name}")
        assert screenshots.cut_texts(page) == [], name
        screenshots.enter(page)
        shot(f"blueprint_{name}_inside")
        assert screenshots.overlaps(page.evaluate(inside)) == [], name
        assert screenshots.names_outside(page) == [], name
    assert errors == []


def test_a_workflow_of_an_earlier_version_is_the_same_graph(page, shot, errors):
    """Those that were shipped in November 2026, of single nodes."""
    for path in sorted((STORED / "workflows").glob("*.json")):
        saved = json.loads(path.read_text(encoding="utf-8"))
        page.evaluate("window.app.graph.clear()")  # two of them have nodes of the same classes
        do.drop(page, path, "application/json")
        kinds = ",".join(sorted(n["type"] for n in saved["nodes"]))
        page.wait_for_function(
            "(wanted) => window.app.graph._nodes.map((n) => n.type).sort().join() === wanted",
            arg=kinds,
        )
        page.wait_for_timeout(500)
        expected = json.loads((STORED / "api" / path.name).read_text(encoding="utf-8"))
        prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
        for key, node in expected.items():
            given = prompt[key]["inputs"]
            # what only newer ComfyUIs have is no widget of an older one
            missing = node["inputs"].keys() - given.keys()
            assert missing <= NEWER.get(node["class_type"], {}).keys(), (path.name, key)
            known = {k: v for k, v in node["inputs"].items() if k in given}
            assert {k: given[k] for k in known} == known, (path.name, key)
    shot("earlier")
    assert errors == []
