"""Time and memory of the generator against a straightforward eager implementation.

    python3 dev.py bench generator [--json FILE] [--repeats N] [--skip-load]

CPU, float32: the bundled generator's size with a condition of 160 tokens, and d_model 512, head_dim 64, 10
blocks, 8 layers x 80 tokens, rank 16, accumulation 4, with one of 1,000. With a CUDA device also the
official default size with random bfloat16 weights. Then the peak host memory of loading 2 GB in four
shards.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hywu_core.cli.console import say, table
from hywu_core.generator.official import save_official

from .measure import paired, peak_memory, summary, write_json
from .sizes import CPU_SIZES, SIZES, cpu_config, make, official_config, random_condition
from .variants import reference, relative_difference


@torch.no_grad()
def cpu(repeats: int) -> dict:
    """Both sizes that a CPU runs, each against the eager reference, in one table."""
    found, rows = {}, []
    for size in CPU_SIZES:
        config = SIZES[size].config()
        generator = make(config)
        device = torch.device("cpu")
        condition = random_condition(config, SIZES[size].condition_tokens, device, torch.float32)
        functions = {
            "plain eager": reference(generator, condition),
            "ours": lambda g=generator, c=condition: g.generate_grids(c),
        }
        # before anything is cached: our figure includes the constant prefix that later calls find made
        memory = {name: peak_memory(function) for name, function in functions.items()}
        error = relative_difference(functions["ours"](), functions["plain eager"]())
        times = paired(functions, repeats)
        pairs = len(times["ours"]["wall_s"])
        result = summary(times, "plain eager")
        say(
            f"{size}: {SIZES[size].words}; {config.num_positions:,} positions, relative difference "
            f"{error:.1e}, {pairs} pairs"
        )
        rows += _rows(size, result, memory)
        found[size] = {
            "relative_difference": error, "pairs": pairs, "time": result, "peak_bytes": memory,
        }  # fmt: skip
    header = (
        "size", "forward", "wall s", "faster", "CPU s", "faster", "peak activations MiB", "of eager",
    )  # fmt: skip
    table(rows, header)
    return found


def _rows(size: str, result: dict, memory: dict[str, int]) -> list[tuple[str, ...]]:
    rows = []
    for name, clocks in result.items():
        wall, used = clocks["wall_s"], clocks["cpu_s"]
        rows.append(
            (
                size,
                name,
                f"{wall['median']:.3f}",
                f"{wall['speedup']:.2f}x",
                f"{used['median']:.3f}",
                f"{used['speedup']:.2f}x",
                f"{memory[name] / 2**20:.1f}",
                f"{memory[name] / memory['plain eager']:.2f}",
            )
        )
    return rows


@torch.no_grad()
def cuda_official(condition_tokens: int = 4000) -> dict:
    generator = make(official_config(), "cuda", torch.bfloat16)
    tokens = torch.randn(1, condition_tokens, 4096, device="cuda", dtype=torch.bfloat16)
    generator(tokens)  # kernels are built, libraries make their handles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
    start.record()
    generator(tokens)
    stop.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    seconds = start.elapsed_time(stop) / 1000
    say(f"CUDA, official size: {seconds:.2f} s, {peak / 2**30:.2f} GiB over the weights")
    return {"seconds": seconds, "peak_over_weights_bytes": peak}


LOAD = """
import sys
from pathlib import Path
import torch
from hywu_core import load_generator
def high_water():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
Path("/proc/self/clear_refs").write_text("5")
before = high_water()
generator = load_generator(sys.argv[1])
weights = sum(p.numel() * p.element_size() for p in generator.parameters())
print(high_water() - before, weights)
"""


def load_memory(gigabytes: float = 2.0) -> dict:
    """Peak resident memory of loading a checkpoint in four shards, in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        say(
            "Loading: peak resident memory is read from /proc, which this system lacks; not measured."
        )
        return {}
    config = cpu_config().with_(d_model=2048, num_blocks=1)
    per_block = 18 * 2048**2 * 4
    config = config.with_(num_blocks=max(1, round(gigabytes * 1e9 / per_block)), head_dim=128)
    config = config.with_(token_dim=512)
    with tempfile.TemporaryDirectory() as folder:
        generator = make(config)
        total = sum(p.numel() * p.element_size() for p in generator.parameters())
        save_official(generator, folder, shard_bytes=total // 4 + (64 << 20))
        del generator
        shards = len(list(Path(folder).glob("*.safetensors")))
        root = str(Path(__file__).parent.parent)
        paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        out = subprocess.run(
            [sys.executable, "-c", LOAD, folder],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=True,
        )
    peak, weights = map(int, out.stdout.split())
    say(
        f"Loading {weights / 1e9:.2f} GB in {shards} shards: peak resident memory "
        f"{peak / weights:.2f} x the weights"
    )
    return {"weights_bytes": weights, "shards": shards, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--skip-load", action="store_true", help="leave out loading 2 GB")
    args = parser.parse_args()
    figures = {"cpu": cpu(args.repeats)}
    if not args.skip_load:
        figures["load"] = load_memory()
    if torch.cuda.is_available():
        figures["cuda_official"] = cuda_official()
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
