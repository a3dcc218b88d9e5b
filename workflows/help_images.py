"""Make the images of the help pages, web/docs/images/CLASS.webp: each node in the real frontend.

`python3 dev.py help-images` calls it with a running server. One graph holds every node of the extension. For
each image the node stands in the middle of the canvas, links coming and going, and is cut out; nodes
that draw something of a run have run before.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hywu_core.cli.console import say
from hywu_core.errors import HYWUError, need
from hywu_core.files import atomic_path, write_text
from hywu_core.headless.local import get_json

from .browser import FLAGS, SETTINGS, find_chromium, open_frontend

DOCS = Path(__file__).parents[1] / "web" / "docs" / "images"
#: Pixels of the window; an image's width, and the node's within it.
WINDOW, WIDTH, NODE = (1400, 1700), 492, 412
#: Zoom, and the height from which on a node is drawn at its natural size.
ZOOM, TALL = 4 / 3, 600
#: Class -> height of a node with a map, whatever weights it is of; the others are as high as needed.
HEIGHTS = {"HYWUGenerateLoRA": 260, "HYWUInspectLoRA": 260}
#: Class -> id of the node in `GRAPH` that is run before its image is taken.
RUN = {"HYWUGenerateLoRA": "8", "HYWUInspectLoRA": "8"}
QUALITY = 82
#: The user's settings: nodes without a badge that says which extension they are of.
PLAIN = {**SETTINGS, "Comfy.NodeBadge.NodeSourceBadgeMode": "None"}
#: Start of the extension's class names.
OWN = "HYWU"


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of an API-format graph; widgets that aren't named have their defaults."""
    return {"class_type": class_type, "inputs": inputs}


#: Every node once, and stock nodes at the other ends of their links.
GRAPH = {
    "1": node("LoadImage", image="hywu_coffee.png"),
    "2": node("HYWULoadBundledEditor"),
    "3": node("HYWULoadGenerator"),
    "4": node("HYWUConditionEncode", generator=["3", 0], image=["1", 0], instruction="blur the image"),
    "5": node("HYWUGenerateLoRA", generator=["3", 0], condition=["4", 0]),
    "6": node("HYWULoRAScope", end_percent=0.6, module_strengths="*attn* = 0.5"),
    "7": node("HYWUApplyLoRA", model=["2", 0], lora=["5", 0], scope=["6", 0]),
    "8": node("HYWUInspectLoRA", lora=["5", 0]),
    "9": node("HYWUSaveCondition", condition=["4", 0]),
    "10": node("HYWULoadCondition", condition="hywu_00001_.safetensors"),
    "11": node("HYWUGenerateLoRA", generator=["3", 0], condition=["10", 0]),
    "12": node("HYWULoadLoRA", lora="bundled: single blur", model=["2", 0]),
    "13": node("HYWUBlendLoRA", lora_a=["5", 0], lora_b=["12", 0]),
    "14": node("HYWUSelectLoRA", lora=["13", 0]),
    "15": node("HYWUSaveLoRA", lora=["14", 0]),
    "16": node("HYWULoRAHook", model=["2", 0], lora=["5", 0]),
    "17": node("CLIPTextEncode", text="", clip=["2", 1]),
    "18": node("ConditioningSetProperties", cond_NEW=["17", 0], hooks=["16", 0], strength=1.0,
               set_cond_area="default"),
    "19": node("HYWUModelLayout", model=["2", 0]),
    "20": node("PreviewAny", source=["19", 0]),
    "21": node("HYWUTrainGenerator", model=["2", 0], vae=["2", 2], clip=["2", 1]),
    "22": node("SaveImage", images=["21", 3]),
    "23": node("HYWUBenchmarkItems"),
    "24": node("HYWUJudge", image=["23", 0], item=["23", 2], method="unchanged"),
    "25": node("HYWUScoreTable", scores=["24", 0]),
    "26": node("SaveImage", images=["25", 1]),
    "27": node("VAEDecode", samples=["28", 0], vae=["2", 2]),
    "28": node("KSampler", model=["7", 0], positive=["18", 0], negative=["17", 0]),
    "29": node("HYWULoadHunyuanImage3"),
    "30": node("HYWUHunyuanThink", model=["29", 0], instruction="make it night", image=["1", 0]),
    "31": node("HYWUHunyuanEditPrompt", hunyuan=["29", 2], instruction="make it night", image=["1", 0],
               cot=["30", 0], model=["29", 0]),
    "32": node("KSampler", model=["29", 0], positive=["31", 0], negative=["31", 1], latent_image=["31", 2]),
    "33": node("VAEDecode", samples=["32", 0], vae=["29", 1]),
}  # fmt: skip

#: What a run of node 8 draws is there: maps of two nodes, and its image.
SHOWN = """() => document.querySelectorAll('.hywu-norm-map').length > 1
    && Object.values(window.app.nodeOutputs).some((o) => o.images?.length)
    && !window.app.runningNodeId"""
