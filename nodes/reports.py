"""Texts that nodes show and a headless client reads from /history."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from ..hywu_core.lora import GeneratedLoRA


def text_output(text: str, result: tuple) -> dict[str, Any]:
    """A node's result with `text` in its ui outputs."""
    return {"ui": {"text": [text]}, "result": result}


def lora_summary(lora: GeneratedLoRA, **facts: Any) -> str:
    """JSON: how many, rank, modules, bytes, the facts given, and where the LoRA came from."""
    summary = {
        "loras": lora.batch_size,
        "rank": lora.rank,
        "scale": lora.scale,
        "modules": len(lora),
        "bytes": lora.nbytes,
        **facts,
        "provenance": dict(lora.provenance),
    }
    return json.dumps(summary, ensure_ascii=False)


def norm_table(norms: dict[str, Tensor]) -> str:
    """One line a module: its path and its norm for every image of the batch."""
    width = max(map(len, norms))
    lines = [
        f"{path:{width}}  " + "  ".join(f"{value:.4g}" for value in values.tolist())
        for path, values in norms.items()
    ]
    return "\n".join(lines)
