"""A generated LoRA on GGUF-quantized copies of base models: unmerged is exact, the bytes stay as they are."""

from __future__ import annotations

import os
import subprocess

import pytest

#: The folder of ComfyUI-GGUF, whose loader node is then tested as well as layers of our own.
NODE_PACK = os.environ.get("HYWU_GGUF_NODES", "")

#: Largest difference of two latents that count as equal, as a share of the largest value.
EQUAL = 1e-5


@pytest.fixture(scope="module", params=["layers", *(["node pack"] if NODE_PACK else [])])
def figures(comfyui, run_inside, tmp_path_factory, request):
    python = comfyui.python
    if subprocess.run([python, "-c", "import gguf"], capture_output=True).returncode:
        pytest.skip(f"{python} has no package gguf; a ComfyUI of your own needs it for GGUF models")
    pack = [NODE_PACK] if request.param == "node pack" else []
    return run_inside("gguf_figures.py", tmp_path_factory.mktemp("gguf"), *pack)


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
    assert found.get("merge", 0) < EQUAL  # the node pack adds patches where it dequantizes
