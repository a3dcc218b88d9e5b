"""The nodes in the real frontend: norm map, help, Chinese, by hand, by drop."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import actions as do
import numpy as np
import pytest
from frontends import everywhere
from PIL import Image

from hywu_core.evaluation.benchmarks import BENCHMARKS

MAP, WARNING, REPORT = ".hywu-norm-map", ".hywu-warning", ".hywu-report"


@pytest.fixture(autouse=True)
def photo(server) -> Path:
    """photo.png in the server's input folder."""
    path = server.base / "input" / "photo.png"
    Image.open(BENCHMARKS["folder"].sample / "sources" / "astronaut.jpg").resize((64, 64)).save(
        path
    )
    return path


def contrast(page) -> float:
    """The WCAG contrast of the first norm map's text on its background."""

    def luminance(colour: str) -> float:
        rgb = [float(x) for x in re.findall(r"[\d.]+", colour)[:3]]
        linear = [(c / 255 / 12.92 if c < 11 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = "getComputedStyle(document.querySelector('.hywu-norm-map'))"
    lights = sorted(luminance(page.evaluate(f"{style}.{n}")) for n in ("color", "backgroundColor"))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def map_pixels(page) -> np.ndarray:
    """The first norm map's canvas as [modules, layers, 4]."""
    values = page.evaluate(
        """() => { const c = document.querySelector('.hywu-norm-map canvas');
             return [c.height, c.width,
                     [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }"""
    )
    return np.array(values[2]).reshape(values[0], values[1], 4)


@pytest.mark.parametrize(
    ("kind", "widget", "after"),
    [("HYWUTrainGenerator", "seed", "fixed"), ("HYWUBenchmarkItems", "index", "increment")],
)
def test_a_new_node_goes_on_where_it_was(page, errors, kind, widget, after):
    """A seed that changes by itself would begin another training; a saved choice is kept."""
    control = """([kind, name, saved]) => {
        const node = window.LiteGraph.createNode(kind);
        window.app.graph.add(node);
        const [control] = node.widgets.find((w) => w.name === name).linkedWidgets;
        if (!saved) return control.value;
        control.value = saved;
        const again = window.LiteGraph.createNode(kind);
        window.app.graph.add(again);
        again.configure(node.serialize());
        return again.widgets.find((w) => w.name === name).linkedWidgets[0].value; }"""
    assert page.evaluate(control, [kind, widget, ""]) == after
    assert page.evaluate(control, [kind, widget, "randomize"]) == "randomize"
    assert errors == []


@everywhere
def test_the_norm_map_and_the_time_appear_after_a_run(page, shot, errors):
    do.open_graph(page, do.hywu_graph())
    assert page.locator(MAP).count() == 0
    do.run(page)
    do.look_at(page, "HYWUInspectLoRA")
    do.wait_on_screen(page, MAP, 1)
    shot("inspect")
    assert images_of(page, "HYWUInspectLoRA") == 0  # the map is drawn once
    do.look_at(page, "HYWUGenerateLoRA")
    do.wait_on_screen(page, MAP, 1)
    shot("norm_map_dark")
    shown = page.evaluate(
        """() => window.app.graph._nodes.find((n) => n.type === 'HYWUGenerateLoRA')
             .properties.hywu_norms[0]"""
    )
    pixels = map_pixels(page)
    assert pixels.shape == (len(shown["modules"]), len(shown["layers"]), 4)
    norms = np.array(shown["norms"])
    light = pixels[..., :3].sum(2)
    assert light.flat[norms.argmax()] == light.max()
    assert light.flat[norms.argmin()] == light.min() < light.max()
    # it comes with the end of the run, which may be after the map
    shown_time = page.locator(f"{MAP} .hywu-time").filter(has_text=re.compile(r"\d\.\d\d s"))
    shown_time.first.wait_for(state="attached")
    assert empty_below(page) < 24  # the frame's padding, and no spare height of the node
    assert contrast(page) > 4.5
    page.evaluate("window.app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
    page.wait_for_timeout(800)
    shot("norm_map_light")
    assert contrast(page) > 4.5
    assert errors == []


def images_of(page, class_name: str) -> int:
    """Images that a node draws: elements in it, or the canvas renderer's own."""
    return page.evaluate(
        """(type) => {
             const n = window.app.graph._nodes.find((n) => n.type === type);
             const drawn = document.querySelectorAll(`[data-node-id="${n.id}"] img`).length;
             return drawn + (n.imgs?.length ?? 0); }""",
        class_name,
    )


def empty_below(page) -> float:
    """Pixels between the legend of the first map and the lower edge of its box."""
    return page.evaluate(
        """() => { const map = document.querySelector('.hywu-norm-map');
             return (map.getBoundingClientRect().bottom
               - map.lastElementChild.getBoundingClientRect().bottom); }"""
    )


@everywhere
def test_the_map_outlives_a_reload_of_the_workflow_and_is_no_widget_value(page, shot, errors):
    do.open_graph(page, do.hywu_graph("sharpen the image"))
    do.run(page)
    do.look_at(page, "HYWUGenerateLoRA")
    do.wait_on_screen(page, MAP, 1)
    before = map_pixels(page)
    saved = json.loads(page.evaluate("JSON.stringify(window.app.graph.serialize())"))
    generate = next(n for n in saved["nodes"] if n["type"] == "HYWUGenerateLoRA")
    assert not generate.get("widgets_values")
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    sent = next(n for n in prompt.values() if n["class_type"] == "HYWUGenerateLoRA")
    assert set(sent["inputs"]) == {"generator", "condition"}
    page.evaluate("window.app.graph.clear()")
    do.wait_on_screen(page, MAP, 0)
    page.evaluate("(graph) => window.app.loadGraphData(graph)", saved)
    do.look_at(page, "HYWUGenerateLoRA")
    do.wait_on_screen(page, MAP, 1)
    # the workflow keeps four digits of each norm, which can turn the rounding of a colour
    assert np.abs(map_pixels(page) - before).max() <= 1
    shot("norm_map_reloaded")
    assert errors == []


@everywhere
def test_a_page_opened_anew_shows_what_comfyui_has_kept(page, errors):
    graph = do.hywu_graph("blur it as before")
    for _ in range(2):  # the second run comes from ComfyUI's cache alone
        do.open_graph(page, graph)
        assert page.locator(MAP).count() == 0
        do.run(page)
        do.look_at(page, "HYWUGenerateLoRA")
        do.wait_on_screen(page, MAP, 1)
        assert "blur it as before" in page.locator(MAP).first.inner_text()
        do.look_at(page, "HYWUApplyLoRA")
        page.locator(REPORT, has_text="matched: ").first.wait_for(timeout=10_000)
    assert errors == []


@everywhere
def test_warnings_and_reports_stand_on_the_nodes_and_go_when_there_are_none(page, shot, errors):
    do.open_graph(page, do.hywu_graph("add a red hat to the dog"))
    do.run(page)
    do.look_at(page, "HYWUConditionEncode")
    warning = page.locator(WARNING, has_text="add a red hat")
    warning.first.wait_for(timeout=10_000)
    shot("warning")
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.hywu-notice')].map((notice) =>
             notice.getBoundingClientRect().bottom
               - notice.parentElement.getBoundingClientRect().bottom)"""
    )
    assert max(cut) <= 1, "the last lines are cut"
    page.evaluate(
        """() => { window.app.graph._nodes.find((n) => n.type === 'HYWUConditionEncode')
             .widgets.find((w) => w.name === 'instruction').value = 'blur the image'; }"""
    )
    do.run(page)
    warning.first.wait_for(state="detached", timeout=10_000)
    page.locator(REPORT, has_text="tokens: ").first.wait_for(timeout=10_000)
    # what a node says before it ends
    page.evaluate(
        """() => { const node = window.app.graph._nodes.find((n) => n.type === 'HYWUConditionEncode').id;
             const output = {text: ['<think>so far'], hywu_warnings: ['Ended early.']};
             window.app.api.dispatchEvent(new CustomEvent('hywu_text', {detail: {node, output}})); }"""
    )
    page.locator(REPORT, has_text="<think>so far").first.wait_for(timeout=10_000)
    page.locator(WARNING, has_text="Ended early.").first.wait_for(timeout=10_000)
    assert errors == []


def test_what_is_no_map_is_passed_over(page, errors):
    """A workflow of another version, or edited by hand, must load all the same."""
    do.open_graph(page, do.hywu_graph())
    unexpected = [None, 5, "map", [], [{}], [{"layers": ["0"], "modules": ["a"], "norms": [[1, 2]]}],
           [{"layers": [], "modules": [], "norms": []}], [{"layers": "0", "modules": "a"}]]  # fmt: skip
    page.evaluate(
        """(unexpected) => { const n = window.app.graph._nodes.find((n) => n.type === 'HYWUInspectLoRA');
             for (const value of unexpected) n.onExecuted({hywu_norms: value}); n.onExecuted(undefined);
             for (const value of unexpected) { n.properties.hywu_norms = value; n.onConfigure(n.serialize()); } }""",
        unexpected,
    )
    assert page.locator(MAP).count() == 0
    assert errors == []


def test_help_opens_with_its_image(page, artefacts, errors):
    do.open_graph(page, do.hywu_graph())
    do.look_at(page, "HYWUGenerateLoRA", select=True)
    page.get_by_test_id("info-button").click()
    heading = page.locator("h1", has_text="HY-WU Generate LoRA")
    heading.wait_for(timeout=15_000)
    image = page.locator("img[src*='images/HYWUGenerateLoRA.webp']")
    image.wait_for(timeout=10_000)
    page.wait_for_timeout(700)
    assert image.evaluate("image => image.naturalWidth") > 200
    assert page.get_by_text("Errors and ways out").count() == 1
    page.screenshot(path=artefacts / "help.png")
    assert errors == []


class TestInChinese:
    @pytest.fixture
    def settings(self, settings):
        return {**settings, "Comfy.Locale": "zh"}

    def test_nodes_sockets_and_help_are_chinese(self, page, artefacts, errors):
        page.evaluate("window.app.graph.clear()")
        page.evaluate(
            """() => { const n = window.LiteGraph.createNode('HYWUApplyLoRA');
                 window.app.graph.add(n); n.pos = [0, 0]; }"""
        )
        do.look_at(page, "HYWUApplyLoRA", select=True)
        shown = page.evaluate(
            """() => { const n = window.app.graph._nodes[0];
                 return [n.title, ...n.inputs.map((i) => i.label ?? i.localized_name),
                         ...n.outputs.map((o) => o.label ?? o.localized_name)]; }"""
        )
        assert shown[0] == "应用生成的 LoRA"
        assert {"模型", "强度", "模式", "报告"} <= set(shown)
        page.get_by_test_id("info-button").click()
        page.locator("h1", has_text="应用生成的 LoRA").wait_for(timeout=15_000)
        page.wait_for_timeout(700)
        page.screenshot(path=artefacts / "chinese.png")
        assert errors == []

    @everywhere
    def test_new_nodes_are_english_after_the_language_has_changed(self, page, errors):
        page.evaluate("window.app.extensionManager.setting.set('Comfy.Locale', 'en')")
        page.wait_for_timeout(1500)
        shown = page.evaluate(
            """async () => { await window.app.reloadNodeDefs?.();
                 const n = window.LiteGraph.createNode('HYWUApplyLoRA');
                 window.app.graph.add(n);
                 return [n.title, ...n.inputs.map((i) => i.label ?? i.localized_name ?? i.name)]; }"""
        )
        assert shown[0] == "Apply Generated LoRA"
        assert all(text.isascii() for text in shown), shown
        assert errors == []


def test_three_nodes_are_added_by_search_and_wired_by_hand(page, artefacts, errors):
    # A text of its own: ComfyUI reports nothing about nodes whose results it still has
    do.open_graph(page, do.edit_graph("blur it by hand"))
    page.evaluate(
        """() => { const c = window.app.canvas; c.ds.scale = 0.55; c.ds.offset = [160, 140];
             const at = {LoadImage: [0, 0], HYWULoadGenerator: [0, 480], HYWULoadBundledEditor: [0, 660],
               CLIPTextEncode: [440, 700], InstructPixToPixConditioning: [900, 800],
               KSampler: [1300, 500], VAEDecode: [1700, 500], SaveImage: [2000, 500]};
             for (const n of window.app.graph._nodes) n.pos = at[n.type];
             window.app.graph.setDirtyCanvas(true, true); }"""
    )
    added = {
        "HYWUConditionEncode": ("HY-WU Condition Encode", (420, 160)),
        "HYWUGenerateLoRA": ("HY-WU Generate LoRA", (680, 240)),
        "HYWUApplyLoRA": ("Apply Generated LoRA", (920, 160)),
    }
    for class_name, (name, at) in added.items():
        do.add_by_search(page, name, class_name, at)
    do.connect(page, "HYWULoadGenerator", "generator", "HYWUConditionEncode", "generator")
    do.connect(page, "LoadImage", "IMAGE", "HYWUConditionEncode", "image")
    do.connect(page, "HYWULoadGenerator", "generator", "HYWUGenerateLoRA", "generator")
    do.connect(page, "HYWUConditionEncode", "condition", "HYWUGenerateLoRA", "condition")
    do.connect(page, "HYWUGenerateLoRA", "lora", "HYWUApplyLoRA", "lora")
    do.connect(page, "HYWULoadBundledEditor", "model", "HYWUApplyLoRA", "model")
    do.connect(page, "HYWUApplyLoRA", "model", "KSampler", "model")
    page.evaluate(
        """() => { window.app.graph._nodes.find((n) => n.type === 'HYWUConditionEncode')
             .widgets.find((w) => w.name === 'instruction').value = 'blur it by hand'; }"""
    )
    page.screenshot(path=artefacts / "wired_by_hand.png")
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    links = {
        (n["class_type"], name): prompt[value[0]]["class_type"]
        for n in prompt.values()
        for name, value in n["inputs"].items()
        if isinstance(value, list)
    }
    assert links["KSampler", "model"] == "HYWUApplyLoRA"
    assert links["HYWUApplyLoRA", "lora"] == "HYWUGenerateLoRA"
    do.run(page)
    page.screenshot(path=artefacts / "wired_by_hand_done.png")
    do.look_at(page, "HYWUGenerateLoRA")  # at this zoom current frontends leave widgets out
    assert page.locator(MAP).count() == 1
    assert do.saved_image(page)["filename"].startswith("browser")
    assert errors == []


def test_a_dropped_image_brings_its_graph(page, server, tmp_path, artefacts, errors):
    do.open_graph(page, do.hywu_graph("blur the picture"))
    do.run(page)
    saved = server.base / "output" / do.saved_image(page)["filename"]
    assert "workflow" in Image.open(io.BytesIO(saved.read_bytes())).info
    wanted = do.types(page)
    page.evaluate("window.app.graph.clear()")
    do.drop(page, saved, "image/png")
    page.wait_for_function(f"window.app.graph._nodes.length === {len(wanted)}")
    assert do.types(page) == wanted
    do.run(page)  # what was brought also runs
    page.screenshot(path=artefacts / "dropped_image.png")
    assert errors == []
