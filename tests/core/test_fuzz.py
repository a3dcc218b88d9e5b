"""Damaged files of every kind that users bring: read, or refused in one sentence, soon and in little memory.

Some hundred mutations of each kind; the longer run is `python dev.py fuzz --count 10000`.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="limits time and memory by signals"),
    pytest.mark.filterwarnings("ignore"),
]

if os.name == "posix":
    import fuzz
    from fuzz_kinds import KINDS

COUNT = 180


@pytest.mark.parametrize("name", [row[0] for row in KINDS] if os.name == "posix" else [])
def test_damaged_files_are_read_or_refused(name):
    (kind,) = [kind for kind in fuzz.kinds() if kind.name == name]
    # megabytes, so that each mutation takes a tenth of a second
    large = name == "editor" or "folder" in name or "quantized" in name or "tuned" in name
    assert fuzz.run(kind, COUNT // 6 if large else COUNT) == []


def test_what_the_fuzzer_finds(monkeypatch):
    """A reader that fails in each way is caught."""

    def reader(how):
        def read(path):
            if path.read_bytes() == b'{"a": 1}':
                return
            how()

        return read

    def raises(error):
        def how():
            raise error

        return how

    def hangs():
        while True:
            pass

    ways = {
        "KeyError": raises(KeyError("a")),
        "more than one line": raises(fuzz.HYWUError("a\nb")),
        "hang": hangs,
    }
    for word, how in ways.items():
        monkeypatch.setattr(fuzz, "SECONDS", 0.2 if word == "hang" else 60.0)
        found = fuzz.run(fuzz.Kind("toy", _write_toy, reader(how)), 4)
        assert found, word
        assert [text for text in found if word not in text] == []


def test_a_reader_that_takes_much_memory_is_caught():
    """In a process of its own: one that ran other tests has had a larger peak, which not all systems reset."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(fuzz.__file__).parent)!r})
import fuzz
def make(folder):
    (folder / "toy.json").write_text('{{"a": 1}}')
    return folder / "toy.json"
def read(path):
    if path.read_bytes() != b'{{"a": 1}}':
        b"x" * (fuzz.MEMORY * 2)
found = fuzz.run(fuzz.Kind("toy", make, read), 4)
assert found and all("memory" in text for text in found), found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def _write_toy(folder):
    (folder / "toy.json").write_text('{"a": 1}')
    return folder / "toy.json"


def test_mutations_are_a_function_of_the_seed():
    one, two, other = (
        [fuzz.mutate_bytes(b"x" * 99, random.Random(seed)) for _ in range(3)] for seed in (1, 1, 2)
    )
    assert one == two
    assert one != other
