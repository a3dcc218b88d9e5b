"""The extension as the server sees it."""

from __future__ import annotations

import subprocess
import sys

import dev
from hywu_core.headless.local import get_json

NAMES = {
    "HYWULoadGenerator": "HY-WU Load Generator",
    "HYWULoadBundledEditor": "HY-WU Load Bundled Editor",
    "HYWUConditionEncode": "HY-WU Condition Encode",
    "HYWUGenerateLoRA": "HY-WU Generate LoRA",
    "HYWUApplyLoRA": "Apply Generated LoRA",
    "HYWUSaveLoRA": "Save Generated LoRA",
    "HYWULoadLoRA": "Load Generated LoRA",
    "HYWUSelectLoRA": "HY-WU Select LoRA",
    "HYWUSaveCondition": "Save Condition",
    "HYWULoadCondition": "Load Condition",
    "HYWUInspectLoRA": "HY-WU Inspect LoRA",
    "HYWUBlendLoRA": "HY-WU Blend LoRAs",
}


def test_the_server_imports_it_and_offers_its_nodes(server):
    offered = get_json(f"{server.url}/object_info", timeout=60)
    assert "IMPORT FAILED" not in server.log.read_text(encoding="utf-8")
    ours = {name for name, node in offered.items() if node["python_module"] == "custom_nodes.hywu"}
    assert set(NAMES) <= ours
    assert {name: offered[name]["display_name"] for name in NAMES} == NAMES
    assert all(offered[name]["category"].startswith("HY-WU") for name in ours)


def test_what_is_bundled_comes_first_in_the_lists(server):
    offered = get_json(f"{server.url}/object_info", timeout=60)

    def listed(name: str, widget: str) -> list[str]:
        return offered[name]["input"]["required"][widget][0]

    assert listed("HYWULoadGenerator", "checkpoint")[0] == "bundled"
    assert listed("HYWULoadLoRA", "lora")[0] == "bundled: shared"
    assert "bundled: single deblur" in listed("HYWULoadLoRA", "lora")


def test_importing_it_outside_comfyui_is_harmless():
    load = "import runpy; print(runpy.run_path('__init__.py')['NODE_CLASS_MAPPINGS'])"
    done = subprocess.run(
        [sys.executable, "-c", load], cwd=dev.ROOT, capture_output=True, text=True
    )
    assert done.stdout == "{}\n", done.stderr
