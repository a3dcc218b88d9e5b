"""The examples of docs/ run as they stand, on a user's pairs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hywu_core.files import read_header
from hywu_core.formats import load_lora
from hywu_core.generator.checkpoints import load_generator
from hywu_core.headless.local import free_port

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Blocks of colour; "swap" exchanges red and blue, "dark" halves."""
    rows = []
    for i in range(12):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = coarse.repeat(8, 0).repeat(8, 1)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        for text, target in (("swap colours", image[..., ::-1]), ("make it dark", image // 2)):
            name = f"{i}_{text[:4]}.png"
            Image.fromarray(np.ascontiguousarray(target)).save(tmp_path / name)
            rows.append({"source": f"{i}.png", "target": name, "instruction": text})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run_example(name: str, pairs: Path, out: Path, steps: int, *launcher: str) -> str:
    """What an example writes, run as a user runs it."""
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), str(pairs), str(out), str(steps)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_an_own_base_is_trained_measured_and_written_for_peft(pairs, tmp_path):
    assert len((EXAMPLES / "own_base.py").read_text(encoding="utf-8").splitlines()) < 80
    out = tmp_path / "out"
    words = run_example("own_base.py", pairs, out, 40).split()
    unchanged, edited = (float(words[words.index(w) - 1]) for w in ("unchanged,", "edited"))
    assert edited < 0.8 * unchanged
    generator = load_generator(out / "generator.safetensors")
    assert generator.config.base == "my-vit"
    assert dict(generator.config.condition) == {"image": 96, "words": 48}
    assert read_header(out / "state.safetensors")["step"] == 40
    assert load_lora(out / "peft").rank == 4


def test_an_own_base_is_trained_by_two_processes(pairs, tmp_path):
    two = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    run_example("own_base.py", pairs, tmp_path, 2, *two)
    assert read_header(tmp_path / "state.safetensors")["processes"] == 2
    assert load_generator(tmp_path / "generator.safetensors").config.base == "my-vit"
    assert load_lora(tmp_path / "peft").rank == 4


def test_an_own_denoiser_is_trained_and_written_for_peft(pairs, tmp_path):
    out = tmp_path / "out"
    done = run_example("own_denoiser.py", pairs, out, 60)
    words = done.split()
    before, trained = (float(words[words.index(w) - 1]) for w in ("before,", "trained"))
    assert trained < 0.9 * before
    generator = load_generator(out / "generator.safetensors")
    assert generator.config.base == "my-denoiser"
    assert load_lora(out / "peft").rank == 4


@pytest.mark.parametrize("name", ["own_base.py", "own_denoiser.py"])
def test_the_docs_name_the_examples(name):
    assert f"examples/{name}" in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
