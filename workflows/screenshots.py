"""Screenshots of every template, blueprint and app in the real frontend, and what is wrong in them.

`python3 dev.py screenshots` calls it with a running server. Each template is opened from the template dialog,
in both renderers and in two sizes of window, and each blueprint is put on an empty canvas. Nodes that overlap,
text too small to be drawn, and nodes outside the window are said, and make the exit code 1.
"""

from __future__ import annotations

import argparse
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from hywu_core.cli.console import say
from hywu_core.errors import HYWUError, need
from hywu_core.headless.local import get_json

from . import blueprints, build, thumbnails, wires
from .browser import FLAGS, SETTINGS, find_chromium, open_frontend

GRAPH = build.ROOT / "docs" / "images" / "graph.jpg"
SIZES = ((1920, 1080), (1440, 900))
RENDERERS = {"classic": False, "nodes2": True}
#: Below about .57 the classic renderer leaves out all text.
READABLE = 0.6
#: Pixels between a wire and a node that isn't its own.
WIRE_ROOM = 3
#: Boxes of all nodes in pixels of the page: as the Vue renderer drew them, else as the canvas does.
BOXES = """() => window.app.graph._nodes.map((n) => {
    const ds = window.app.canvas.ds, page = window.app.canvas.canvas.getBoundingClientRect();
    const drawn = document.querySelector(`[data-node-id="${n.id}"]`)?.getBoundingClientRect();
    if (drawn?.width) return [n.title, drawn.x, drawn.y, drawn.right, drawn.bottom, n.id];
    const b = n.getBounding();
    const at = (v, i) => (v + ds.offset[i]) * ds.scale + (i ? page.y : page.x);
    return [n.title, at(b[0], 0), at(b[1], 1), at(b[0] + b[2], 0), at(b[1] + b[3], 1), n.id];
})"""

#: Each link in pixels of the page: its nodes, and its sockets where the Vue renderer drew them, else the canvas.
WIRES = """() => {
    const graph = window.app.canvas.graph, ds = window.app.canvas.ds;
    const page = window.app.canvas.canvas.getBoundingClientRect();
    const at = (id, slot, input) => {
        const key = `${id}-${input ? 'in' : 'out'}-${slot}`;
        const dot = document.querySelector(`[data-slot-key="${key}"]`)?.getBoundingClientRect();
        if (dot?.width) return [dot.x + dot.width / 2, dot.y + dot.height / 2];
        const node = graph.getNodeById(id);
        const [x, y] = input ? node.getInputPos(slot) : node.getOutputPos(slot);
        return [(x + ds.offset[0]) * ds.scale + page.x, (y + ds.offset[1]) * ds.scale + page.y];
    };
    return [...graph.links.values()].map((l) => [l.origin_id, l.target_id,
        at(l.origin_id, l.origin_slot, false), at(l.target_id, l.target_slot, true)]);
}"""


def settings_of(renderer: str) -> dict[str, Any]:
    """A user's settings with this renderer. Older frontends have the classic one only."""
    return {**SETTINGS, "Comfy.VueNodes.Enabled": RENDERERS[renderer]}


def open_template(page: Any, file: str) -> None:
    """Open one of the extension's templates as a user does, from the dialog."""
    page.evaluate("window.app.graph.clear()")
    page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("hywu", exact=True).last.click()
    card = dialog.get_by_test_id(f"template-workflow-{file}")
    card.wait_for(timeout=30_000)
    card.scroll_into_view_if_needed()
    card.click()
    page.wait_for_function("window.app.graph._nodes.length > 0", timeout=30_000)
    page.wait_for_timeout(1500)  # sizes settle a few frames later


def overlaps(boxes: list[list]) -> list[str]:
    """Pairs of nodes that lie on each other by more than a pixel; boxes as `BOXES` gives them."""
    found = []
    for one, two in itertools.combinations(boxes, 2):
        across = min(one[3], two[3]) - max(one[1], two[1])
        down = min(one[4], two[4]) - max(one[2], two[2])
        if across > 1 and down > 1:
            found.append(f"'{one[0]}' over '{two[0]}' by {across:.0f} x {down:.0f} pixels")
    return found


