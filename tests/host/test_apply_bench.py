"""The benchmark of applying LoRAs, at the smallest size: every variant runs, and computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import dev


def test_the_apply_benchmark_runs_and_its_ways_agree(comfyui, tmp_path):
    file = tmp_path / "figures.json"
    size = ("--tiny", "--ranks", "2", "--batches", "1", "2", "--repeats", "2", "--steps", "1")
    done = subprocess.run(
        [sys.executable, dev.ROOT / "dev.py", "bench", "apply", *size, "--json", file],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures["comfyui"] == comfyui.version
    assert figures["environment"]["torch"]
    assert set(figures["models"]) == {"bundled editor", "Wan 2.1"}
    for name, model in figures["models"].items():
        assert name in done.stdout
        # the editor is sampled in bfloat16 where that is fast
        assert model["difference"] < (2e-2 if name == "bundled editor" else 1e-5)
        assert model["effect"] > 1e-3
        assert set(model["exchange"]) == {"stock, file", "stock, memory", "merge", "unmerged"}
        assert model["exchange"]["stock, file"]["cpu_s"]["speedup"] == 1
        assert set(model["step"]) == {"1", "2"}
        assert set(model["step"]["1"]) == {"plain", "plain again", "rank 2"}
        assert set(model["step"]["2"]) == {"plain", "plain again", "rank 2", "rank 2, one each"}
        clocks = [
            c for found in (*model["step"].values(), model["exchange"]) for c in found.values()
        ]
        assert all(c["wall_s"]["min"] > 0 and c["cpu_s"]["min"] > 0 for c in clocks)
        # a merge reads and writes every weight, an unmerged exchange none
        assert model["exchange"]["unmerged"]["cpu_s"]["paired_speedup"] > 1.5
