"""HunyuanImage-3.0-Instruct with HY-WU: the published system, from its official folders.

  edit       images and an instruction in, the edited image out (or an image from text alone)
  condition  what a generator reads, for graphs and generators elsewhere
  inspect    what a folder holds, and what a run of it takes; reads heads of files only
  plan       weights, activations, LoRA, generator, memory and copies of a run, for each precision
  quantize   write a folder with its experts in 8 or 4 bits; loads like the original, needs half or a third
  tiny       write a tiny checkpoint with random weights and a generator, to try the whole path

The weights and their licence: docs/hunyuan_image3.md.

Examples:
  hywu hunyuan edit HunyuanImage-3.0-Instruct --generator HY-WU --image cat.png \\
      --instruction "put a red hat on the cat" --think --out hat.png --device cuda
  hywu hunyuan condition HunyuanImage-3.0-Instruct --image cat.png --instruction "a hat" --out cat.safetensors
  hywu hunyuan plan HunyuanImage-3.0-Instruct --budget 20 --card rtx-4090
  hywu hunyuan quantize HunyuanImage-3.0-Instruct HunyuanImage-3-nf4 --experts nf4
  hywu hunyuan tiny tiny-hunyuan
  hywu hunyuan tiny --comfyui ~/ComfyUI
  hywu hunyuan edit tiny-hunyuan/base --generator tiny-hunyuan/generator --image cat.png \\
      --instruction "put a red hat on the cat" --size 256x256 --precision float32 --out noise.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..devices import chosen_device
from ..errors import HYWUError
from ..files import atomic_folder
from ..images import WRITABLE, load_image, write_image
from .console import say, table
from .generate import add_generator_options, check_generator_options, say_plan, size_of
from .generate import load as load_generator

#: --precision -> name of torch's dtype; "stored" keeps what the files hold
PRECISIONS = ("stored", "float32", "bfloat16", "float16")
ROUTERS = ("float32", "bfloat16")
#: Before the names of options that say how the generator is loaded.
GENERATOR = "generator-"


def configure(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    edit = steps.add_parser("edit", help="edit images, or make one from text")
    _add_request(edit)
    edit.add_argument("--generator", help="a generator; without it the base model edits alone")
    add_generator_options(edit, GENERATOR)
    edit.add_argument("--strength", type=float, default=1.0, help="of the LoRA (default 1)")
    edit.add_argument("--steps", type=int, help="sampling steps (default: the folder's)")
    edit.add_argument("--guidance", type=float, help="guidance scale (default: the folder's)")
    edit.add_argument("--flow-shift", type=float, help="of the schedule (default: the folder's)")
    edit.add_argument("--save-lora", type=Path, help="also keep the LoRA (.safetensors, native)")
    condition = steps.add_parser("condition", help="make a condition for a generator")
    _add_request(condition)
    inspect = steps.add_parser("inspect", help="what a folder holds")
    inspect.add_argument("folder")
    inspect.add_argument("--json", action="store_true", help="write JSON for programs")
    plan = steps.add_parser(
        "plan", help="what a run takes, for each precision; reads heads of files only"
    )
    plan.add_argument("folder")
    plan.add_argument("--budget", type=float, metavar="GB", help="of weights on the device")
    plan.add_argument("--generator", help="a generator to run before the sampling")
    plan.add_argument(
        "--generator-memory-budget", type=size_of, metavar="SIZE",
        help="of its weights and intermediates (default: no limit)",
    )  # fmt: skip
    plan.add_argument("--card", default="rtx-4090", help="for the seconds (default rtx-4090)")
    plan.add_argument("--tokens", type=int, default=11_100, help="of a sequence (default 11100)")
    plan.add_argument(
        "--image-tokens", type=int, default=4097, help="of the new image (default 4097)"
    )
    plan.add_argument("--json", action="store_true", help="write JSON for programs")
    quantize = steps.add_parser("quantize", help="write a folder with its experts in 8 or 4 bits")
    quantize.add_argument("folder", help="official folder in bfloat16")
    quantize.add_argument(
        "out", type=Path, help="folder to write; the same command goes on where it was"
    )
    quantize.add_argument(
        "--experts", choices=("fp8", "int8", "nf4"), required=True,
        help="fp8, int8: 8 bits and a scale per row; nf4: 4 bits and a scale per 64 numbers",
    )  # fmt: skip
    tiny = steps.add_parser("tiny", help="write a tiny checkpoint with random weights")
    tiny.add_argument(
        "out", type=Path, nargs="?", help="folder to write: base/ and generator/ in it"
    )
    tiny.add_argument(
        "--comfyui", type=Path, metavar="FOLDER",
        help="write into a ComfyUI's models instead: hunyuan_image_3/tiny and hywu/tiny-hunyuan",
    )  # fmt: skip
    tiny.add_argument("--distilled", action="store_true", help="a base of the distilled kind")
    tiny.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    tiny.add_argument("--overwrite", action="store_true", help="replace what is there")


def _add_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="official folder: config.json, tokenizer, safetensors")
    parser.add_argument("--image", nargs="+", default=[], help="one to three source images")
    parser.add_argument("--instruction", required=True, help="what to change, or to show")
    parser.add_argument("--out", required=True, type=Path, help="file to write")
    parser.add_argument("--think", action="store_true", help="write a chain of thought first")
    parser.add_argument("--cot", default="", help="a chain of thought, or a .txt file with one")
    parser.add_argument(
        "--size", default="auto", help="auto, height x width, or a ratio w:h (default auto)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of text and noise (default 0)")
    parser.add_argument(
        "--system-prompt",
        help="its text, a .txt file, or system_prompt.py:NAME (default: the folder's)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default cpu)")
    parser.add_argument("--precision", choices=PRECISIONS, default="stored", help="of the weights")
    parser.add_argument(
        "--router", choices=ROUTERS, default="float32",
        help="how routers multiply: float32, or bfloat16 as official runs (default float32)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, metavar="GB",
        help="most gigabytes of weights on the device; experts that don't fit are copied in chunks",
    )  # fmt: skip
    parser.add_argument(
        "--rest", choices=("file", "ram"), default="file",
        help="where those experts are meanwhile: in the folder's files, or in memory (default file)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def run(args: argparse.Namespace) -> int:
    steps: dict[str, Callable[[argparse.Namespace], int]] = {
        "edit": _edit, "condition": _condition, "inspect": _inspect, "tiny": _tiny,
        "quantize": _quantize, "plan": _plan,
    }  # fmt: skip
    return steps[args.step](args)


def _free(path: Path | None, overwrite: bool) -> None:
    if path is not None and path.exists() and not overwrite:
        raise HYWUError(f"{path}: exists; add --overwrite to replace it.")


def _edit(args: argparse.Namespace) -> int:
    if args.out.suffix.lower() not in WRITABLE:
        raise HYWUError(f"{args.out}: the name must end in {', '.join(WRITABLE)}.")
    for path in (args.out, args.save_lora):
        _free(path, args.overwrite)
    if args.save_lora is not None and args.generator is None:
        raise HYWUError("--save-lora keeps the LoRA of a generator; name it with --generator.")
    check_generator_options(args, GENERATOR)
    pipeline, request = _load(args, args.generator)
    request = _thought(args, pipeline, request)
    lora = None
    if args.generator is not None:
        lora = _generated(args, pipeline.condition([request], _bar("condition")))
    image = pipeline.edit(
        [request],
        lora,
        strength=args.strength,
        steps=args.steps,
        guidance=args.guidance,
        flow_shift=args.flow_shift,
        on_step=_bar("sample"),
    )[0]
    write_image(image, args.out)
    if lora is not None and args.save_lora is not None:
        lora.save(args.save_lora, overwrite=args.overwrite)
    say(f"{args.out}: {image.width} x {image.height}")
    return 0


def _condition(args: argparse.Namespace) -> int:
    from ..files import with_suffix

    out = with_suffix(args.out)
    _free(out, args.overwrite)
    pipeline, request = _load(args, None)
    request = _thought(args, pipeline, request)
    condition = pipeline.condition([request], _bar("condition"))
    if not bool(condition.is_finite()):
        raise HYWUError("The condition has NaN or infinite values; use --precision bfloat16.")
    path = condition.save(out, args.overwrite)
    (part,) = condition.parts.values()
    say(f"{path}: {part.shape[1]} tokens x {part.shape[2]}")
    return 0


def _load(args: argparse.Namespace, generator: str | None) -> tuple[Any, Any]:
    """The pipeline and the request; whatever can be wrong with either is said before weights are read."""
    import torch

    from ..bases.hunyuan_image3 import Pipeline, Prompts, Request
    from ..generator.checkpoints import open_checkpoint

    device = chosen_device(args.device)
    prompts = Prompts.open(args.folder, args.system_prompt)
    images = [load_image(path) for path in args.image]
    request = Request(args.instruction, images, _text(args.cot), args.size, args.seed)
    prompts.check(request)
    layout = None if generator is None else open_checkpoint(generator).config.layout
    dtype = None if args.precision == "stored" else getattr(torch, args.precision)
    budget = None if args.budget is None else int(args.budget * 1e9)
    pipeline = Pipeline.load(
        prompts, device, dtype, router_precision=args.router, layout=layout, budget=budget,
        rest=args.rest,
    )  # fmt: skip
    return pipeline, request


def _text(given: str) -> str:
    if not given.endswith(".txt"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise HYWUError(f"{given}: the chain of thought can't be read ({error}).") from error


def _thought(args: argparse.Namespace, pipeline: Any, request: Any) -> Any:
    if not args.think:
        return request
    if request.cot:
        raise HYWUError("--think writes a chain of thought and --cot gives one; use one of them.")
    bar, written = _bar("think"), [""]

    def told(done: int, most: int, text: str) -> None:
        written[0] = text
        bar(done, most)

    try:
        request = pipeline.think(request, on_token=told)
    except BaseException:
        if written[0]:  # minutes of work, which can be completed and given to --cot
            say(f"Ended early; written so far: {written[0]}")
        raise
    say(request.cot)
    return request


def _generated(args: argparse.Namespace, condition: Any) -> Any:
    generator = load_generator(args, args.generator, condition.device, GENERATOR)
    say_plan(generator, condition)
    dtype = next(generator.parameters()).dtype
    lora = generator(condition.to(dtype=dtype))
    lora.check_finite()
    return replace(lora, provenance={**lora.provenance, **condition.origin})


def _bar(name: str) -> Callable[..., None]:
    """A progress bar as the pipeline's callbacks are called: (done, all, anything)."""
    from tqdm import tqdm

    bars: list[Any] = []

    def told(done: int, count: int, *_: Any) -> None:
        if not bars or done <= bars[-1].n:
            bars.append(tqdm(total=count, desc=name))
        bars[-1].update(done - bars[-1].n)
        if done == count:
            bars[-1].close()

    return told


