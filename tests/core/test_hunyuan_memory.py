"""Quantizing a folder of some two hundred megabytes: what the process holds of it, in anonymous memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hywu_core.bases.hunyuan_image3 import open_folder, tiny

ROOT = Path(__file__).parents[2]
#: The network's sizes: 157 MB of experts in bfloat16.
SIZES = {"LAYERS": 4, "HIDDEN": 512, "HEAD": 128, "EXPERTS": 32, "WIDTH": 400}
#: What torch, the tokenizer and the files' heads take.
SLACK = 24 << 20

CHILD = """
    import json, sys
    import torch
    sys.path.insert(0, "tests/helpers")
    from hywu_core.bases.hunyuan_image3.quantize import quantize
    from resident import Watch

    torch.set_num_threads(1)
    small, base, out = sys.argv[1:]
    quantize(small, out + "-small", "nf4")
    with Watch() as watch:
        quantize(base, out, "nf4")
    print(json.dumps({"peak": watch.peak}))
"""


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SIZES.items():
            patch.setattr(tiny, name, value)
        return tiny.write_tiny(tmp_path_factory.mktemp("hunyuan") / "middle")


@pytest.fixture(scope="module")
def child(middle):
    small = tiny.write_tiny(middle.parent / "small") / "base"

    def run() -> dict:
        files = [small, middle / "base", middle.parent / "out"]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, files)],
            capture_output=True, text=True, timeout=900, cwd=ROOT,
            # freed memory goes back to the system at once, so that what is resident is what is held
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's /proc"
)


def test_quantize_holds_a_tensor_at_a_time(middle, child):
    folder = open_folder(middle / "base")
    largest = max(torch.Size(shape).numel() for shape in folder.shapes.values())
    found = child()
    print({"files": folder.nbytes, "largest": largest, **found})
    assert found["peak"] < 8 * largest + SLACK < folder.nbytes / 3
