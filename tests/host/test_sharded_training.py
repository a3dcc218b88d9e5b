"""What two processes with FSDP2 train together is used in ComfyUI like what one process trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import edit_graph as g
import pytest
from pairs import make_pairs

import dev
from hywu_core.bases.bundled.checkpoint import bundled
from hywu_core.files import read_header
from hywu_core.formats import load_lora
from hywu_core.headless.local import free_port

pytest.importorskip("torch.distributed.fsdp", reason="torch before 2.6 has no FSDP2")

TEXT = "make it warm"
LAUNCHERS = {
    "whole": [],
    "sharded": ["-m", "accelerate.commands.launch", "--config_file", "docs/examples/accelerate_fsdp2.yaml",
                "--main_process_port"],
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(server, weights, tmp_path_factory) -> dict[str, Path]:
    """The folders of one training on the server's editor: by one process, and by two with FSDP2. Their
    generators are in the server's models/hywu under these names.
    """
    folder = tmp_path_factory.mktemp("trained")
    data = make_pairs(folder / "pairs")
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(dev.ROOT),
    }
    models = server.base / "models" / "hywu"
    models.mkdir(parents=True, exist_ok=True)
    for name, launcher in LAUNCHERS.items():
        port = [str(free_port())] if launcher else []
        command = [sys.executable, *launcher, *port, "-m", "hywu_core.cli", "train", "--out", folder / name,
                   "--data", data, "--editor", bundled("editor"), "--steps", 6, "--batch-size", 4,
                   "--optimizer", "adamw", "--precision", "no", "--d-model", 64, "--sample-every", 0,
                   "--device", "cpu"]  # fmt: skip
        done = subprocess.run(
            list(map(str, command)), env=environment, cwd=dev.ROOT, timeout=400, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("2 processes, sharded" in done.stdout) == (name == "sharded")
        shutil.copy(folder / name / "weights.safetensors", models / f"{name}.safetensors")
    return {name: folder / name for name in LAUNCHERS}


def used(server, name: str) -> tuple:
    """The LoRA that a generator of models/hywu writes in a graph, and the edit with it."""
    graph = g.edit_graph(TEXT)
    graph["generator"]["inputs"]["checkpoint"] = f"{name}.safetensors"
    graph["keep"] = g.node(
        "HYWUSaveLoRA", lora=["generate", 0], filename_prefix=f"loras/{name}", format="native"
    )
    outputs = g.run(server, graph)
    assert g.said(outputs, "encode")["warnings"] == []
    path = server.base / "output" / outputs["keep"]["text"][0]
    return load_lora(path), g.images(server, outputs)


def test_a_sharded_runs_generator_writes_the_lora_of_the_whole_one(server, trained):
    headers = [read_header(trained[name] / "state.safetensors") for name in LAUNCHERS]
    assert [header["processes"] for header in headers] == [1, 2]
    g.put_photo(server.base / "input")
    (whole, image), (sharded, other) = (used(server, name) for name in LAUNCHERS)
    assert whole.factors.keys() == sharded.factors.keys()
    largest = max(float(value.abs().max()) for value in whole.factors.values())
    apart = max(float((v - sharded.factors[k]).abs().max()) for k, v in whole.factors.items())
    assert min(float(value.abs().max()) for value in whole.factors.values()) > 0
    assert apart <= 1e-5 * max(1.0, largest)
    assert g.levels(image, other) <= g.SAME
