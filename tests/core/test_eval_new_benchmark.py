"""A new benchmark is one file and one line in the registry: here is the file, the fixture is the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from hywu_core.cli import main
from hywu_core.evaluation.benchmarks import BENCHMARKS, QUESTIONNAIRES
from hywu_core.evaluation.benchmarks.base import Benchmark, Question, Questionnaire
from hywu_core.evaluation.items import Item, ItemList, check_image, check_instruction, collect
from hywu_core.evaluation.tables import Table
from hywu_core.files import check_name, read_json

# -- the file ------------------------------------------------------------------------------------


class StarsQuestions(Questionnaire):
    """One to three stars."""

    name = "stars"
    heading = "Stars-Bench"
    keys = instructed = ("stars",)
    dimensions = ("overall",)
    scale = (0, 3)
    published = Table("Published: Stars-Bench", ("claim", "figure"), (("stars", "2"),), "Theirs.")

    @classmethod
    def own_prompts(cls) -> dict[str, str]:
        return {"stars": "How many stars for: <instruction>?"}

    def questions(self, item: Item) -> list[Question]:
        prompt = self.prompt("stars", item)
        return [Question("stars", prompt, ("source", "edited"), answer_of)]

    def parse(self, answers: Mapping[str, str]) -> dict[str, float] | None:
        stars = answers["stars"].count("*")
        return {"overall": float(stars)} if answers["stars"] == "*" * stars else None

    def table(self, scores) -> Table:
        rows = [(s.item.id, str(int(s.values["overall"]))) for s in scores.scored()]
        return Table(f"{self.heading}: {scores.method}", ("item", "stars"), tuple(rows))

    def write_files(self, folder: Path, scores) -> None:
        with (folder / "stars.csv").open("w", newline="") as file:
            csv.writer(file).writerows([s.item.key, s.answers["stars"]] for s in scores.answered())


def answer_of(shares: Mapping[str, float], reason: str) -> str:
    return "*" * round(3 * min(shares.values()))


class Stars(Benchmark):
    """``stars.json``: instruction -> image; results ``<task>/<key>.png``, shown to editors upside down."""

    name = usual = "stars"
    sample = BENCHMARKS["folder"].sample

    def read(self, path: Path, beside: Path | None = None) -> ItemList:
        rows = [
            (f"row {k!r}", {"key": k, "source": v})
            for k, v in read_json(path / "stars.json").items()
        ]
        return collect(self.name, rows, lambda row: _item(row, path))

    def result_path(self, root: Path, item: Item) -> Path:
        return root / item.task / f"{item.key}.png"

    def editor_source(self, source: Image.Image) -> Image.Image:
        return source.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


def _item(row: Mapping, root: Path) -> Item:
    source = check_image(row["source"], root, "source")
    key = check_name(row["key"], "key")
    return Item(key, "edit", check_instruction(row["key"]), source, target=source)


# -- the line ------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(BENCHMARKS, Stars.name, Stars())
    monkeypatch.setitem(QUESTIONNAIRES, StarsQuestions.name, StarsQuestions)


def test_from_items_to_report(registered, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        Image.linear_gradient("L").convert("RGB").save(data / f"{name}.png")
    (data / "stars.json").write_text(
        json.dumps({"do a": "a.png", "do b": "b.png", "c": "gone.png"})
    )
    given = ["--benchmark", "stars", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(["eval", "generate", *given, "--editor", "copy"]) == 0
    root = tmp_path / "out" / "copy"
    with Image.open(root / "edit" / "do a.png") as made, Image.open(data / "a.png") as source:
        assert made.getpixel((0, 0)) == source.getpixel((0, 255))
    # one result is the target itself
    (root / "edit" / "do b.png").write_bytes((data / "b.png").read_bytes())
    assert main(["eval", "judge", str(root)]) == 0
    assert main(["eval", "score", str(root)]) == 0
    said = capsys.readouterr().out
    assert "not usable: row 'c': its source 'gone.png' does not exist" in said
    assert "Stars-Bench: copy: 2 scored of 2 items" in said
    assert ["edit/en/do b", "3"] in [line.rsplit(maxsplit=1) for line in said.splitlines()]
    (file,) = (root / "scores").rglob("stars.csv")
    assert file.read_text() == "do a,\ndo b,***\n"
    assert main(["eval", "report", str(root), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h1>Stars-Bench: copy</h1>" in page
    assert "Published: Stars-Bench" in page
