"""ComfyUI below a path of a reverse proxy: the page's script, texts and templates of the extension are found.

In the newest frontend: 1.32.2 to 1.34.0, 0.3.75's own among them, draw no page there (their router began with
a path of its own).
"""

from __future__ import annotations

from urllib.parse import urlsplit

import actions as do
from PIL import Image
from proxy import Proxy

from hywu_core.evaluation.benchmarks import BENCHMARKS
from workflows.browser import SETTINGS, open_frontend

SEED = """() => {
    const node = window.LiteGraph.createNode("HYWUTrainGenerator");
    return [node.title, node.widgets.find((w) => w.name === "seed").linkedWidgets[0].value]; }"""
TEMPLATES = """async () => (await window.app.api.getWorkflowTemplates()).hywu"""


def test_below_a_path_everything_of_ours_is_found(browser, servers):
    server = servers.get(True)
    photo = Image.open(BENCHMARKS["folder"].sample / "sources" / "astronaut.jpg")
    photo.resize((64, 64)).save(server.base / "input" / "photo.png")
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    asked: list[str] = []
    refused: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    context.on("response", lambda answer: answer.status >= 400 and refused.append(answer.url))
    with Proxy(server.url, prefix="/comfy") as proxy:
        try:
            page = open_frontend(context, proxy.url, SETTINGS | {"Comfy.Locale": "zh"})
            title, after = page.evaluate(SEED)
            assert any(ord(letter) > 0x4DFF for letter in title), title
            assert after == "fixed"
            assert page.evaluate(TEMPLATES)[0].startswith("01")
            do.open_graph(page, do.hywu_graph())
            do.run(page)
            do.look_at(page, "HYWUGenerateLoRA")
            do.wait_on_screen(page, ".hywu-norm-map", 1)
        finally:
            context.close()
    here = [urlsplit(url) for url in asked if url.startswith(proxy.url.removesuffix("/comfy"))]
    assert any("/extensions/hywu/js/hywu.js" in url.path for url in here)
    # the frontend asks for its own icons from the root
    outside = {url.path for url in here if not url.path.startswith(("/comfy/", "/assets/"))}
    assert outside <= {"/comfy"}
    assert [url for url in refused if "hywu" in url] == []
