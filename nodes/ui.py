"""What nodes share with the screen: sockets, widgets, and what a node shows when it has run.

Every node with a report has ``"text": [str]`` in its ui outputs, and those that may have something to
warn of ``"hywu_warnings": [str, …]``, one sentence each and none where all is well; the web extension
draws them on the node. Nodes that end no graph say so by ``HAS_INTERMEDIATE_OUTPUT``: where ComfyUI serves
their results from its cache, newer ones then send the ui outputs again, and older ones (0.3.75) nothing.
Generate, Inspect and Load LoRA add ``"hywu_norms"``, which the web extension draws on the node: a list with
one entry per image of the batch (the first 8) and stack of layers, the largest stack first::

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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hywu_core.errors import printable
from ..hywu_core.lora import GeneratedLoRA

CATEGORY = "HY-WU"

GENERATOR = "HYWU_GENERATOR"
CONDITION = "HYWU_CONDITION"
LORA = "HYWU_LORA"
#: Where and when a LoRA acts.
SCOPE = "HYWU_SCOPE"
#: ComfyUI's own socket for a LoRA in memory: a dict of ``<module>.lora_up.weight`` and so on.
STOCK_LORA = "LORA_MODEL"

#: Images of a batch whose norms are shown on a node.
SHOWN = 8
#: Values of a LoRA up to which norms are measured without being asked for.
CHEAP = 64_000_000
#: Side of a heat map's cell in pixels.
CELL = 16

Input = tuple[Any, dict[str, Any]]


# -- inputs ------------------------------------------------------------------------------------------


def socket(kind: str, tooltip: str) -> Input:
    """An input that a link brings."""
    return kind, {"tooltip": tooltip}


def lora_socket() -> Input:
    """The input of a generated LoRA."""
    return socket(
        LORA,
        "A generated LoRA: from HY-WU Generate LoRA, or Load Generated LoRA. One per image of the batch.",
    )


def text(default: str, tooltip: str, **more: Any) -> Input:
    """A line of text; ``multiline=True`` makes it several."""
    return "STRING", {"default": default, **more, "tooltip": tooltip}


def whole(default: int, low: int, high: int, tooltip: str, **more: Any) -> Input:
    """A whole number from low to high."""
    return "INT", {"default": default, "min": low, "max": high, **more, "tooltip": tooltip}


def number(
    default: float, low: float, high: float, step: float, tooltip: str, **more: Any
) -> Input:
    """A number from low to high."""
    options = {"default": default, "min": low, "max": high, "step": step, **more}
    return "FLOAT", {**options, "tooltip": tooltip}


def strength(tooltip: str) -> Input:
    """What multiplies a LoRA, with the range of ComfyUI's own LoRA loaders."""
    return number(1.0, -100.0, 100.0, 0.05, tooltip)


def choice(values: Sequence[str], tooltip: str, default: str | None = None) -> Input:
    """One of some values."""
    return list(values), {**({} if default is None else {"default": default}), "tooltip": tooltip}


def switch(default: bool, tooltip: str, **more: Any) -> Input:
    """On or off; ``label_on`` and ``label_off`` name the two."""
    return "BOOLEAN", {"default": default, **more, "tooltip": tooltip}


def advanced(made: Input) -> Input:
    """An input that is rarely set: Nodes 2.0 shows it when asked to, the classic renderer always."""
    return made[0], {**made[1], "advanced": True}


#: Widgets that two nodes have.
PATTERNS = {
    "include": text(
        "",
        "Only modules whose path matches one of these patterns, divided by commas, such as '*attn*'. They "
        "may lie outside the repeated blocks.",
    ),
    "exclude": text("", "No modules whose path matches one of these patterns."),
}


def skip_missing() -> Input:
    """The switch of nodes that apply a LoRA in part only if they are told to."""
    return switch(
        False,
        "Off: a LoRA of which some modules aren't in the model is an error that names them. On: the other "
        "modules are applied, and the node says what was left out.",
        advanced=True,
    )


def checked(check: Callable[[], Any]) -> bool | str:
    """The answer of VALIDATE_INPUTS: True, or the sentence of the ValueError that a check ends in."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return True


# -- outputs -----------------------------------------------------------------------------------------


def shown(text: str, result: tuple, warnings: Sequence[str] | None = None, **more: list) -> dict:
    """A node's result, with `text`, `warnings` and whatever else is given in its ui outputs."""
    ui: dict[str, Any] = {"text": [text], **more}
    if warnings is not None:
        ui["hywu_warnings"] = list(warnings)
    return {"ui": writable(ui), "result": result}


def writable(value: Any) -> Any:
    """The value without what can't be encoded, such as half an emoji, by which a log or a client ends."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {writable(key): writable(item) for key, item in value.items()}
    return [writable(item) for item in value] if isinstance(value, (list, tuple)) else value


def lora_summary(lora: GeneratedLoRA, **more: Any) -> str:
    """JSON: how many, rank, modules, bytes, what else is given, and where the LoRA came from."""
    summary = {
        "loras": lora.batch_size,
        "rank": lora.rank,
        "scale": lora.scale,
        "modules": len(lora),
        "bytes": lora.nbytes,
        **more,
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
    stacks = lora.layout.stacks
    # a U-Net's layout has stacks of a single layer, which show little
    largest_first = sorted(
        range(len(stacks)), key=lambda s: -len(stacks[s].layers) * len(stacks[s].modules)
    )
    return [
        _entry(lora, values, item, stack) | {"seconds": seconds, "cached": cached}
        for item in range(min(SHOWN, lora.batch_size))
        for stack in largest_first
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
    """One line per module: its path and its norm for every image of the batch."""
    width = max(map(len, norms))
    lines = [
        f"{path:{width}}  " + "  ".join(f"{value:.4g}" for value in values.tolist())
        for path, values in norms.items()
    ]
    return "\n".join(lines)


def norm_map(lora: GeneratedLoRA, norms: Mapping[str, Tensor]) -> Tensor:
    """Heat maps ``[B, H, W, 3]`` in 0..1: layers left to right, modules top to bottom, stacks stacked."""
    stacks = lora.layout.stacks
    width = max(len(stack.layers) for stack in stacks)
    grid = torch.zeros(lora.batch_size, sum(len(s.modules) for s in stacks), width)
    row = 0
    for stack in stacks:
        for m in range(len(stack.modules)):
            for n in range(len(stack.layers)):
                grid[:, row, n] = norms[stack.target(n, m)].cpu()
            row += 1
    grid = grid / grid.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    # black, violet, orange, yellow: light grows with the value
    colours = torch.tensor([[0.0, 0.0, 0.02], [0.5, 0.07, 0.5], [0.98, 0.5, 0.2], [1.0, 1.0, 0.7]])
    place = grid * (len(colours) - 1)
    low = place.long().clamp(max=len(colours) - 2)
    image = torch.lerp(colours[low], colours[low + 1], (place - low)[..., None])
    return image.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
