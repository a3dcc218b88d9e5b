"""Applying a generated LoRA inside ComfyUI: what a step costs unmerged, and what another LoRA costs.

step      one call of the model with the LoRA unmerged against the plain model: per rank and batch, one LoRA
          for all images and one for each; the plain model a second time shows the noise
exchange  from the node that brings another LoRA to the first call of the model: stock Load LoRA from a file,
          the same from memory, and Apply Generated LoRA merged and unmerged

All in one process of ComfyUI's Python, in turn; medians, and ratios within the rounds. The models are the
bundled editor and a Wan 2.1 of small width, both with random weights, loaded by their loader nodes.

python3 dev.py bench apply [--ranks 4 16 64] [--batches 1 4] [--repeats 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dev
from hywu_core.bases.bundled.checkpoint import VARIABLE, save_editor
from hywu_core.bases.bundled.model import Editor, EditorConfig
from hywu_core.cli.console import say, table

from .measure import write_json

HOST = Path(__file__).with_name("apply_host.py")
#: Which of the two clocks of bench/measure.py the tables show; the JSON has both.
SHOWN = "cpu_s"


def make_editor(folder: Path, tiny: bool) -> None:
    """The bundled editor's file with random weights in the size it is shipped in, or a tiny one."""
    small = EditorConfig((8, 16), (1, 0), (1, 1), text_depth=1)
    editor = Editor(small if tiny else EditorConfig())
    editor.reset_parameters()
    # zero at first: nothing would reach the image
    torch.nn.init.normal_(editor.scales[0].leave.weight, std=0.05)
    save_editor(editor, folder / "editor.safetensors", {})


def measure(host: dev.Host, options: dict[str, Any]) -> dict[str, Any]:
    """Run apply_host.py in ComfyUI's Python; its progress is shown, its figures come back."""
    with tempfile.TemporaryDirectory() as folder:
        make_editor(Path(folder), options["tiny"])
        done = subprocess.run(
            [host.python, HOST, host.tree, dev.ROOT, folder, json.dumps(options)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, VARIABLE: folder},
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES")]
    if not lines:
        raise SystemExit(f"{HOST.name} ended with {done.returncode} and no figures; see above.")
    return json.loads(lines[0].removeprefix("FIGURES"))


def show(figures: dict[str, Any]) -> None:
    for name, model in figures["models"].items():
        say(f"\n{name}: {model['parameters']:,} weights; {model['about']}")
        rows = []
        for batch, found in model["step"].items():
            for variant, clocks in found.items():
                ratio = 1 / clocks[SHOWN]["paired_speedup"]
                rows.append((batch, variant, _ms(clocks), f"{ratio - 1:+.1%}"))
        table(rows, ("batch", "a step", "ms", "to plain"))
        rows = [
            (way, _ms(clocks), f"{1 / clocks[SHOWN]['paired_speedup']:.3f}")
            for way, clocks in model["exchange"].items()
        ]
        table(rows, ("exchange", "ms", "to stock"))
        say(
            f"latents differ from stock's by {model['difference']:.1e} of the largest value at most, "
            f"from those without LoRA by {model['effect']:.1e}"
        )


def _ms(clocks: dict[str, dict[str, float]]) -> str:
    return f"{clocks[SHOWN]['median'] * 1e3:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=9, help="rounds; default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, help="model calls a round and variant")
    parser.add_argument("--tiny", action="store_true", help="models of almost no size, for tests")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    options = {k: v for k, v in vars(args).items() if k != "json"}
    host = dev.prepare_host()
    figures = {"comfyui": host.version, **measure(host, options)}
    show(figures)
    write_json(args.json, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
