"""`hywu eval gsb`: a session of two methods' results, served until Ctrl-C, reported and exported."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import urllib.request

import numpy as np
import pytest
from PIL import Image

from hywu_core.cli import main
from hywu_core.evaluation.gsb import command, session
from hywu_core.evaluation.gsb.store import Store

pytest.importorskip("aiohttp", reason="the voting server needs the `eval` extra")


@pytest.fixture
def results(tmp_path):
    """Folders of two methods on three items; the second lacks one of them."""
    data = tmp_path / "data"
    data.mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(3):
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{number}.png")
        rows.append({"source": f"{number}.png", "instruction": f"Make it {number}", "task": "t"})
    (data / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--benchmark", "folder", "--data", str(data), "--out", str(tmp_path / "out")]
    for method in ("ours", "theirs"):
        assert main(["eval", "generate", *given, "--editor", "copy", "--method", method]) == 0
    next((tmp_path / "out" / "theirs").rglob("*.png")).unlink()
    return tmp_path / "out" / "ours", tmp_path / "out" / "theirs"


def gsb(*arguments: object) -> int:
    return main(["eval", "gsb", *map(str, arguments)])


@pytest.fixture
def votes(results, tmp_path, capsys):
    """A session in which one voter prefers the first method twice, a second one sees no difference."""
    folder = tmp_path / "votes"
    assert gsb("create", *results, "--out", folder, "--seed", 3) == 0
    assert "2 pairs, ours against theirs" in (said := capsys.readouterr().out)
    assert "1 items were left out" in said
    store = Store(folder)
    for pair, a_left in session.assignment(store, "=SUM(A1)"):
        session.vote(store, "=SUM(A1)", pair.pair, "left" if a_left else "right")
    for pair, _ in session.assignment(store, "Bo"):
        session.vote(store, "Bo", pair.pair, "same")
    store.close()
    return folder


def test_a_report_counts_from_the_first_method(votes, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert gsb("report", votes, "--out", out) == 0
    facts = json.loads(out.read_text(encoding="utf-8"))
    assert (facts["good"], facts["same"], facts["bad"]) == (2, 2, 0)
    assert facts["win_rate"] == pytest.approx(0.75)
    assert (facts["voters"], facts["pairs"]) == (2, 2)
    printed = capsys.readouterr().out
    assert "Human preference (GSB): ours against theirs" in printed
    assert "75.0 %" in printed


def test_an_export_holds_every_vote_and_no_formula(votes, tmp_path, capsys):
    assert gsb("export", votes, "--out", tmp_path / "v.csv") == 0
    with (tmp_path / "v.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["voter"] for row in rows] == ["'=SUM(A1)"] * 2 + ["Bo"] * 2
    assert [row["verdict"] for row in rows] == ["good", "good", "same", "same"]
    assert {row["method_b"] for row in rows} == {"theirs"}
    assert gsb("export", votes, "--out", tmp_path / "v.json") == 0
    exact = json.loads((tmp_path / "v.json").read_text(encoding="utf-8"))
    assert [row["voter"] for row in exact] == ["=SUM(A1)"] * 2 + ["Bo"] * 2
    assert [str(row["time"]) for row in exact] == [row["time"] for row in rows]
    assert "4 votes" in capsys.readouterr().out


def test_what_cannot_be_is_one_sentence(results, votes, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in votes.rglob("*")}
    for arguments, words in (
        (("create", *results, "--out", votes), "votes in it are kept"),
        (("create", *results, "--out", tmp_path / "x", "--pairs-per-voter", -1), "0 or more"),
        (("create", results[0], tmp_path / "no", "--out", tmp_path / "x"), "no such folder"),
        (("export", votes, "--out", tmp_path / "votes.xlsx"), "name a .csv or a .json file"),
        (("report", results[0]), "no voting session"),
        (("serve", tmp_path), "no voting session"),
    ):
        assert gsb(*arguments) == 1
        error = capsys.readouterr().err
        assert words in error.replace("\r", "\n").splitlines()[-1]
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "votes.xlsx").exists()
    assert {p: p.stat().st_mtime_ns for p in votes.rglob("*")} == before


@pytest.mark.skipif(os.name == "nt", reason="a process can't send itself Ctrl-C alone on Windows")
def test_serve_prints_the_link_and_ctrl_c_ends_it(votes, monkeypatch, capsys):
    said, seen = [], []
    printed = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        printed.set()

    def visit_then_press_ctrl_c() -> None:
        assert printed.wait(60)
        page = said[0].removeprefix("Voting page: ").partition("#")[0]
        try:
            with urllib.request.urlopen(page, timeout=30) as answer:
                seen.append(answer.read().decode())
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(command, "say", say)
    visitor = threading.Thread(target=visit_then_press_ctrl_c)
    visitor.start()
    assert gsb("serve", votes, "--port", 0) == 130
    visitor.join()
    assert "interrupted" in capsys.readouterr().err
    assert "<html" in seen[0]
    store = Store(votes)
    assert len(store.votes()) == 4
    assert said[0].endswith(f"#session:{store.about['token']}")
    store.close()
