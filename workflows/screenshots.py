"""Screenshots of every template, blueprint and app in the real frontend, and what is wrong in them.

`python3 dev.py screenshots` calls it with a running server. Each template is opened from the template dialog,
in both renderers and in two sizes of window, and each blueprint is put on an empty canvas. Nodes that overlap,
text too small to be drawn, and nodes outside the window are said, and make the exit code 1.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hywu_core.cli.console import say
from hywu_core.errors import HYWUError, need

from . import blueprints, build
from .browser import FLAGS, SETTINGS, find_chromium, open_frontend

SIZES = ((1920, 1080), (1440, 900))
RENDERERS = {"classic": False, "nodes2": True}
#: Below about .57 the classic renderer leaves out all text.
READABLE = 0.6
#: Boxes of all nodes in pixels of the page: as the Vue renderer drew them, else as the canvas does.
BOXES = """() => window.app.graph._nodes.map((n) => {
    const ds = window.app.canvas.ds, page = window.app.canvas.canvas.getBoundingClientRect();
    const drawn = document.querySelector(`[data-node-id="${n.id}"]`)?.getBoundingClientRect();
    if (drawn?.width) return [n.title, drawn.x, drawn.y, drawn.right, drawn.bottom];
    const b = n.getBounding();
    const at = (v, i) => (v + ds.offset[i]) * ds.scale + (i ? page.y : page.x);
    return [n.title, at(b[0], 0), at(b[1], 1), at(b[0] + b[2], 0), at(b[1] + b[3], 1)];
})"""


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


def overlaps(page: Any) -> list[str]:
    """Pairs of nodes that lie on each other by more than a pixel."""
    found = []
    for one, two in itertools.combinations(page.evaluate(BOXES), 2):
        across = min(one[3], two[3]) - max(one[1], two[1])
        down = min(one[4], two[4]) - max(one[2], two[2])
        if across > 1 and down > 1:
            found.append(f"'{one[0]}' over '{two[0]}' by {across:.0f} x {down:.0f} pixels")
    return found


def problems(page: Any) -> list[str]:
    """What keeps the open graph from being read: small text, overlaps, nodes outside the window."""
    found = overlaps(page)
    scale = page.evaluate("window.app.canvas.ds.scale")
    if scale < READABLE:
        found.append(f"drawn at {scale:.2f}, text needs {READABLE}")
    width, height = page.viewport_size["width"], page.viewport_size["height"]
    for title, left, top, right, bottom in page.evaluate(BOXES):
        if left < 0 or top < 0 or right > width or bottom > height:
            found.append(f"'{title}' is not wholly in the window")
    return found


def put_blueprint(page: Any, file: dict) -> None:
    """A blueprint's node alone on the canvas, at natural size."""
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


def shoot(page: Any, folder: Path, what: str, renderer: str, size: str) -> Iterator[str]:
    """All templates, blueprints and apps in one window; yields what is wrong."""
    for name in build.names():
        file = build.file_of(name).stem
        open_template(page, file)
        page.screenshot(path=folder / f"{name}_{what}.png")
        # 1440 x 900 is looked at, but a graph needs to fit a full HD window only
        wrong = problems(page) if size == "1920x1080" else overlaps(page)
        yield from (f"{name}, {renderer}, {size}: {one}" for one in wrong)
        if build.layout_of(name).get("app") and renderer == "nodes2":
            page.evaluate("window.app.extensionManager.command.execute('Comfy.ToggleLinear')")
            page.wait_for_timeout(1500)
            page.screenshot(path=folder / f"{name}_{what}_app.png")
            page.evaluate("window.app.extensionManager.command.execute('Comfy.ToggleLinear')")
            page.wait_for_timeout(800)


def shoot_blueprints(page: Any, folder: Path, renderer: str, info: dict) -> Iterator[str]:
    for name in blueprints.names():
        put_blueprint(page, blueprints.library_file(name, info))
        page.screenshot(path=folder / f"blueprint_{name}_{renderer}.png")
        enter(page)
        page.screenshot(path=folder / f"blueprint_{name}_{renderer}_inside.png")
        yield from (f"blueprint {name}, {renderer}, inside: {one}" for one in inside(page))


def inside(page: Any) -> list[str]:
    return overlaps_of(page.evaluate(BOXES.replace("app.graph._nodes", "app.canvas.graph._nodes")))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m workflows.screenshots", description=__doc__)
    parser.add_argument("--server", required=True, help="address of a running ComfyUI")
    parser.add_argument("--out", type=Path, default=build.ROOT / "artefacts" / "templates")
    args = parser.parse_args()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
