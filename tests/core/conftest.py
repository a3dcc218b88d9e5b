"""Fixtures that several files share."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator

import judge_stub
import numpy as np
import pytest
from PIL import Image

from hywu_core.bases.bundled.checkpoint import VARIABLE


@pytest.fixture(scope="module", autouse=True)
def bundled_weights():
    """The real ones, also where host tests in this process work with others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        yield


@pytest.fixture
def judge_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", judge_stub.KEY)


@pytest.fixture
def stub():
    """behave -> a judge's endpoint on loopback, stopped after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda behave: stack.enter_context(judge_stub.Stub(behave))


@pytest.fixture
def write_pairs():
    """(folder, count, size) -> a file of a user's pairs; each target is the source's negative."""

    def write(folder, count: int, size=(80, 60)):
        rows = []
        for i in range(count):
            shape = (size[1], size[0], 3)
            pixels = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            Image.fromarray(255 - pixels).save(folder / f"{i}_target.png")
            row = {"source": f"{i}.png", "target": f"{i}_target.png", "instruction": f"negate {i}"}
            rows.append(row)
        path = folder / "pairs.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> Iterator[None]:
    """SIGINT as in a terminal: a shell that starts tests in the background has it ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)
