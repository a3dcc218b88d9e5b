"""`hywu`: one console command; each subcommand's code is imported only when it is called."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from .. import __version__
from ..errors import HYWUError, out_of_memory, printable

#: name -> (module of this package, with configure(parser) and run(args) -> int; one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": (
        ".inspect",
        "what a checkpoint or a LoRA holds: layout, sizes, origin, norms",
    ),
    "condition": (
        ".condition",
        "images and instructions in, condition out, by encoders from local folders",
    ),
    "generate": (".generate", "condition in, generated LoRA out"),
    "convert": (".convert", "official folder <-> one file; LoRA formats into each other"),
    "edit": (".edit", "edit an image with the bundled editor"),
    "train": (".train", "train a generator, or a baseline, through a frozen base"),
    "conflict": (
        ".conflict",
        "the experiment on contradictory tasks: train, compare, report",
    ),
    "pretrain": (".pretrain", "train the bundled editor itself"),
    "eval": (".eval", "WU-Eval, GEdit-Bench, ImgEdit-Bench, human GSB"),
    "hunyuan": (".hunyuan", "the published system: HunyuanImage-3.0-Instruct with HY-WU"),
    "comfy": (".comfy", "run a workflow on a ComfyUI server"),
    "comfy batch": (".comfy_batch", "many images through a workflow, on several servers"),
}

EPILOG = "`hywu COMMAND --help` explains one command and shows an example."


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "commands:\n" + "\n".join(lines) + f"\n\n{EPILOG}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 an error it explains, 2 wrong usage, 130 interrupted.

    A command may document further exit codes and return them itself.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    for handle in (sys.stdout, sys.stderr):
        if isinstance(handle, io.TextIOWrapper):
            # names and answers may hold what a console's character set lacks
            handle.reconfigure(errors="backslashreplace")
    parser = _parser()
    if not argv:
        parser.print_help()
        return 0
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    args = parser.parse_args([" ".join(argv[:words])])
    module = importlib.import_module(COMMANDS[args.command][0], package=__package__)
    command = argparse.ArgumentParser(
        prog=f"hywu {args.command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.configure(command)
    if empty := [word for word in argv if re.fullmatch(r"-[\w-]+=--", word)]:
        # before Python 3.13 argparse makes a list of it, which no option is
        command.error(f"{empty[0]}: '--' is no value")
    parsed = command.parse_args(argv[words:])
    with _ended_like_ctrl_c():
        return _run(args.command, lambda: int(module.run(parsed) or 0))


def _open_streams() -> None:
    """Where the process was started without (`>&-`, Windows' pythonw), what goes to one goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - to the end


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hywu",
        description="HY-WU: a LoRA for each image and instruction, written by a hypernetwork.",
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hywu {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS)
    return parser


def _run(name: str, command: Callable[[], int]) -> int:
    """The command's exit code, or that of what stopped it, which is said in one line."""
    try:
        return command()
    except HYWUError as error:
        sys.stderr.write(f"hywu {name}: {error}\n")
        return 1
    except BrokenPipeError:  # `hywu … | head`: nobody reads on
        _drop_unwritten()
        return 1
    except OSError as error:
        _drop_unwritten()
        text = f"{error.strerror or error}: {error.filename or ''}"
        sys.stderr.write(f"hywu {name}: {printable(text)}\n")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.stderr.write(f"hywu {name}: not enough memory for this\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"hywu {name}: interrupted\n")
        return 130


def _drop_unwritten() -> None:
    """Where standard output takes nothing any more, Python would complain again at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM within the block, as service managers and `kill` send it, does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