def _inspect(args: argparse.Namespace) -> int:
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


def _plan(args: argparse.Namespace) -> int:
    from ..bases.hunyuan_image3.checkpoint import open_folder
    from ..bases.hunyuan_image3.plan import CARDS, METHODS, generator_plan, plan

    if args.card not in CARDS:
        raise HYWUError(f"--card {args.card}: known are {', '.join(CARDS)}.")
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
            rows.append(plan(folder, method, *how, generator=generator))
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


def _quantize(args: argparse.Namespace) -> int:
    from ..bases.hunyuan_image3.quantize import quantize

    def told(layer: int, error: float) -> None:
        say(f"layer {layer}: relative error of the experts {error:.5f}")

    path = quantize(args.folder, args.out, args.experts, told)
    say(f"{path}: experts in {args.experts}, everything else as in {args.folder}")
    return 0


def _kind(folder: Any) -> str:
    if folder.config.distilled:
        return "distilled"
    return "instruct" if folder.settings.template == "instruct" else "base (text to image only)"


def _tiny(args: argparse.Namespace) -> int:
    from ..bases.hunyuan_image3.tiny import write_tiny

    if (args.out is None) == (args.comfyui is None):
        raise HYWUError("Name a folder to write, or a ComfyUI's folder with --comfyui.")
    if args.comfyui is None:
        path = write_tiny(args.out, args.overwrite, args.seed, args.distilled)
        base, generator = path / "base", path / "generator"
    else:
        models = args.comfyui / "models"
        if not models.is_dir():
            raise HYWUError(f"{args.comfyui}: has no folder models; name the folder of a ComfyUI.")
        base, generator = models / "hunyuan_image_3" / "tiny", models / "hywu" / "tiny-hunyuan"
        for folder in (base, generator):
            _free(folder, args.overwrite)
        with tempfile.TemporaryDirectory() as folder:
            path = write_tiny(Path(folder) / "tiny", seed=args.seed, distilled=args.distilled)
            for made, target in ((path / "base", base), (path / "generator", generator)):
                with atomic_folder(target, args.overwrite) as new:
                    shutil.copytree(made, new, dirs_exist_ok=True)
    say(f"{base}: HunyuanImage-3 with random weights")
    say(f"{generator}: a generator for it")
    return 0
