"""A full disk and folders that can't be written, on a live server: one sentence that names the file, nothing
half-written, earlier files as they were, and the next prompt works.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import edit_graph as g
import pytest
from PIL import Image

import dev
from hywu_core.files import read_json, read_tensors
from hywu_core.headless.client import NodeFailed
from hywu_core.headless.local import LocalServer

resource = pytest.importorskip("resource", reason="limits a process's files, which Windows can't")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")

#: Beyond what the server's own log and database need, below what each node saves in one file.
LIMIT = 100_000
#: Images of a batch, so that what is saved of it is larger.
IMAGES = 128
CAPABILITIES = "-dac_override,-dac_read_search"


@pytest.fixture(scope="module")
def server(comfyui, weights, tmp_path_factory) -> Iterator[LocalServer]:
    """One to which a folder's permissions mean something, also where the tests run as root."""
    base, python = tmp_path_factory.mktemp("full"), Path(comfyui.python)
    if os.geteuid() == 0:
        python = base / "python"
        command = f"exec {shutil.which('setpriv')} --bounding-set={CAPABILITIES} '{comfyui.python}' \"$@\""
        python.write_text(f"#!/bin/sh\n{command}\n")
        python.chmod(0o755)
    with dev.server_of(dev.Host(comfyui.tree, python, comfyui.origin), base) as running:
        g.put_photo(running.base / "input")
        yield running


@contextmanager
def full(server: LocalServer, folder: Path) -> Iterator[None]:
    """No file of the server gets longer than the limit, as where a disk is full."""
    process = server.process.pid
    former = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (LIMIT, former[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, former)


@contextmanager
def read_only(server: LocalServer, folder: Path) -> Iterator[None]:
    """Nothing can be made in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


def files_in(server: LocalServer) -> dict[str, str]:
    """Name of every file that is kept, below the base folder -> its hash."""
    folders = (server.base / "output", server.base / "models")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {
        str(p.relative_to(server.base)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def check_whole(path: Path) -> None:
    """A file that looks whole is."""
    assert ".part" not in str(path), path
    if path.suffix == ".safetensors":
        assert read_tensors(path)[0], path
    elif path.suffix == ".json":
        read_json(path)
    elif path.suffix == ".png":
        Image.open(path).load()


def batch(**end: dict) -> dict[str, dict]:
    """A LoRA for each image of a batch."""
    graph = g.edit_graph(image=["many", 0])
    graph["many"] = g.node("RepeatImageBatch", image=["photo", 0], amount=IMAGES)
    kept = ("generator", "photo", "many", "encode", "generate")
    return {name: graph[name] for name in kept} | end


def lora(format: str, folder: str = "loras") -> dict[str, dict]:
    prefix = f"{folder}/{format}/x"
    return batch(
        end=g.node("HYWUSaveLoRA", lora=["generate", 0], filename_prefix=prefix, format=format)
    )


def condition() -> dict[str, dict]:
    return batch(
        end=g.node("HYWUSaveCondition", condition=["encode", 0], filename_prefix="conditions/x")
    )


def judge() -> dict[str, dict]:
    return {
        "items": g.node("HYWUBenchmarkItems", benchmark="folder", path="samples", index=0, count=1),
        "end": g.node(
            "HYWUJudge", image=["items", 0], item=["items", 2], method="source", judge="reference",
            questionnaire="auto", folder="eval",
        ),
        "table": g.node("HYWUScoreTable", scores=["end", 0]),
    }  # fmt: skip


def training(name: str = "kept", steps: int = 2) -> dict[str, dict]:
    return {
        "editor": g.node("HYWULoadBundledEditor"),
        "end": g.node(
            "HYWUTrainGenerator", model=["editor", 0], vae=["editor", 2], clip=["editor", 1], name=name,
            pairs="samples", generator_size="XS", rank=2, steps=steps, batch_size=2, accumulation=1,
            learning_rate=1e-3, image_size=64, crops=1, source_input="both", precision="auto",
            checkpointing=False, sample_every=0, sample_steps=1, seed=0, include="", exclude="",
        ),
    }  # fmt: skip


#: (way, graph, the folder below the base, what the sentence names)
CASES: dict[str, tuple[Callable, Callable[[], dict], str, str]] = {
    "full, LoRA": (full, lambda: lora("native"), "output", r"native/x_0000\d_.safetensors"),
    "full, condition": (full, condition, "output", r"conditions/x_0000\d_.safetensors"),
    "full, training": (full, training, "output", r"hywu_training/kept/\S+"),
    "read-only, LoRA": (read_only, lambda: lora("ComfyUI"), "output/loras/ComfyUI", "loras/ComfyUI"),
    "read-only, PEFT": (read_only, lambda: lora("PEFT"), "output/loras/PEFT", "loras/PEFT"),
    "read-only output": (read_only, lambda: lora("native", "new"), "output", "output/new/native/x"),
    "read-only, condition": (read_only, condition, "output/conditions", "output/conditions"),
    "read-only, run": (read_only, lambda: training(steps=3), "output/hywu_training/kept", "hywu_training/kept"),
    "read-only, results": (read_only, judge, "output/eval/source", "eval/source"),
    "read-only, generators": (read_only, lambda: training(steps=4), "models/hywu", "models/hywu"),
    "read-only, temp": (
        read_only, lambda: batch(end=g.node("HYWUInspectLoRA", lora=["generate", 0])), "temp", "temp"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_written_is_named_and_the_next_run_works(server, case):
    way, graph, where, named = CASES[case]
    before = files_in(server)
    with way(server, server.base / where), pytest.raises(NodeFailed) as caught:
        g.run(server, graph())
    said = str(caught.value)
    assert re.search(f"{named}\\S*: .*can't be written", said), said
    assert "Traceback" not in said
    after = files_in(server)
    # a training whose generator can't be exported went on with its own state before
    own = "output/hywu_training" if where == "models/hywu" else "log.csv"
    assert [n for n, h in before.items() if own not in n and after.get(n) != h] == []
    for name in after:
        check_whole(server.base / name)
    g.run(server, graph())
    assert not list(server.base.rglob("*.hywu.part"))


def test_a_generator_that_does_not_fit_leaves_the_one_before(server):
    """The steps are done and their state is kept: only the checkpoint is written anew."""
    g.run(server, training("done"))
    checkpoint = server.base / "models" / "hywu" / "done.safetensors"
    g.run(server, training("other"))  # so that ComfyUI's cache knows nothing of the first
    for there in (True, False):
        before = files_in(server)
        with full(server, checkpoint.parent), pytest.raises(NodeFailed) as caught:
            g.run(server, training("done"))
        said = str(caught.value)
        assert re.search(r"models/hywu/done\.safetensors: can't be written", said), said
        assert files_in(server) == before
        if there:
            checkpoint.unlink()
    g.run(server, training("done"))
    check_whole(checkpoint)
    assert not list(server.base.rglob("*.hywu.part"))
