"""A real ComfyUI server for the tests: prepared by dev.py, one per session, always stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from random_weights import make_random

import dev
from hywu_core.bases.bundled.checkpoint import VARIABLE, weights_folder
from hywu_core.headless.local import LocalServer


@pytest.fixture(scope="session")
def comfyui() -> dev.Host:
    """The ComfyUI under test: COMFYUI_PATH's, the one around the checkout, or the package's."""
    return dev.prepare_host()


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the bundled weights: small random ones, or those of a developer's HYWU_WEIGHTS."""
    if os.environ.get(VARIABLE):
        yield weights_folder()
        return
    os.environ[VARIABLE] = str(make_random(tmp_path_factory.mktemp("weights")))
    yield weights_folder()
    del os.environ[VARIABLE]


@pytest.fixture(scope="session")
def server(
    comfyui: dev.Host, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """A running server with this extension in it, the golden pack, and folders of its own."""
    base = tmp_path_factory.mktemp("comfyui")
    pack = dev.ROOT / "tests" / "helpers" / "golden_pack"
    shutil.copytree(pack, base / "custom_nodes" / "golden_pack")
    with dev.server_of(comfyui, base) as running:
        yield running


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows the end of the server's log."""
    outcome = yield
    report = outcome.get_result()
    running = getattr(item, "funcargs", {}).get("server")
    if report.when == "call" and report.failed and running is not None:
        report.sections.append(("ComfyUI log", running.log_tail()))
