"""Make a method's results on a benchmark, laid out as its authors lay them out.

  GEdit-Bench    OUT/METHOD/fullset/<task>/<language>/<key>.png and <key>_SRCIMG.png
  ImgEdit-Bench  OUT/METHOD/<key>.png
  folder         OUT/METHOD/<key>.png

What is there is kept, so the same command resumes an interrupted run and retries what failed (it
stands in OUT/METHOD/failures.jsonl). Exit code 3: finished, but some items have no result.

  hywu eval generate --benchmark folder --data samples --out results --editor bundled
  hywu eval generate --benchmark folder --data samples --out results --method shared \\
      --editor bundled --lora shared
  hywu eval generate --benchmark gedit --data GEdit-Bench --out results --method copy --editor copy
  hywu eval generate --benchmark imgedit --data ImgEdit --out results --method flux --editor comfy \\
      --workflow edit_api.json --comfy-image 12.image --comfy-instruction 6.text --comfy-seed 3.seed
  hywu eval generate --benchmark folder --data items --out results --method mine --editor command \\
      --command 'python edit.py {source} {out} {instruction} {seed}'
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import HYWUError
from ...evaluation.editors import CommandEditor, CopyEditor, Editor
from ...evaluation.generate import GenerationCount, generate_results
from ...evaluation.items import data_path, read_items
from ...evaluation.results import Results
from ...files import check_name
from ..console import say
from . import shared


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hywu eval generate`."""
    shared.add_data(parser, required=True)
    parser.add_argument("--out", required=True, help="folder of all methods' results")
    parser.add_argument("--method", help="name of this method's folder (default: the editor's)")
    parser.add_argument("--seed", type=int, default=0, help="the same for every item (%(default)s)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    parser.add_argument("--languages", nargs="+", metavar="LANG", help="only these (GEdit: en cn)")
    parser.add_argument("--limit", type=int, help="at most so many items a task")
    parser.add_argument("--tries", type=int, default=2, help="tries an item a run (%(default)s)")
    add_editor(parser)


def add_editor(parser: argparse.ArgumentParser) -> None:
    """--editor and its options."""
    parser.add_argument(
        "--editor",
        required=True,
        choices=("bundled", "comfy", "command", "copy"),
        help="bundled: the editor that comes along, with a LoRA generated for each item; comfy: a "
        "workflow on a ComfyUI server; command: any program; copy: the unchanged source, a lower "
        "anchor",
    )
    parser.add_argument("--workers", type=int, default=1, help="edits at once (%(default)s)")
    engine = parser.add_argument_group("bundled")
    engine.add_argument(
        "--lora",
        help="in place of generating: a bundled LoRA (shared, single_blur, ...), a LoRA file, or "
        "'none' for the editor alone; {task} in it stands for the item's task ('single_{task}')",
    )
    engine.add_argument(
        "--fine-tuned",
        metavar="FILE",
        help="all of the editor's weights, fine-tuned: weights/sft.safetensors of `hywu conflict`",
    )
    engine.add_argument("--steps", type=int, default=4, help="sampling steps (%(default)s)")
    engine.add_argument("--strength", type=float, default=1.0, help="of the LoRA (%(default)s)")
    engine.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    comfy = parser.add_argument_group("comfy")
    comfy.add_argument("--server", default="http://127.0.0.1:8188", help="%(default)s")
    comfy.add_argument("--workflow", help="the workflow in API format (JSON)")
    comfy.add_argument("--comfy-image", metavar="NODE.INPUT", help="takes the source's file name")
    comfy.add_argument("--comfy-instruction", metavar="NODE.INPUT", help="takes the instruction")
    comfy.add_argument("--comfy-seed", metavar="NODE.INPUT", help="takes the seed (optional)")
    comfy.add_argument(
        "--comfy-output", metavar="NODE", help="whose picture (default: the only one)"
    )
    command = parser.add_argument_group("command")
    command.add_argument(
        "--command", help="with {source}, {out}, {instruction} and {seed}; no shell"
    )
    command.add_argument("--item-timeout", type=float, default=600, help="seconds (%(default)s)")


def make_editor(args: argparse.Namespace) -> Editor:
    """The editor that the arguments describe. Raises HYWUError naming what is missing."""
    if args.editor == "copy":
        return CopyEditor(args.workers)
    if args.editor == "bundled":
        from ...evaluation.bundled_editor import EngineEditor

        return EngineEditor(args.lora, args.steps, args.strength, args.device, args.fine_tuned)
    if args.editor == "command":
        if not args.command:
            raise HYWUError("--editor command needs --command.")
        return CommandEditor(args.command, args.workers, args.item_timeout)
    from ...evaluation.comfy_editor import ComfyEditor

    needed = ("workflow", "comfy_image", "comfy_instruction")
    if missing := [name for name in needed if not getattr(args, name)]:
        names = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise HYWUError(f"--editor comfy needs {names}.")
    return ComfyEditor(
        args.server,
        Path(args.workflow),
        image=args.comfy_image,
        instruction=args.comfy_instruction,
        seed=args.comfy_seed,
        output=args.comfy_output,
        parallel=args.workers,
        timeout=args.item_timeout,
    )


def run(args: argparse.Namespace) -> int:
    """Generate what is missing; exit code 0, or 3 when items remain without a result."""
    data = data_path(args.benchmark, args.data)
    out = Path(args.out)
    try:
        method = check_name(args.method or args.editor, "name")
    except HYWUError as error:
        raise HYWUError(f"The method can't be used: {error}.") from error
    items = read_items(args.benchmark, data, unpack_to=out / "gedit_data")
    for bad in items.bad:
        say(f"not usable: {bad}")
    results = Results(out / method, args.benchmark)
    selection = {"tasks": args.tasks, "languages": args.languages, "limit": args.limit}
    count = generate_results(
        results, items, make_editor(args), data, args.seed, args.tries, selection
    )
    tell(results, count)
    return shared.INCOMPLETE if count.failed else 0


def tell(results: Results, count: GenerationCount) -> None:
    """Say what was made and what was not."""
    say(f"{results.root}: {count.made} made, {count.kept} kept, {len(count.failed)} failed")
    for item, reason in list(count.failed.items())[:10]:
        say(f"  {item}: {reason}")
    if count.failed:
        say(
            f"  all of them in {results.root / 'failures.jsonl'}; the same command tries them again"
        )
