"""What a user does in the frontend, for the tests: run, look at a node, add and connect by mouse, drop."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

#: Whether every SaveImage of the graph has its image.
SAVED = """() => window.app.graph._nodes.filter((n) => n.type === 'SaveImage')
    .every((n) => window.app.nodeOutputs[n.id]?.images?.length)"""


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of an API-format graph."""
    return {"class_type": class_type, "inputs": inputs}


def edit_graph(instruction: str = "blur the image") -> dict[str, dict]:
    """The bundled editor's stock graph; the image is what upload_photo gave."""
    return {
        "1": node("LoadImage", image="photo.png"),
        "2": node("HYWULoadBundledEditor"),
        "3": node("HYWULoadGenerator", checkpoint="bundled", precision="auto"),
        "7": node("CLIPTextEncode", text=instruction, clip=["2", 1]),
        "8": node("InstructPixToPixConditioning", positive=["7", 0], negative=["7", 0],
                  vae=["2", 2], pixels=["1", 0]),
        "9": node("KSampler", model=["2", 0], seed=0, steps=2, cfg=1.0, sampler_name="euler",
                  scheduler="simple", positive=["8", 0], negative=["8", 1],
                  latent_image=["8", 2], denoise=1.0),
        "10": node("VAEDecode", samples=["9", 0], vae=["2", 2]),
        "11": node("SaveImage", images=["10", 0], filename_prefix="browser"),
    }  # fmt: skip


def hywu_graph(instruction: str = "blur the image") -> dict[str, dict]:
    """The same with a generated LoRA, inspected and applied."""
    graph = edit_graph(instruction) | {
        "4": node("HYWUConditionEncode", generator=["3", 0], image=["1", 0],
                  instruction=instruction),
        "5": node("HYWUGenerateLoRA", generator=["3", 0], condition=["4", 0]),
        "6": node("HYWUApplyLoRA", model=["2", 0], lora=["5", 0], strength=1.0, mode="auto",
                  apply_to_negative=True),
        "12": node("HYWUInspectLoRA", lora=["5", 0]),
    }  # fmt: skip
    graph["9"]["inputs"]["model"] = ["6", 0]
    return graph


def open_graph(page, graph: dict[str, dict]) -> None:
    """Load an API-format graph and lay its nodes out so that none hides another."""
    page.evaluate("([graph]) => window.app.loadApiJson(graph, 'test.json')", [graph])
    page.evaluate(
        """() => window.app.graph._nodes.forEach((n, i) => {
             n.pos = [(i % 4) * 480, Math.floor(i / 4) * 420]; })"""
    )
    page.wait_for_timeout(300)


def run(page, timeout: float = 240_000) -> None:
    """Queue the graph by its shortcut; wait until SaveImage has its image."""
    page.evaluate(
        "() => { for (const key in window.app.nodeOutputs) delete window.app.nodeOutputs[key] }"
    )
    page.keyboard.press("Control+Enter")
    page.wait_for_function(SAVED, timeout=timeout)
    page.wait_for_timeout(500)


def look_at(page, class_name: str, select: bool = False) -> None:
    """Bring the first node of a class to the middle of the screen at natural size."""
    page.evaluate(
        """([type, select]) => {
             const n = window.app.graph._nodes.find((n) => n.type === type), c = window.app.canvas;
             c.ds.scale = 1; c.ds.offset = [600 - n.pos[0], 300 - n.pos[1]];
             if (select) c.selectNode(n);
             window.app.graph.setDirtyCanvas(true, true); }""",
        [class_name, select],
    )
    page.wait_for_timeout(700)


def on_screen(page, selector: str) -> int:
    """How many elements can be seen: frontends leave out, or move aside, those of nodes off the screen."""
    return page.evaluate(
        """(selector) => [...document.querySelectorAll(selector)].filter((e) => {
             const b = e.getBoundingClientRect();
             return b.width > 0 && b.right > 0 && b.bottom > 0 && b.x < innerWidth && b.y < innerHeight
               && e.checkVisibility({opacityProperty: true, visibilityProperty: true});
           }).length""",
        selector,
    )


