"""Chromium, through Playwright, on the frontend of a real ComfyUI server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import dev
from hywu_core.headless.local import LocalServer

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium. .ci/run installs one; a machine without one says so and skips."""
    named = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    found = next((path for name in named if name and (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no Chromium: .ci/run should have installed it.")
        pytest.skip("no Chromium here: install it (`apt-get install chromium`) or set CHROMIUM")
    return found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A running ComfyUI with this extension in it and folders of its own."""
    with dev.server_of(dev.prepare_host(), tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module")  # Playwright holds the event loop of this thread while it runs
def browser(chromium: str):
    """One browser for the tests of a file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def errors() -> list[str]:
    """What the page of this test wrote to the console as errors."""
    return []


@pytest.fixture
def page(browser, server: LocalServer, errors: list[str]):
    """A page with the frontend loaded, its console errors collected in `errors`."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    opened = context.new_page()
    opened.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(server.url)
    opened.wait_for_function(
        "window.app?.extensionManager?.workflow?.activeWorkflow", timeout=90_000
    )
    yield opened
    context.close()


@pytest.fixture(scope="session")
def artefacts() -> Path:
    """Where screenshots are kept: artefacts/browser."""
    folder = dev.ROOT / "artefacts" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
