"""Chromium, through Playwright, on the frontend of a real ComfyUI server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from random_weights import make_random

import dev
from hywu_core.bases.bundled.checkpoint import VARIABLE
from hywu_core.headless.local import LocalServer
from workflows.browser import FLAGS, SETTINGS, find_chromium, open_frontend


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium. .ci/run installs one; a machine without one says so and skips."""
    found = find_chromium()
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no Chromium: .ci/run should have installed it.")
        pytest.skip("no Chromium here: install it (`apt-get install chromium`) or set CHROMIUM")
    return found


#: The frontend's own: with paid nodes switched off its page may not call their server, and it
#: asks for files (user style, last settings, a help page in this language) that needn't be there.
NOISE = ("api.comfy.org", "status of 404")
if os.environ.get("HYWU_FRONTEND"):
    NOISE += ("[Jobs API]",)  # a newer frontend asks an older server for what it doesn't have


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A running ComfyUI with this extension in it, small random weights and folders of its own.

    The frontend is the one that ComfyUI comes with, or that of HYWU_FRONTEND (its static folder).
    """
    changed = pytest.MonkeyPatch()
    if not os.environ.get(VARIABLE):
        changed.setenv(VARIABLE, str(make_random(tmp_path_factory.mktemp("weights"))))
    frontend = os.environ.get("HYWU_FRONTEND")
    arguments = ["--cpu", *(["--front-end-root", frontend] if frontend else [])]
    base = tmp_path_factory.mktemp("comfyui")
    with dev.server_of(dev.prepare_host(), base, arguments=arguments) as running:
        yield running
    changed.undo()


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
def settings() -> dict:
    """The user's settings when `page` opens; a test may override this fixture."""
    return SETTINGS


@pytest.fixture
def page(browser, server: LocalServer, errors: list[str], settings: dict):
    """A page with the frontend loaded; what it writes to the console as errors later is in `errors`."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    opened = open_frontend(context, server.url, settings)

    def note(text: str) -> None:
        if not any(noise in text for noise in NOISE):
            errors.append(text)

    opened.on("console", lambda m: note(m.text) if m.type == "error" else None)
    opened.on("pageerror", lambda error: note(str(error)))
    yield opened
    context.close()


@pytest.fixture(scope="session")
def artefacts() -> Path:
    """Where screenshots are kept: artefacts/browser."""
    folder = dev.ROOT / "artefacts" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
