"""A short soak of one server, every image against a fresh one's; the long one is `python dev.py soak`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import soak

import dev


def test_a_short_soak(comfyui, weights, tmp_path):
    with dev.server_of(comfyui, tmp_path / "soaked") as server:
        made = soak.soak(server, prompts=32, interruptions=6, swaps=0.5, memory=600)
        assert made.run() == []
    counts = made.counts
    assert counts["finished"] == 22
    assert counts["hostile, refused"] == 4
    assert counts["generator swapped"] + counts["lora swapped"] >= 6
    assert sum(n for name, n in counts.items() if name.startswith("interrupted")) == 6
    assert counts["interrupted too late"] < 3
    with dev.server_of(comfyui, tmp_path / "fresh") as server:
        soak.put_files(server.base)
        assert made.compare(server) == []
        # what it is for: an image of the other version of a file is seen
        other = {"a": "b", "b": "a"}
        edit, _ = next(one for one in made.made if one[0].how != "plain")
        wrong = soak.Edit(edit.how, edit.text, other[edit.generator], other[edit.lora])
        image = soak.g.images(server, soak.g.run(server, wrong.graph(kept=True)))
        made.made = [(edit, image)]
        assert len(made.compare(server)) == 1


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("Traceback (most recent call last):\n  File x\nKeyError: 1\n", "traceback: KeyError"),
        ("--- Logging error ---\n", "the log couldn't be written"),
        ("Traceback (most recent call last):\n  File x\nhywu_core.errors.HYWUError: a\n", None),
        ("got prompt\n", None),
    ],
)
def test_what_a_soak_reads_in_the_log(tmp_path, log, said):
    file = tmp_path / "log"
    file.write_text("KeyError before the soak, Traceback (most recent call last):\n  a\nb\n")
    before = file.stat().st_size
    with open(file, "a") as end:
        end.write(log)
    made = SimpleNamespace(server=SimpleNamespace(log=file), log_begins=before, counts={})
    found = soak.Soak.unexpected(made)
    assert [text[: len(said)] for text in found] == [said] if said else found == []
