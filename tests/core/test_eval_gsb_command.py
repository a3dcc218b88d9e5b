"""`hywu eval gsb`: from two methods' results to votes, the report beside the paper's, the export."""

from __future__ import annotations

import csv
import json

import pytest

from hywu_core.cli import main
from hywu_core.evaluation.gsb.session import assignment, vote
from hywu_core.evaluation.gsb.store import Store


@pytest.fixture
def results(tmp_path):
    """Two methods' results on the samples."""
    for method in ("mine", "other"):
        given = ["--benchmark", "folder", "--data", "samples", "--out", str(tmp_path)]
        assert main(["eval", "generate", *given, "--method", method, "--editor", "copy"]) == 0
    return tmp_path / "mine", tmp_path / "other"


def test_from_results_to_votes_to_the_table_beside_the_papers(results, tmp_path, capsys):
    folder = tmp_path / "votes"
    assert main(["eval", "gsb", "create", *map(str, results), "--out", str(folder)]) == 0
    assert "2 pairs, mine against other" in capsys.readouterr().out
    store = Store(folder)
    for voter, wanted in (("=Ada", ("a", "a")), ("Bo", ("a", "same"))):
        pairs = sorted(assignment(store, voter), key=lambda pair: pair[0].item)
        for (pair, a_left), choice in zip(pairs, wanted, strict=True):
            side = "left" if a_left else "right"
            vote(store, voter, pair.pair, side if choice == "a" else choice)
    store.close()

    out = tmp_path / "report.json"
    assert main(["eval", "gsb", "report", str(folder), "--out", str(out)]) == 0
    said, data = capsys.readouterr().out, json.loads(out.read_text())
    assert (data["good"], data["same"], data["bad"]) == (3, 1, 0)
    assert data["win_rate"] == 3.5 / 4
    # By hand: centre (0.875 + 3.8415 / 8) / 1.96037 = 0.6913, half-width 0.2955
    assert data["wilson_95"] == pytest.approx([0.3958, 0.9868], abs=1e-4)
    assert data["agreement_percent"] == 50
    assert "win rate of mine" in said
    assert "Published: human preference (GSB), win rate of HY-WU" in said
    assert "Nano Banana Pro" in said
    assert "46.2 %" in said

    for kind in ("csv", "json"):
        assert (
            main(["eval", "gsb", "export", str(folder), "--out", str(tmp_path / f"v.{kind}")]) == 0
        )
    rows = json.loads((tmp_path / "v.json").read_text())
    assert sorted((row["voter"], row["verdict"]) for row in rows) == [
        ("=Ada", "good"), ("=Ada", "good"), ("Bo", "good"), ("Bo", "same"),
    ]  # fmt: skip
    assert {(row["method_a"], row["method_b"]) for row in rows} == {("mine", "other")}
    with (tmp_path / "v.csv").open(newline="", encoding="utf-8") as file:
        assert {row["voter"] for row in csv.DictReader(file)} == {"'=Ada", "Bo"}
    assert main(["eval", "gsb", "export", str(folder), "--out", str(tmp_path / "v.xls")]) == 1
    assert "name a .csv or a .json file" in capsys.readouterr().err


def test_the_link_to_a_session_inside_comfyui(results, tmp_path, capsys):
    folder = tmp_path / "user" / "hywu" / "gsb" / "mine: other"
    for out in (folder, tmp_path / "votes"):
        assert main(["eval", "gsb", "create", *map(str, results), "--out", str(out)]) == 0
    store = Store(folder)
    token = store.about["token"]
    store.close()
    capsys.readouterr()
    assert main(["eval", "gsb", "link", str(folder), "--server", "https://edit.example/"]) == 0
    said = capsys.readouterr().out.strip()
    assert said == f"https://edit.example/hywu/gsb/#mine%3A%20other:{token}"
    assert main(["eval", "gsb", "link", str(folder), "--server", "edit.example"]) == 1
    assert "must begin with http" in capsys.readouterr().err
    assert main(["eval", "gsb", "link", str(tmp_path / "votes")]) == 1
    assert "hywu/gsb of its user folder" in capsys.readouterr().err


def test_items_without_both_results_are_left_out_and_counted(results, tmp_path, capsys):
    (results[1] / "rocket.png").unlink()
    folder = tmp_path / "votes"
    create = ["eval", "gsb", "create", *map(str, results), "--out", str(folder)]
    assert main(create) == 0
    said = capsys.readouterr().out
    assert "1 pairs" in said
    assert "1 items were left out" in said
    assert main(create) == 1
    assert "exists already, and votes in it are kept" in capsys.readouterr().err
    (results[1] / "astronaut.png").unlink()
    assert main([*create[:-1], str(tmp_path / "none")]) == 1
    assert "nothing can be compared" in capsys.readouterr().err


def test_a_session_without_votes_has_no_win_rate(results, tmp_path, capsys):
    folder = tmp_path / "votes"
    assert main(["eval", "gsb", "create", *map(str, results), "--out", str(folder)]) == 0
    assert main(["eval", "gsb", "report", str(folder)]) == 0
    assert "no votes" in capsys.readouterr().out