def cut_texts(page: Any) -> list[str]:
    """Texts of the Vue renderer's toggles that are wider than the room they have."""
    return page.evaluate(
        """() => window.app.canvas.graph._nodes
             .filter((n) => n.subgraph || n.type.startsWith('HYWU'))
             .flatMap((n) => [...document.querySelectorAll(`[data-node-id="${n.id}"] button`),
                              ...document.querySelectorAll(`[data-node-id="${n.id}"] [role=radio]`)])
             .filter((e) => e.textContent.trim() && e.scrollWidth > e.clientWidth + 1)
             .map((e) => `the text '${e.textContent.trim()}' is cut`)"""
    )


def wires_behind(page: Any, boxes: list[list]) -> list[str]:
    """Wires of the open graph that run behind or along its nodes; boxes as `BOXES` gives them."""
    drawn = [
        wires.Wire(source, target, start, end)
        for source, target, start, end in page.evaluate(WIRES)
    ]
    return wires.behind(drawn, [wires.Box(ident, *box) for *box, ident in boxes], WIRE_ROOM)


def problems(page: Any) -> list[str]:
    """What keeps the open graph from being read: small text, overlaps, hidden wires, nodes outside the window."""
    boxes = page.evaluate(BOXES)
    found = [*overlaps(boxes), *cut_texts(page), *wires_behind(page, boxes)]
    scale = page.evaluate("window.app.canvas.ds.scale")
    if scale < READABLE:
        found.append(f"drawn at {scale:.2f}, text needs {READABLE}")
    width, height = page.viewport_size["width"], page.viewport_size["height"]
    for title, left, top, right, bottom, _ in boxes:
        if left < 0 or top < 0 or right > width or bottom > height:
            found.append(f"'{title}' is not wholly in the window")
    return found


def names_outside(page: Any) -> list[str]:
    """Which names of the open subgraph's inputs or outputs are not wholly on the canvas."""
    return page.evaluate(
        """() => { const c = window.app.canvas, room = c.canvas.getBoundingClientRect();
             const beside = document.querySelector('.side-tool-bar-container')?.getBoundingClientRect();
             const at = (x) => (x + c.ds.offset[0]) * c.ds.scale + room.x;
             return [...c.graph.inputs, ...c.graph.outputs].filter(({boundingRect: [x, , width]}) =>
               at(x) < (beside?.right ?? 0) || at(x + width) > room.right
             ).map((slot) => `the name of '${slot.name}' is not wholly in the window`); }"""
    )


def put_blueprint(page: Any, file: dict) -> None:
    """A blueprint's node alone on the canvas, large."""
    page.evaluate(
        """async (file) => {
             await window.app.loadGraphData(file);
             const c = window.app.canvas, n = window.app.graph._nodes[0];
             c.ds.scale = 1.5;
             c.ds.offset = [200 - n.pos[0], 150 - n.pos[1]];
             window.app.graph.setDirtyCanvas(true, true); }""",
        file,
    )
    page.wait_for_timeout(1200)


def enter(page: Any) -> None:
    """Open the subgraph that is the first node of the graph, fitted to the window."""
    page.evaluate(
        """() => { const c = window.app.canvas, n = window.app.graph._nodes[0];
             c.openSubgraph(n.subgraph, n); }"""
    )
    page.wait_for_timeout(800)
    page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1200)


def toggle_app(page: Any) -> None:
    """Into App mode or back; the first time, its tour is skipped."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.ToggleLinear')")
    page.wait_for_timeout(1500)
    skip = page.get_by_role("button", name="Skip")
    if skip.count() and skip.first.is_visible():
        skip.first.click()
        page.wait_for_timeout(800)


def shoot_templates(page: Any, folder: Path, renderer: str) -> Iterator[str]:
    """All templates, and in Nodes 2.0 their apps, in the page's window; yields what is wrong."""
    size = "{width}x{height}".format(**page.viewport_size)
    for name in build.names():
        open_template(page, build.file_of(name).stem)
        page.screenshot(path=folder / f"{name}_{renderer}_{size}.png")
        # smaller windows are looked at, but a graph needs to fit a full HD one only
        full = page.viewport_size["width"] == SIZES[0][0]
        wrong = problems(page) if full else overlaps(page.evaluate(BOXES))
        yield from (f"{name}, {renderer}, {size}: {one}" for one in wrong)
        if build.layout_of(name).get("app") and renderer == "nodes2":
            toggle_app(page)
            page.screenshot(path=folder / f"{name}_app_{size}.png")
            toggle_app(page)


