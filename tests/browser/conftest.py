"""Chromium, through Playwright, on the frontend of a real ComfyUI server."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from frontends import FRONTENDS
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


#: The frontend's own: with paid nodes switched off its page may not call their server, it asks for files (user
#: style, last settings) that needn't be there, a newer one asks an older server for what it doesn't have, and the
#: models of the stock graph that it begins with for their sizes.
NOISE = ("api.comfy.org", "huggingface.co", "status of 404", "[Jobs API]", "JobsApiError")
#: What stands in the address of everything that the extension serves; none of it may be missing.
OURS = ("/extensions/hywu/", "/workflow_templates/hywu/", "/global_subgraphs", "/hywu/")


def refused_of_ours(answer) -> list[str]:
    """A line where a file of the extension was asked for and refused."""
    ours = answer.status >= 400 and any(part in answer.url for part in OURS)
    return [f"{answer.status} {answer.url}"] if ours else []


class Servers:
    """A running ComfyUI per frontend, with this extension in it, small random weights, folders of its own."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folders, self.running = tmp_path_factory, {}
        self.stack = contextlib.ExitStack()

    def get(self, newest: bool) -> LocalServer:
        if newest not in self.running:
            arguments = ["--cpu"]
            if newest:
                arguments += ["--front-end-root", str(newest_frontend())]
            base = self.folders.mktemp("comfyui")
            server = dev.server_of(dev.prepare_host(), base, arguments=arguments)
            self.running[newest] = self.stack.enter_context(server)
        return self.running[newest]


def newest_frontend() -> Path:
    """Its static files; a machine that doesn't reach PyPI says so and skips, but not in CI."""
    dev.prepare_host()
    try:
        return dev.newest_frontend()
    except dev.DevError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    changed = pytest.MonkeyPatch()
    if not os.environ.get(VARIABLE):
        changed.setenv(VARIABLE, str(make_random(tmp_path_factory.mktemp("weights"))))
    found = Servers(tmp_path_factory)
    with found.stack:
        yield found
    changed.undo()


@pytest.fixture
def frontend() -> str:
    """One of `FRONTENDS`; `everywhere` and `newest` give a test others."""
    return "own"


@pytest.fixture(scope="session")
def own_server(servers: Servers) -> LocalServer:
    """The one with the frontend that ComfyUI comes with."""
    return servers.get(False)


@pytest.fixture
def server(servers: Servers, frontend: str) -> LocalServer:
    return servers.get(FRONTENDS[frontend][0])


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
def page(browser, server: LocalServer, frontend: str, errors: list[str], settings: dict):
    """A page with the frontend loaded; what it writes to the console as errors later is in `errors`."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    refused: list[str] = []  # from the first request on, which `errors` doesn't see
    context.on("response", lambda answer: refused.extend(refused_of_ours(answer)))
    renderer = {"Comfy.VueNodes.Enabled": FRONTENDS[frontend][1]}
    opened = open_frontend(context, server.url, settings | renderer)

    def note(text: str) -> None:
        if not any(noise in text for noise in NOISE):
            errors.append(text)

    opened.on("console", lambda m: note(m.text) if m.type == "error" else None)
    opened.on("pageerror", lambda error: note(str(error)))
    yield opened
    context.close()
    assert refused == [], "the extension's own files, templates and blueprints"


@pytest.fixture(scope="session")
def artefacts() -> Path:
    """Where screenshots are kept: artefacts/browser."""
    folder = dev.ROOT / "artefacts" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def shot(page, artefacts: Path, frontend: str) -> Callable[[str], None]:
    """shot(name): a screenshot of the page, named after the frontend."""
    kind = frontend.replace(",", "").replace(" ", "_").replace(".", "")
    return lambda name: page.screenshot(path=artefacts / f"{name}_{kind}.png")
