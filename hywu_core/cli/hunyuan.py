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
  hywu generate --checkpoint HY-WU --condition cat.safetensors --out lora.safetensors
  hywu hunyuan edit HunyuanImage-3.0-Instruct --lora lora.safetensors --image cat.png --instruction "a hat" \\
      --out hat.png
  hywu hunyuan plan HunyuanImage-3.0-Instruct --budget 20 --card rtx-4090
  hywu hunyuan quantize HunyuanImage-3.0-Instruct HunyuanImage-3-nf4 --experts nf4
  hywu hunyuan tiny tiny-hunyuan
  hywu hunyuan tiny --comfyui ~/ComfyUI
  hywu hunyuan edit tiny-hunyuan/base --generator tiny-hunyuan/generator --image cat.png \\
      --instruction "put a red hat on the cat" --size 256x256 --precision float32 --out noise.png
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..devices import chosen_device
from ..errors import HYWUError
from ..files import atomic_folder
from ..formats import load_lora
from ..images import WRITABLE, load_image, write_image
from . import hunyuan_folder
from .console import number, say
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
    edit.add_argument(
        "--lora", help="a LoRA instead, as `hywu generate` or --save-lora wrote it, on any machine"
    )
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
    plan.add_argument("--budget", type=number, metavar="GB", help="of weights on the device")
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
        "--budget", type=number, metavar="GB",
        help="most gigabytes of weights and LoRA on the device; experts that don't fit are copied in chunks, and "
        "a generator comes before or beside the model",
    )  # fmt: skip
    parser.add_argument(
        "--rest", choices=("file", "ram"), default="file",
        help="where those experts are meanwhile: in the folder's files, or in memory (default file)",
    )  # fmt: skip
    parser.add_argument(
        "--kv", choices=("device", "ram"), default="device",
        help="where keys and values rest between layers (default device)",
    )  # fmt: skip
    parser.add_argument(
        "--device-map", choices=("auto",), help="spread the layers over all devices, by accelerate"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def run(args: argparse.Namespace) -> int:
    steps: dict[str, Callable[[argparse.Namespace], int]] = {
        "edit": _edit, "condition": _condition, "tiny": _tiny, "inspect": hunyuan_folder.inspect,
        "quantize": hunyuan_folder.quantize, "plan": hunyuan_folder.plan,
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
    if args.lora is not None and args.generator is not None:
        raise HYWUError("--lora is a LoRA and --generator makes one; use one of them.")
    check_generator_options(args, GENERATOR)
    lora = None if args.lora is None else load_lora(args.lora)
    pipeline, request = _load(args, _layout(args, lora))
    request = _thought(args, pipeline, request)
    if lora is not None:
        lora = lora.to(pipeline.device, pipeline.model.dtype)
    if args.generator is not None:
        condition = pipeline.condition([request], _bar("condition"))
        with _room(args, pipeline, condition):
            lora = _generated(args, condition)
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
    if args.save_lora is not None:
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


def _layout(args: argparse.Namespace, lora: Any) -> Any:
    """Of the LoRA that the model gets, or None."""
    if lora is not None:
        return lora.layout
    if args.generator is None:
        return None
    from ..generator.checkpoints import open_checkpoint

    return open_checkpoint(args.generator).config.layout


def _load(args: argparse.Namespace, layout: Any) -> tuple[Any, Any]:
    """The pipeline and the request; whatever can be wrong with either is said before weights are read."""
    import torch

    from ..bases.hunyuan_image3 import Pipeline, Prompts, Request
    from ..bases.hunyuan_image3.checkpoint import stored_dtype
    from ..bases.hunyuan_image3.chunks import bound_product_plans

    bound_product_plans()
    device = chosen_device(args.device)
    prompts = Prompts.open(args.folder, args.system_prompt)
    images = [load_image(path) for path in args.image]
    request = Request(args.instruction, images, _text(args.cot), args.size, args.seed)
    prompts.check(request)
    dtype = None if args.precision == "stored" else getattr(torch, args.precision)
    budget = None if args.budget is None else int(args.budget * 1e9)
    if budget is not None and layout is not None:
        # the LoRA is on the device beside the model
        budget -= layout.num_values * (dtype or stored_dtype(prompts.folder)).itemsize
    pipeline = Pipeline.load(
        prompts, device, dtype, router_precision=args.router, layout=layout, budget=budget,
        rest=args.rest, kv=args.kv, device_map=args.device_map,
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


def _room(args: argparse.Namespace, pipeline: Any, condition: Any) -> Any:
    """Around a generator's run: the base model leaves the device where both don't fit in the budget."""
    from ..bases.hunyuan_image3.plan import generator_plan

    if args.budget is None:
        return contextlib.nullcontext()
    budget = int(args.budget * 1e9)
    if args.generator_memory_budget is None and args.generator_dtype != "fp8":
        args.generator_memory_budget = budget
    plan = generator_plan(args.generator, condition.num_tokens, args.generator_memory_budget)
    beside = pipeline.offloaded.placement.total_bytes + plan.total_bytes <= budget
    say(
        f"the base model {'stays on' if beside else 'leaves'} the device while the LoRA is generated"
    )
    return contextlib.nullcontext() if beside else pipeline.evicted()


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