def shoot_blueprints(page: Any, folder: Path, renderer: str, info: dict) -> Iterator[str]:
    """Every blueprint as a node and from inside; yields what is wrong."""
    inside = BOXES.replace("app.graph._nodes", "app.canvas.graph._nodes")
    for name in blueprints.names():
        put_blueprint(page, blueprints.library_file(name, info))
        page.screenshot(path=folder / f"blueprint_{name}_{renderer}.png")
        wrong = cut_texts(page)
        enter(page)
        page.screenshot(path=folder / f"blueprint_{name}_{renderer}_inside.png")
        wrong += [*overlaps(page.evaluate(inside)), *cut_texts(page), *names_outside(page)]
        yield from (f"blueprint {name}, {renderer}: {one}" for one in wrong)


def shoot(server: str, folder: Path) -> list[str]:
    """All screenshots, PNG files in `folder`; returns what is wrong in them. Raises HYWUError."""
    playwright = need("playwright.sync_api", "to take screenshots")
    chromium = find_chromium()
    if chromium is None:
        raise HYWUError(
            "there is no Chromium here; install it (`apt-get install chromium`) or set CHROMIUM."
        )
    folder.mkdir(parents=True, exist_ok=True)
    info = get_json(f"{server}/object_info", timeout=60)
    wrong: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        for renderer, (width, height) in itertools.product(RENDERERS, SIZES):
            context = browser.new_context(viewport={"width": width, "height": height})
            page = open_frontend(context, server, settings_of(renderer))
            wrong += shoot_templates(page, folder, renderer)
            if width == SIZES[0][0]:
                wrong += shoot_blueprints(page, folder, renderer, info)
            context.close()
            say(f"{renderer}, {width}x{height}: done")
        browser.close()
    return wrong


def shoot_graph(server: str, path: Path) -> None:
    """The README's image of a graph: the first template after a run, in Nodes 2.0, cut to its nodes."""
    playwright = need("playwright.sync_api", "to take screenshots")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        context = browser.new_context(viewport={"width": SIZES[0][0], "height": SIZES[0][1]})
        plain = {"Comfy.Minimap.Visible": False}
        page = open_frontend(context, server, settings_of("nodes2") | plain)
        open_template(page, build.file_of(build.names()[0]).stem)
        page.evaluate("window.app.queuePrompt(0, 1)")
        page.wait_for_selector(".hywu-norm-map", timeout=600_000)
        page.wait_for_function(
            """() => window.app.graph._nodes.filter((n) => n.type === 'SaveImage')
                 .every((n) => window.app.nodeOutputs[n.id]?.images?.length)""",
            timeout=600_000,
        )
        page.mouse.move(2, 2)
        page.wait_for_timeout(3000)
        boxes = page.evaluate(BOXES)
        left, top = (min(box[side] for box in boxes) - 20 for side in (1, 2))
        right, bottom = (max(box[side] for box in boxes) + 20 for side in (3, 4))
        clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        content = page.screenshot(clip=clip)
        browser.close()
    with Image.open(io.BytesIO(content)) as image:
        build.write(path, thumbnails.jpeg(image.convert("RGB"), 150_000))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m workflows.screenshots", description=__doc__)
    parser.add_argument("--server", required=True, help="address of a running ComfyUI")
    parser.add_argument("--out", type=Path, default=build.ROOT / "artefacts" / "templates")
    parser.add_argument("--graph", action="store_true", help="only docs/images/graph.jpg anew")
    args = parser.parse_args()
    try:
        if args.graph:
            shoot_graph(args.server, GRAPH)
            return 0
        wrong = shoot(args.server, args.out)
    except HYWUError as error:
        raise SystemExit(f"screenshots: {error}") from error
    for one in wrong:
        say(one)
    say(f"screenshots: {args.out}, {len(wrong)} faults")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