#: Puts one node in the middle, what it feeds to the right, all others to the left.
ALONE = """([id, width, height, zoom, tall]) => {
    const app = window.app, graph = app.graph, ds = app.canvas.ds;
    const n = graph.getNodeById(id), box = app.canvas.canvas.getBoundingClientRect();
    const ends = (links) => links.map((l) => graph.links.get?.(l) ?? graph.links[l]).filter(Boolean);
    const fed = ends(n.outputs.flatMap((o) => o.links ?? [])).map((l) => l.target_id);
    n.pos = [0, 0];
    n.size = [width / zoom, 0];
    const least = Math.max(height, n.computeSize()[1]);
    if (least > tall) zoom = 1;
    n.setSize([width / zoom, least]);
    for (const other of graph._nodes)
      if (other !== n) other.pos = [fed.includes(other.id) ? 1500 : -1500, 0];
    app.canvas.deselectAllNodes?.();
    ds.scale = zoom;
    ds.offset = [(box.width / zoom - n.size[0]) / 2, 120];
    graph.setDirtyCanvas(true, true);
    return [box.x + ds.offset[0] * zoom, box.y + 120 * zoom, n.size[0] * zoom, n.size[1] * zoom,
            window.LiteGraph.NODE_TITLE_HEIGHT * zoom];
}"""


def is_link(value: Any) -> bool:
    return isinstance(value, list)


def sources(ident: str) -> set[str]:
    """Ids of the nodes that feed a node."""
    return {value[0] for value in GRAPH[ident]["inputs"].values() if is_link(value)}


def around(ident: str) -> dict[str, dict]:
    """The node with those that it has links with, and no links among these."""
    kept = {ident, *sources(ident), *(other for other in GRAPH if ident in sources(other))}
    graph = {}
    for name in sorted(kept, key=int):
        inputs = {
            key: value
            for key, value in GRAPH[name]["inputs"].items()
            if name == ident or not is_link(value) or value[0] == ident
        }
        graph[name] = {**GRAPH[name], "inputs": inputs}
    return graph


def before(ident: str) -> dict[str, dict]:
    """The node with everything that it needs to run."""
    kept, new = {ident}, {ident}
    while new := {source for name in new for source in sources(name)} - kept:
        kept |= new
    return {name: GRAPH[name] for name in sorted(kept, key=int)}


def open_graph(page: Any, class_type: str, ident: str) -> None:
    """Load what the image shows, and run it where it shows a run."""
    run = RUN.get(class_type)
    graph = before(run) if run else around(ident)
    page.evaluate("([graph]) => window.app.loadApiJson(graph, 'help.json')", [graph])
    page.wait_for_timeout(500)
    if run:
        page.evaluate("window.app.queuePrompt(0, 1)")
        page.wait_for_function(SHOWN, timeout=240_000)


def draw_one(page: Any, ident: str, class_type: str) -> Image.Image:
    """The node and a little around it, `WIDTH` pixels wide."""
    open_graph(page, class_type, ident)
    arguments = [int(ident), NODE, HEIGHTS.get(class_type, 0), ZOOM, TALL]
    page.evaluate(ALONE, arguments)
    page.wait_for_timeout(700)  # widgets that are elements of the page follow the canvas
    x, y, width, height, title = page.evaluate(ALONE, arguments)
    page.wait_for_timeout(700)
    side = (WIDTH - width) / 2
    clip = {"x": x - side, "y": y - title - 20, "width": WIDTH, "height": height + title + 40}
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


def check_whole(server: str) -> dict[str, str]:
    """Class of each of the extension's nodes -> its first id in the graph.

    Raises HYWUError where the graph lacks one that the server has, or has one that is gone.
    """
    known = {name for name in get_json(f"{server}/object_info", timeout=60) if name.startswith(OWN)}
    idents: dict[str, str] = {}
    for ident, one in GRAPH.items():
        if one["class_type"].startswith(OWN):
            idents.setdefault(one["class_type"], ident)
    if unexpected := sorted(known ^ idents.keys()):
        raise HYWUError(
            f"workflows/help_images.py: its GRAPH and the server differ in {', '.join(unexpected)}; "
            "correct the GRAPH."
        )
    return idents


def draw(server: str, folder: Path, names: Sequence[str] = ()) -> Iterator[Path]:
    """Write the images of these classes of nodes, or of all, to `folder`. Raises HYWUError."""
    playwright = need("playwright.sync_api", "to draw the nodes")
    chromium = find_chromium()
    if chromium is None:
        raise HYWUError(
            "there is no Chromium here; install it (`apt-get install chromium`) or set CHROMIUM."
        )
    idents = check_whole(server)
    if unknown := sorted(set(names) - idents.keys()):
        raise HYWUError(f"there is no node {', '.join(unknown)}; there are {', '.join(idents)}.")
    folder.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        size = dict(zip(("width", "height"), WINDOW, strict=True))
        page = open_frontend(browser.new_context(viewport=size), server, PLAIN)
        for class_type in names or idents:
            path = folder / f"{class_type}.webp"
            with atomic_path(path, overwrite=True) as part:
                image = draw_one(page, idents[class_type], class_type)
                image.save(part, "WEBP", quality=QUALITY, method=6)
            yield path
        browser.close()


def copy_pages(pages: Path) -> None:
    """NAME/en.md from NAME.md: frontends ask for the one first, and for the other in all other languages."""
    for page in pages.glob(f"{OWN}*.md"):
        write_text(pages / page.stem / "en.md", page.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workflows.help_images", description=__doc__)
    parser.add_argument("--server", required=True, help="address of a running ComfyUI")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for the images")
    parser.add_argument("names", nargs="*", help="classes of nodes to draw; all by default")
    args = parser.parse_args()
    copy_pages(DOCS.parent)
    try:
        for path in draw(args.server, args.out, args.names):
            say(str(path))
    except HYWUError as error:
        raise SystemExit(f"help-images: {error}") from error


if __name__ == "__main__":
    main()
