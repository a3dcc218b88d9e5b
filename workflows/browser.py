"""A real browser on a server's frontend: for the tests of tests/browser and the images of the help pages."""

from __future__ import annotations

import functools
import os
import shutil
from typing import Any

from hywu_core.headless.local import get_json

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
#: What a user who has been here before has set; the first visit would open the templates.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Locale": "en",
    "Comfy.ColorPalette": "dark",
    "Comfy.NodeSearchBoxImpl": "default",
    "Comfy.NodeSearchBoxImpl.NodePreview": False,
    "Comfy.LinkRelease.Action": "no action",
}


#: On a busy machine nodes are registered after the first workflow is there, one by one: true when all are.
ALL_NODES = """(names) => {
    const known = window.LiteGraph?.registered_node_types ?? {};
    return names.every((name) => name in known);
}"""


def find_chromium() -> str | None:
    """The path of a Chromium: CHROMIUM's, or one that is installed."""
    named = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    return next((path for name in named if name and (path := shutil.which(name))), None)


@functools.cache
def node_classes(url: str) -> list[str]:
    """Names of all classes of nodes that the server at `url` has."""
    return list(get_json(f"{url}/object_info", timeout=60))


def open_frontend(context: Any, url: str, settings: dict[str, Any]) -> Any:
    """A page of a Playwright `context` with the frontend at `url` loaded, for a user with these settings."""
    context.request.post(f"{url}/settings", data=settings)
    page = context.new_page()
    page.goto(url, timeout=120_000)  # a busy machine with two cores took more than 30 s
    page.wait_for_function("window.app?.extensionManager?.workflow?.activeWorkflow", timeout=90_000)
    page.wait_for_function("!document.querySelector('.p-blockui-mask')")  # the splash is gone
    page.wait_for_function(ALL_NODES, arg=node_classes(url), polling=100, timeout=90_000)
    page.wait_for_timeout(500)
    return page
