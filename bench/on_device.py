"""Training on a GPU: the third ten minutes on a device. How fast, then as much as there is time for.

    python -m bench.on_device --json FILE --out FOLDER [--seconds 570] [--batch-sizes 24 256 1024]
    python -m bench.on_device --pack IMAGES.safetensors
    python -m bench.on_device --device cpu --tiny --json FILE --out FOLDER     for the tests

First the bundled editor's pretraining and a generator's training are tried for some steps at each batch
size, each a process of its own, through the same commands as anywhere; then each goes on at the batch size with
the most crops per second, for an equal share of the time that is left, and its weights go to --out in half
precision, in files of at most 16 MiB, with the figures beside them. The generator is trained on the editor that
is shipped. States stay in --runs, so that a later call goes on. The images are the packages' that `hywu train` uses; where these aren't, --images names
one file with all of them, which --pack writes on a machine that has them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hywu_core.cli.console import say, table
from hywu_core.experiments.images import PACKED, pack_images
from hywu_core.training.logs import read_log

from . import clocks, isolated
from .measure import checked, course_options, write_json

#: Most bytes of one file of results.
LARGEST_FILE = 16 << 20

#: What each training writes its weights to.
WEIGHTS = {"pretrain": "editor.safetensors", "train": "weights.safetensors"}

#: Steps of a trial, of which the second half is timed.
TRIAL_STEPS = 60


def command(name: str, out: Path, steps: int, batch_size: int, device: str) -> list[str]:
    """One of the training commands, for so many steps."""
    shared = ["--out", str(out), "--batch-size", str(batch_size), "--device", device]
    if name == "pretrain":
        stages = ["--first-steps", "0", "--fine-steps", "0", "--last-steps", "0"]
        stages += ["--save-every", str(max(200, steps))]
        return ["pretrain", "--steps", str(steps), *stages, *shared]
    quiet = ["--sample-every", str(10 * steps), "--save-every", str(10 * steps)]
    return ["train", "--steps", str(steps), *quiet, *shared]


def trained(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Run a command of the engine; "failed" tells how where it fails, "ended" that its time was over."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hywu_core.cli", *arguments], cwd=isolated.ROOT,
            capture_output=True, text=True, timeout=max(1.0, seconds), stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"ended": f"after {seconds:.0f} s"}
    if done.returncode == 0:
        return {}
    lines = done.stderr.strip().splitlines()
    return {"failed": lines[-1][:200] if lines else f"exit code {done.returncode}",
            "trace": done.stderr[-1500:]}  # fmt: skip


def trial(
    name: str, batch_size: int, device: str, steps: int, seconds: float
) -> dict[str, Any]:  # fmt: skip
    """Steps per second in the second half of a short training."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        found = trained(command(name, out, steps, batch_size, device), seconds)
        logs = sorted(out.rglob("log.csv"))
        rows = read_log(logs[0]) if logs else []
    found |= {"batch_size": batch_size, "steps": rows[-1]["step"] if rows else 0}
    if len(rows) > 1:
        first, last = rows[(len(rows) - 1) // 2], rows[-1]
        span = last["seconds"] - first["seconds"]
        if span > 0:
            found["steps_per_s"] = (last["step"] - first["step"]) / span
    return found


def exported(
    file: Path, folder: Path, largest: int = LARGEST_FILE, stem: str | None = None
) -> list[str]:
    """A safetensors file's tensors in float16, in files of at most `largest` bytes; their names.

    A tensor larger than that is a file of its own. The header's entries go to the first.
    stem: begins the names instead of the file's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    room = largest
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata() or {}
        for key in sorted(opened.keys()):
            value = opened.get_tensor(key)
            value = value.half() if value.is_floating_point() else value
            if value.nbytes > room and shards[-1]:
                shards.append({})
                room = largest
            shards[-1][key] = value
            room -= value.nbytes
    names = []
    for i, shard in enumerate(shards):
        name = f"{stem or file.stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, str(folder / name), metadata if i == 0 else None)
        names.append(name)
    return names


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trials, then one long training; returns what is written to the JSON."""
    end = time.perf_counter() + args.seconds
    if args.images is not None:
        os.environ[PACKED] = str(args.images.absolute())
    steps = 4 if args.tiny else TRIAL_STEPS
    figures: dict[str, Any] = {"device": args.device, "trainings": {}}
    with clocks.course(args.json, figures):
        for name in args.trainings:
            for batch_size in args.batch_sizes:
                left = end - time.perf_counter()
                if left < (1 if args.tiny else 40):
                    break
                found = trial(name, batch_size, args.device, steps, min(90.0, left))
                figures["trainings"][f"{name}, {batch_size}"] = found
                write_json(args.json, figures)
                say(f"{name}, batch of {batch_size}: {_told(found)}")
        if not args.only_trials:
            _long(args, figures, end)
    rows = [
        (name, f"{f['steps_per_s']:.3g}", f"{f['steps_per_s'] * f['batch_size']:.4g}")
        for name, f in figures["trainings"].items()
        if "steps_per_s" in f
    ]
    table(rows, ("training, batch", "steps/s", "crops/s"))
    return figures


def _told(found: dict[str, Any]) -> str:
    if "steps_per_s" in found:
        return f"{found['steps_per_s']:.3g} steps/s"
    return found.get("failed") or found.get("ended") or "too short to tell"


def _long(args: argparse.Namespace, figures: dict[str, Any], end: float) -> None:
    """Each training at its best batch size for its share of the time, and its weights."""
    figures["long"] = {}
    for i, name in enumerate(args.trainings):
        share = (end - time.perf_counter()) / (len(args.trainings) - i)
        figures["long"][name] = _longest(name, args, figures["trainings"], share)
        write_json(args.json, figures)


def _longest(
    name: str, args: argparse.Namespace, trials: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """As many steps of a training as so many seconds have, by its trials."""
    rates = {
        f["batch_size"]: f["steps_per_s"] * f["batch_size"]
        for key, f in trials.items()
        if key.startswith(name) and "steps_per_s" in f
    }
    if not rates:
        return {"skipped": "no trial gave a rate"}
    batch_size = max(rates, key=lambda size: rates[size])
    left = seconds - (5 if args.tiny else 45)  # to start, save and export
    steps = 4 if args.tiny else max(2, int(left * rates[batch_size] / batch_size))
    runs = (args.runs or args.out / "runs") / name
    found = trained(command(name, runs, steps, batch_size, args.device), max(60.0, left + 30))
    files = sorted(runs.rglob(WEIGHTS[name]), key=lambda file: file.stat().st_mtime)
    figures = {"batch_size": batch_size, "steps": steps, "crops": steps * batch_size, **found}
    if files:
        figures["files"] = exported(files[-1], args.out, stem=name)
    return figures


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    course_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained weights")
    parser.add_argument("--runs", type=Path, help="folder of states (default: runs below --out)")
    parser.add_argument("--images", type=Path, help="packed images, instead of the packages'")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[24, 256, 1024])
    parser.add_argument(
        "--trainings", nargs="+", choices=("pretrain", "train"), default=["pretrain", "train"]
    )
    parser.add_argument("--only-trials", action="store_true", help="leave the long training out")
    return checked(parser, arguments)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pack"]:
        say(str(pack_images(Path(sys.argv[2]))))
    else:
        run(parse())
