"""The authors' score files out and in, trees of other programs, reports of hostile text."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from hywu_core.cli import main
from hywu_core.evaluation.benchmarks import BENCHMARKS, read_items
from hywu_core.evaluation.benchmarks.gedit import scoring as gedit


def evaluated(out: Path, benchmark: str) -> Path:
    """The samples' targets as results, judged and scored."""
    given = ["--benchmark", benchmark, "--data", "samples", "--out", str(out)]
    assert main(["eval", "generate", *given, "--method", "mine", "--editor", "copy"]) == 0
    for item in read_items(benchmark, BENCHMARKS[benchmark].sample).items:
        shutil.copy(item.target, BENCHMARKS[benchmark].result_path(out / "mine", item))
    assert main(["eval", "judge", str(out / "mine")]) == 0
    assert main(["eval", "score", str(out / "mine")]) == 0
    return next((out / "mine" / "scores").iterdir())


def cells(text: str, first: str) -> list[str]:
    """The cells after the name of the last row that begins with it."""
    row = [line for line in text.splitlines() if line.startswith(first + "  ")][-1]
    return row.removeprefix(first).split()


def test_gedit_scores_lie_in_the_authors_files_and_are_read_from_them(tmp_path, capsys):
    folder = evaluated(tmp_path, "gedit")
    files = {path.name for path in folder.glob("*_vie_score.csv")}
    assert files == {
        f"mine_{task}_{language}_vie_score.csv"
        for task in ("style_change", "tone_transfer")
        for language in ("all", "en")
    }
    with (folder / "mine_style_change_all_vie_score.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (float(row["sementics_score"]), float(row["quality_score"])) == (10, 10)
    assert row["edited_image"].endswith("fullset/style_change/en/sample_astronaut.png")
    ours = capsys.readouterr().out
    assert main(["eval", "score", str(folder)]) == 0
    theirs = capsys.readouterr().out
    assert "GEdit-Bench: mine (scores from" in theirs
    for name in ("style_change", "tone_transfer", "Average", "Average en"):
        assert cells(theirs, name) == cells(ours, name)
    # another program's: two methods in one folder, one of them by language only
    other = folder / "their_model_style_change_cn_vie_score.csv"
    gedit.write_csv(other, [gedit.Row("style_change", "s", "e", "x", 8, 2, True, "cn")])
    assert main(["eval", "score", str(folder)]) == 0
    assert cells(capsys.readouterr().out, "Average cn") == ["1", "8.000", "2.000", "4.000"]
    (folder / "their_model_levitate_cn_vie_score.csv").write_text("x")
    assert main(["eval", "score", str(folder)]) == 1
    assert "levitate_cn_vie_score.csv: its name holds none of" in capsys.readouterr().err


def test_imgedit_scores_lie_in_the_authors_files_and_are_read_from_them(tmp_path, capsys):
    folder = evaluated(tmp_path, "imgedit")
    answers, averages, types = (
        json.loads((folder / name).read_text())
        for name in ("result.json", "average_score.json", "typescore.json")
    )
    assert set(answers) == set(averages)
    assert all("Prompt Compliance: 5" in answer for answer in answers.values())
    assert set(averages.values()) == set(types.values()) == {5.0}
    ours = cells(capsys.readouterr().out, "Total")
    file = folder / "result.json"
    assert main(["eval", "score", str(file), "--benchmark", "imgedit", "--data", "samples"]) == 0
    assert cells(capsys.readouterr().out, "Total") == ours == ["2", "5.00"]
    assert main(["eval", "score", str(file)]) == 1
    assert "needs --data" in capsys.readouterr().err
    first = next(iter(answers))
    file.write_text(json.dumps({**answers, first: "A: 1\nB: 2\nC: 2"}))
    assert main(["eval", "score", str(file), "--data", str(BENCHMARKS["imgedit"].sample)]) == 0
    assert cells(capsys.readouterr().out, "Total") == ["2", "3.33"]  # (1.67 + 5) / 2, as rounded


@pytest.mark.parametrize("benchmark", ["gedit", "imgedit"])
def test_a_tree_of_another_program_is_judged_and_scored(tmp_path, benchmark, capsys):
    evaluated(tmp_path, benchmark)
    tree = tmp_path / "mine"
    for name in ("judgements", "scores"):
        shutil.rmtree(tree / name)
    (tree / "hywu_run.json").unlink()
    capsys.readouterr()
    assert main(["eval", "judge", str(tree)]) == 1
    assert "say --benchmark" in capsys.readouterr().err
    given = ["--benchmark", benchmark, "--data", "samples"]
    assert main(["eval", "judge", str(tree), *given]) == 0
    assert main(["eval", "score", str(tree), *given]) == 0
    assert "2 scored of 2 items" in capsys.readouterr().out


def test_an_instruction_is_text_in_both_reports(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(BENCHMARKS["folder"].sample, data)
    hostile = "<script>alert(1)</script> | `x` <img src=http://example.org onerror=alert(2)>"
    rows = [json.loads(line) for line in (data / "items.jsonl").read_text().splitlines()]
    (data / "items.jsonl").write_text(
        "\n".join(json.dumps({**row, "instruction": hostile}) for row in rows)
    )
    given = ["--benchmark", "folder", "--data", str(data), "--out", str(tmp_path)]
    assert main(["eval", "generate", *given, "--editor", "copy"]) == 0
    assert main(["eval", "judge", str(tmp_path / "copy")]) == 0
    page = tmp_path / "report.html"
    assert main(["eval", "report", str(tmp_path / "copy"), "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=http" not in text
    assert "&lt;script&gt;alert(1)" in text
    markdown = page.with_suffix(".md").read_text(encoding="utf-8")
    assert "\\<script>" in markdown
    assert " <img" not in markdown