def wait_on_screen(page, selector: str, count: int, timeout: float = 20_000) -> None:
    """Wait until so many elements can be seen. Raises AssertionError."""
    for _ in range(int(timeout / 100)):
        if on_screen(page, selector) == count:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{on_screen(page, selector)} of {selector} on screen, not {count}")


def open_search(page, at: tuple[int, int]):
    """The node search's field, after a double-click on the empty canvas."""
    from playwright.sync_api import TimeoutError as PlaywrightTimeout

    field = page.locator("input[role=combobox]:focus")
    for _ in range(5):
        # on a busy machine the canvas takes two clicks that come late for two single ones
        page.mouse.dblclick(*at)
        with contextlib.suppress(PlaywrightTimeout):
            field.wait_for(timeout=5_000)
            break
    field.wait_for(timeout=5_000)
    return field


def add_by_search(page, name: str, class_name: str, at: tuple[int, int]) -> None:
    """Double-click on the empty canvas, type, press Enter; the node comes to `at`."""
    field = open_search(page, at)
    field.fill(name)
    page.wait_for_timeout(1000)
    page.keyboard.press("Enter")
    found = "window.app.graph._nodes.find((n) => n.type === type)"
    page.wait_for_function(f"([type]) => {found}", arg=[class_name], timeout=10_000)
    page.wait_for_timeout(300)
    # in current frontends a new node hangs on the pointer until a click puts it down
    if page.evaluate(f"([type]) => Boolean({found}.flags?.ghost)", [class_name]):
        page.mouse.move(at[0] + 5, at[1] + 5)
        page.mouse.click(*at)
        page.wait_for_function(
            f"([type]) => !{found}.flags.ghost", arg=[class_name], timeout=10_000
        )
        page.wait_for_timeout(300)


def connect(page, source: str, output: str, target: str, wanted: str) -> None:
    """Drag a link with the mouse from an output to an input, both by class and socket name."""
    ends = page.evaluate(
        """([source, output, target, wanted]) => {
             const find = (type) => window.app.graph._nodes.find((n) => n.type === type);
             const a = find(source), b = find(target), ds = window.app.canvas.ds;
             const box = window.app.canvas.canvas.getBoundingClientRect();
             const place = (n, input, i) => {
               const p = n.getConnectionPos(input, i);
               return [box.x + (p[0] + ds.offset[0]) * ds.scale,
                       box.y + (p[1] + ds.offset[1]) * ds.scale]; };
             return [place(a, false, a.outputs.findIndex((s) => s.name === output)),
                     place(b, true, b.inputs.findIndex((s) => s.name === wanted))]; }""",
        [source, output, target, wanted],
    )
    page.mouse.move(*ends[0])
    page.mouse.down()
    page.mouse.move(*ends[1], steps=8)
    page.mouse.up()
    page.wait_for_timeout(250)


def drop(page, path: Path, kind: str) -> None:
    """Drop a file onto the canvas."""
    data = base64.b64encode(path.read_bytes()).decode()
    page.evaluate(
        """async ([data, name, type]) => {
             const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
             const transfer = new DataTransfer();
             transfer.items.add(new File([bytes], name, {type}));
             document.querySelector('#graph-canvas').dispatchEvent(new DragEvent('drop', {
               dataTransfer: transfer, bubbles: true, cancelable: true,
               clientX: 800, clientY: 500})); }""",
        [data, path.name, kind],
    )


def types(page) -> list[str]:
    """Classes of all nodes in the open graph, sorted."""
    return json.loads(
        page.evaluate("JSON.stringify(window.app.graph._nodes.map((n) => n.type).sort())")
    )


def saved_image(page) -> dict[str, str]:
    """What SaveImage wrote: {filename, subfolder, type}."""
    return page.evaluate(
        """() => { const n = window.app.graph._nodes.find((n) => n.type === 'SaveImage');
             return window.app.nodeOutputs[n.id].images[0]; }"""
    )
