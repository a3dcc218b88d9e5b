"""What a run of the tests came to, as JSON for docs/hosts.md, where dev.py asks for it by HYWU_RUN_JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path

import dev

VARIABLE = "HYWU_RUN_JSON"
STARTED = time.monotonic()
#: Asked of the Python that runs ComfyUI.
VERSIONS = """
import importlib.metadata as m, json, platform
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
names = ("torch", "comfyui-frontend-package", "transformers", "numpy")
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in names}}))
"""


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """Counts, names of what failed, reasons of what was skipped; the workers of xdist leave it to their head."""
    path = os.environ.get(VARIABLE)
    if not path or hasattr(config, "workerinput"):
        return
    reports = terminalreporter.stats
    counts = {
        kind: len(reports.get(kind, []))
        for kind in ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    }
    skipped = {str(report.longrepr[-1]) for report in reports.get("skipped", [])}
    found = {
        "exit code": int(exitstatus),
        **counts,
        "seconds": round(time.monotonic() - STARTED),
        "failed tests": sorted(
            report.nodeid for kind in ("failed", "error") for report in reports.get(kind, [])
        ),
        "reasons of skips": sorted(skipped),
        "platform": platform.platform(terse=True),
        **host(),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def host() -> dict[str, object]:
    """The ComfyUI under test and the versions beside it; nothing where only the engine was tested."""
    try:
        tree = dev.prepare_host()
    except dev.DevError as error:
        return {"comfyui": None, "why": str(error)}
    shown = subprocess.run([tree.python, "-c", VERSIONS], capture_output=True, text=True)
    versions = json.loads(shown.stdout) if shown.returncode == 0 else {}
    return {"comfyui": tree.version, "origin": tree.origin, **versions}
