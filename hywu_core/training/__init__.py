"""Training through a frozen base model: one loop, the strategies, the data; it knows no experiment.

Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Ahead": ".data",
    "BaseModel": ".base",
    "Batch": ".base",
    "FullFineTuning": ".strategies",
    "HeldNetwork": ".recompute",
    "HyperNetwork": ".strategies",
    "PairBatches": ".data",
    "StaticLoRA": ".strategies",
    "TrainConfig": ".schedule",
    "Trainer": ".trainer",
    "Validation": ".validation",
    "held_out": ".pairs",
    "read_pairs": ".pairs",
    "recomputed": ".recompute",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name], __name__), name)
