"""The data path of a training: what large images cost per step, cold and warm, beside small ones of the same content.

Photographs of noise and gradients are written as JPEG, `--pixels` million each and 512 pixels wide. Both sets
are trained on in turn; each round is an epoch of real steps (a static LoRA on the bundled editor).

cold    first epoch: every image is decoded
warm    all decoded images are in memory
folder  none is in memory, all are in the cache's folder

python3 dev.py bench data [--pixels 12] [--pairs 12] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hywu_core.bases.bundled.checkpoint import bundled, load_editor
from hywu_core.bases.bundled.training import EditorBase
from hywu_core.layout import LoRALayout
from hywu_core.training import Ahead, PairBatches, StaticLoRA, TrainConfig, Trainer, read_pairs

from .measure import show_json

SMALL = 512


def write_set(folder: Path, pairs: int, width: int) -> Path:
    """Pairs of 4:3 photographs; the same content at every width."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(pairs):
        for side in (0, 1):
            noise = np.random.default_rng(2 * i + side).integers(0, 256, (96, 128, 3), np.uint8)
            image = Image.fromarray(noise).resize((width, width * 3 // 4), Image.Resampling.BICUBIC)
            image.save(folder / f"{i}_{side}.jpg", quality=92)
        rows.append(
            {"source": f"{i}_0.jpg", "target": f"{i}_1.jpg", "instruction": f"edit {i % 4}"}
        )
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl"


class Run:
    """A training on one set. seconds: wall and CPU of each step of an epoch."""

    def __init__(
        self, pairs: list, folder: Path, batch_size: int, size: int, cache: Path | None
    ) -> None:
        self.batches = PairBatches(pairs, batch_size, size, cache=cache)
        self.epoch = max(1, len(pairs) // batch_size)
        base = EditorBase(load_editor(bundled("editor")))
        strategy = StaticLoRA(base, LoRALayout.of(base.module, 2))
        config = TrainConfig(10**6, batch_size=batch_size, lr=1e-4)
        self.trainer = Trainer(
            base, strategy, Ahead(self.batches, depth=2), config, folder, device="cpu"
        )

    def seconds(self, drop: bool = False) -> tuple[float, float]:
        """Per step of an epoch: wall and CPU time. drop: nothing decoded stays in memory."""
        if drop:
            self.batches.images.most = 0
        wall, cpu = time.perf_counter(), time.process_time()
        for step in range(self.trainer.step, self.trainer.step + self.epoch):
            self.trainer._train_step(step)
            self.trainer.step += 1
        return (time.perf_counter() - wall) / self.epoch, (time.process_time() - cpu) / self.epoch


def ratios(rounds: int, large: Callable, small: Callable) -> dict[str, object]:
    """Large over small, in turn; medians of wall and CPU time."""
    measured = [(large(), small()) for _ in range(rounds)]
    out: dict[str, object] = {}
    for place, name in enumerate(("wall", "cpu")):
        out[f"{name}_ratio"] = statistics.median(a[place] / b[place] for a, b in measured)
        out[f"{name}_seconds"] = [
            statistics.median(m[side][place] for m in measured) for side in (0, 1)
        ]
    return out


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    width = round((args.pixels * 1e6 * 4 / 3) ** 0.5)
    figures: dict[str, object] = {"width": width}
    sets = {}
    for name, wide in (("large", width), ("small", SMALL)):
        path = write_set(folder / name, args.pairs, wide)
        started = time.perf_counter()
        sets[name] = read_pairs(path)[0]
        figures[f"read_pairs_{name}"] = time.perf_counter() - started

    def runs(cache: bool) -> list[Run]:
        return [
            Run(sets[n], folder / f"run_{n}_{cache}", args.batch_size, args.size, folder / f"cache_{n}" if cache else None)
            for n in ("large", "small")
        ]  # fmt: skip

    large, small = runs(cache=True)
    figures["cold"] = ratios(1, large.seconds, small.seconds)
    for run in (large, small):
        run.seconds()
    figures["warm"] = ratios(args.rounds, large.seconds, small.seconds)
    figures["folder"] = ratios(
        args.rounds, lambda: large.seconds(True), lambda: small.seconds(True)
    )
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pixels", type=float, default=12, help="millions, of the large images")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="pixels per side of a crop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        figures = {**vars(args), "json": None, **measure(Path(folder), args)}
    show_json(args.json, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
