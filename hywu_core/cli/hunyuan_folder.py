"""Steps of `hywu hunyuan` that look at a folder or write another one, without running it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import HYWUError
from .console import say, table


def inspect(args: argparse.Namespace) -> int:
    from ..bases.hunyuan_image3.checkpoint import open_folder, parameters_of
    from ..bases.hunyuan_image3.images import buckets
    from ..bases.hunyuan_image3.pipeline import build

    folder = open_folder(args.folder)
    build(folder)
    config, settings = folder.config, folder.settings
    found = {
        "folder": str(folder.path),
        "kind": _kind(folder),
        "parameters": parameters_of(folder),
        "bytes": folder.nbytes,
        "shards": len(set(folder.files.values())),
        "quantized": ", ".join(sorted({q.codec.kind for q in folder.quantized.values()})) or "no",
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "experts": config.num_experts,
        "experts_per_token": sorted(set(config.top_k)),
        "sequence_limit": settings.max_length,
        "image_base_size": config.image_base_size,
        "sizes": len(buckets(config.image_base_size)),
        "steps": settings.steps,
        "guidance": settings.guidance,
        "flow_shift": settings.flow_shift,
    }
    if args.json:
        say(json.dumps(found, indent=2))
        return 0
    table(
        [(key, f"{value:,}" if isinstance(value, int) else value) for key, value in found.items()],
        ("", "value"),
    )
    return 0


def plan(args: argparse.Namespace) -> int:
    from ..bases.hunyuan_image3.checkpoint import open_folder
    from ..bases.hunyuan_image3.chunks import bound_product_plans
    from ..bases.hunyuan_image3.plan import CARDS, METHODS, generator_plan
    from ..bases.hunyuan_image3.plan import plan as planned

    if args.card not in CARDS:
        raise HYWUError(f"--card {args.card}: known are {', '.join(CARDS)}.")
    bound_product_plans()  # as the commands that it plans for
    folder = open_folder(args.folder)
    budget = None if args.budget is None else int(args.budget * 1e9)
    generator = 0
    if args.generator is not None:
        tokens = args.tokens - args.image_tokens
        generator = generator_plan(args.generator, tokens, args.generator_memory_budget).total_bytes
    methods = (None,) if folder.quantized else (None, *METHODS)
    rows, refused = [], ""
    for method in methods:
        try:
            how = (budget, args.tokens, args.image_tokens)
            rows.append(planned(folder, method, *how, generator=generator))
        except HYWUError as error:
            refused = f"{method or 'as stored'}: {error}"
            say(refused)
    if not rows:
        raise HYWUError(refused)
    data = [row.to_json() | {"seconds_per_step": row.seconds(args.card)} for row in rows]
    if args.json:
        say(json.dumps(data, indent=2))
        return 0
    names = list(data[0])
    table(
        [(n, *(_figure(each[n]) for each in data)) for n in names],
        ("bytes", *(str(each["experts"]) for each in data)),
    )
    say(
        f"Seconds are estimated from assumed rates of {args.card}. `device` is the most at once; what kernels "
        "take for themselves comes on top."
    )
    return 0


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def quantize(args: argparse.Namespace) -> int:
    from ..bases.hunyuan_image3.quantize import quantize as write

    def told(layer: int, error: float) -> None:
        say(f"layer {layer}: relative error of the experts {error:.5f}")

    path = write(args.folder, args.out, args.experts, told)
    say(f"{path}: experts in {args.experts}, everything else as in {args.folder}")
    return 0


def _kind(folder: Any) -> str:
    if folder.config.distilled:
        return "distilled"
    return "instruct" if folder.settings.template == "instruct" else "base (text to image only)"
