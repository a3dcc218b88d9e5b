"""The real frontend loads and runs a stock graph."""

from __future__ import annotations

import json

GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {
        "width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
}  # fmt: skip


def test_a_graph_is_loaded_queued_and_its_image_comes_back(page, artefacts):
    page.evaluate(f"window.app.loadApiJson({json.dumps(GRAPH)}, 'graph.json')")
    assert page.evaluate("window.app.graph._nodes.map(n => n.type).sort().join()") == (
        "EmptyImage,PreviewImage"
    )
    page.evaluate("window.app.queuePrompt(0, 1)")
    # The state behind the image; the new renderer draws it without a LiteGraph image.
    page.wait_for_function("Object.keys(window.app.nodeOutputs || {}).length > 0", timeout=60_000)
    page.screenshot(path=artefacts / "stock_graph.png")
    outputs = page.evaluate("Object.values(window.app.nodeOutputs)[0].images")
    assert outputs[0]["filename"].endswith(".png")
