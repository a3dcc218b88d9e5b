"""Texts and figures that nodes show, and that a headless client reads from /history.

Every node with a report has ``"text": [str]`` in its ui outputs. Those that end no graph say so by
``HAS_INTERMEDIATE_OUTPUT``: where ComfyUI serves their results from its cache, newer ones then send the ui
outputs again, and older ones (0.3.75) nothing. Generate, Inspect and Load LoRA add
``"hywu_norms"``, which the web extension draws on the node: a list with one entry for each image of the
batch (the first 8) and each stack of layers::

    {"title": "blur the photo",       instruction of the image where it is known, else "LoRA 1"
     "item": 0, "items": 3,           which image of how many
     "stack": "blocks.",              prefix of the stack's layers
     "layers": ["0", "1"],            columns: what follows the prefix
     "modules": ["attn.qkv", "fc"],   rows
     "norms": [[0.1, 0.2], [0.3, 0.4]],   norms[row][column] of scale * B * A, finite numbers
     "max": 0.4,                      largest of the image, over all its stacks
     "seconds": 0.12,                 time of the generation; null where nothing was generated
     "cached": false}                 whether it was kept from before (seconds are then of the look-up)

Inspect has the heat maps as stock ``"images"`` too. A LoRA of more than 64 million values has no norms on
Generate (``"hywu_norms": []``); Inspect measures it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..hywu_core.lora import GeneratedLoRA

#: Images of a batch whose norms are shown on a node.
SHOWN = 8
#: Values of a LoRA up to which norms are measured without being asked for.
CHEAP = 64_000_000


def text_output(text: str, result: tuple, **more: list) -> dict[str, Any]:
    """A node's result with `text`, and whatever else is given, in its ui outputs."""
    return {"ui": {"text": [text], **more}, "result": result}


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


def norm_entries(
    lora: GeneratedLoRA,
    norms: Mapping[str, Tensor] | None = None,
    seconds: float | None = None,
    cached: bool = False,
) -> list[dict[str, Any]]:
    """The ``hywu_norms`` of the module's docstring; `norms` are measured where none are given."""
    if norms is None:
        if lora.batch_size * lora.layout.num_values > CHEAP:
            return []
        norms = lora.norms()
    values = {path: value[:SHOWN].tolist() for path, value in norms.items()}
    return [
        _entry(lora, values, item, stack) | {"seconds": seconds, "cached": cached}
        for item in range(min(SHOWN, lora.batch_size))
        for stack in range(len(lora.layout.stacks))
    ]


def _entry(lora: GeneratedLoRA, values: Mapping[str, list], item: int, s: int) -> dict[str, Any]:
    stack = lora.layout.stacks[s]
    rows = range(len(stack.modules))
    columns = range(len(stack.layers))
    grid = [[_number(values[stack.target(n, m)][item]) for n in columns] for m in rows]
    return {
        "title": _title(lora, item),
        "item": item,
        "items": lora.batch_size,
        "stack": stack.prefix,
        "layers": [layer.removeprefix(stack.prefix) for layer in stack.layers],
        "modules": [module.name for module in stack.modules],
        "norms": grid,
        "max": max(_number(value[item]) for value in values.values()),
    }


def _title(lora: GeneratedLoRA, item: int) -> str:
    text = lora.provenance.get("instruction")
    if isinstance(text, list) and len(text) == lora.batch_size:
        text = text[item]
    return text if isinstance(text, str) and text else f"LoRA {item + 1}"


def _number(value: float) -> float:
    """Five digits; JSON has no NaN."""
    return float(f"{value:.5g}") if math.isfinite(value) else 0.0


def norm_table(norms: Mapping[str, Tensor]) -> str:
    """One line a module: its path and its norm for every image of the batch."""
    width = max(map(len, norms))
    lines = [
        f"{path:{width}}  " + "  ".join(f"{value:.4g}" for value in values.tolist())
        for path, values in norms.items()
    ]
    return "\n".join(lines)
