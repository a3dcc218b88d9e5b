"""HY-WU engine: condition -> hypernetwork -> generated LoRA -> frozen base model.

Works alone (`pip install .`) and never imports ComfyUI. Names load on first use, so that importing
the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Condition": ".condition",
    "GeneratedLoRA": ".lora",
    "GeneratorConfig": ".generator.config",
    "HYWUError": ".errors",
    "LoRALayout": ".layout",
    "ParameterGenerator": ".generator.model",
    "inject": ".injection",
    "load_generator": ".generator.checkpoints",
    "load_lora": ".formats",
    "merge": ".injection",
    "save_generator": ".generator.checkpoints",
    "unmerge": ".injection",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name], __name__), name)
