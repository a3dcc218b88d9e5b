"""A generated LoRA on GGUF-quantized copies of base models: unmerged is exact, the bytes stay as they are."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: Largest difference of two latents that count as equal, as a share of the largest value.
EQUAL = 1e-5


@pytest.fixture(scope="module")
def figures(comfyui, tmp_path_factory):
    python, folder = comfyui.python, tmp_path_factory.mktemp("gguf")
    if subprocess.run([python, "-c", "import gguf"], capture_output=True).returncode:
        pytest.skip(f"{python} has no package gguf; a ComfyUI of your own needs it for GGUF models")
    done = subprocess.run(
        [python, HERE / "gguf_figures.py", comfyui.tree, HERE.parents[1], folder],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")},
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("FIGURES")]
    assert found, done.stderr[-3000:]
    return json.loads(found[0].removeprefix("FIGURES"))


@pytest.mark.parametrize("name", ["SD3, Q8_0", "Wan 2.1, Q4_0"])
def test_unmerged_is_exact_on_quantized_weights(figures, name):
    found = figures[name]
    assert found["held"] >= found["targets"] > 10
    assert found["same_layout"]
    assert found["rounding"] > 10 * EQUAL  # the copy is another model than the one it was made of
    assert found["base"] < EQUAL
    assert found["unmerged"] < EQUAL
    assert found["items"] < EQUAL
    assert found["effect"] > 100 * EQUAL
    assert found["untouched"]
