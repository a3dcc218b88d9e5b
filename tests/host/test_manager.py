"""The Manager's command line installs this extension from a git address into a ComfyUI, which then starts."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import dev
from hywu_core.headless.local import LocalServer, get_json


def call(*words: str | Path, cwd: Path, **options) -> str:
    """Standard output of a command; a failure shows both outputs."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """This checkout as it is now, committed to a repository of its own and served over http."""
    if shutil.which("git") is None or not (dev.ROOT / ".git").exists():
        pytest.skip("the Manager clones with git, and this needs git and a checkout")
    folder = tmp_path_factory.mktemp("repository")
    work = folder / "work"
    listed = call("git", "ls-files", "-z", "--cached", cwd=dev.ROOT)
    for name in filter(None, listed.split("\0")):
        if (dev.ROOT / name).is_file():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(dev.ROOT / name, work / name)
    who = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "core.autocrlf=false")
    call("git", "init", "--quiet", cwd=work)
    call("git", "-c", "core.compression=0", "add", "--force", ".", cwd=work)
    call("git", *who, "commit", "--quiet", "--message", "as it is", cwd=work)
    call("git", "clone", "--quiet", "--bare", work, folder / "served" / "hywu.git", cwd=folder)
    # one file to fetch instead of hundreds
    pack = ("-c", "pack.compression=0", "repack", "-adq", "--window=0")
    call("git", *pack, cwd=folder / "served" / "hywu.git")
    call("git", "update-server-info", cwd=folder / "served" / "hywu.git")
    handler = functools.partial(_Quiet, directory=str(folder / "served"))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/hywu.git"
    httpd.shutdown()
    httpd.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_the_manager_installs_it_and_comfyui_starts(comfyui, address, tmp_path):
    if comfyui.origin != dev.HOST_PACKAGE:
        pytest.skip("the Manager is in the environment of the pinned ComfyUI, not in a user's")
    tree = tmp_path / "ComfyUI"
    shutil.copytree(comfyui.tree, tree, ignore=shutil.ignore_patterns("__pycache__"))
    freeze = (comfyui.python, "-m", "pip", "freeze")
    before = call(*freeze, cwd=tmp_path)
    # Whatever it wants beyond what a ComfyUI has would be fetched, and can't be.
    offline = {"UV_OFFLINE": "1", "PIP_NO_INDEX": "1", "no_proxy": "127.0.0.1"}
    manager = comfyui.python.with_name("cm-cli.exe" if dev.WINDOWS else "cm-cli")
    words = (manager, "install", address, "--mode", "local", "--exit-on-fail")
    shown = call(*words, cwd=tree, env={**os.environ, "COMFYUI_PATH": str(tree), **offline})
    assert "[INSTALLED]" in shown
    assert call(*freeze, cwd=tmp_path) == before
    with LocalServer(comfyui.python, tree, tree) as server:
        nodes = get_json(f"{server.url}/object_info", timeout=60)
        templates = get_json(f"{server.url}/workflow_templates", timeout=60)
    assert "IMPORT FAILED" not in server.log.read_text(encoding="utf-8")
    assert {"HYWULoadGenerator", "HYWUGenerateLoRA", "HYWUApplyLoRA"} <= set(nodes)
    assert {"01 Edit an image", "02 Opposite edits of one model"} <= set(templates["hywu"])
    offered = {path.name for path in (dev.ROOT / "workflows" / "inputs").glob("*.png")}
    assert offered <= {path.name for path in (tree / "input").iterdir()}
