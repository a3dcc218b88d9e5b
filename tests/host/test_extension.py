"""The extension as the server sees it."""

from __future__ import annotations

import importlib.util

import dev
from hywu_core.headless.local import get_json


def test_the_server_imports_it_and_offers_its_nodes(server):
    offered = get_json(f"{server.url}/object_info", timeout=60)
    assert "IMPORT FAILED" not in server.log.read_text(encoding="utf-8")
    ours = {name for name, node in offered.items() if node["python_module"] == "custom_nodes.hywu"}
    assert {"HYWULoadGenerator", "HYWUGenerateLoRA", "HYWUApplyLoRA"} <= ours
    assert all(offered[name]["category"].startswith("HY-WU") for name in ours)


def test_importing_it_outside_comfyui_is_harmless():
    spec = importlib.util.spec_from_file_location("hywu_alone", dev.ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS == {}
