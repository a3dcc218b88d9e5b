"""Texts and files that mean harm, or were damaged: in reports, tables, manifests, judgements and data."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from hywu_core.cli import main
from hywu_core.errors import HYWUError
from hywu_core.evaluation.benchmarks import BENCHMARKS, read_items
from hywu_core.evaluation.benchmarks.gedit.unpack import packed_files, unpack
from hywu_core.evaluation.report.markdown import cell, safe
from hywu_core.evaluation.results import open_results
from hywu_core.evaluation.store import JudgementStore, list_stores
from hywu_core.files import folder_lock

MARKUP = (
    "<img src=x onerror=alert(1)>", "[click](javascript:alert(1))", "![x](http://example.org/x.png)",
    "**bold** _x_ ~~gone~~ `code`", "# heading", "> quote", "- list", "1. list", "| cell | cell |",
    "<http://example.org>", "&#60;script&#62;", "line\none\r\ntwo\u2028three", "\\<b>", "$x$", "a\tb",
    "=== \n---", "[x]: http://example.org", "+ plus", "2) two", "<!-- gone -->", "\x1b[31mred\x07",
)  # fmt: skip


@pytest.mark.parametrize("text", MARKUP)
def test_no_text_becomes_markup_in_markdown(text):
    markdown = pytest.importorskip(
        "markdown_it", reason="comes with ComfyUI-Manager's requirements"
    )
    parser = markdown.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for page in (
        f"- {safe(text)}\n",
        f"| a | b |\n| --- | --- |\n| {cell(text)} | x |\n",
        f"## {safe(text)}",
    ):
        kinds = {
            token.type
            for block in parser.parse(page)
            for token in (block, *(block.children or []))
            if not token.type.startswith(("table", "thead", "tbody", "tr", "th", "td"))
        }
        assert kinds <= {
            "bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close", "paragraph_open",
            "paragraph_close", "heading_open", "heading_close", "inline", "text", "text_special",
        }  # fmt: skip
        shown = "".join(
            token.content
            for block in parser.parse(page)
            for token in (block.children or [])
            if token.type.startswith("text")
        )
        wanted = " ".join(text.split()).replace("\x1b", "").replace("\x07", "")
        assert wanted in shown.replace("\ufffd", "")
    assert "http:" not in safe(text)  # nor a link that GitHub makes by itself


def evaluated(out: Path, method: str = "copy") -> Path:
    given = ["--benchmark", "folder", "--data", "samples", "--out", str(out), "--method", method]
    assert main(["eval", "generate", *given, "--editor", "copy"]) == 0
    assert main(["eval", "judge", str(out / method)]) == 0
    return out / method


def test_methods_and_items_are_text_in_the_markdown_report(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(BENCHMARKS["folder"].sample, data)
    rows = [json.loads(line) for line in (data / "items.jsonl").read_text().splitlines()]
    keys = ["[x](y) _a_", "`b` ~~c~~"]
    lines = [json.dumps({**row, "key": key}) for row, key in zip(rows, keys, strict=True)]
    (data / "items.jsonl").write_text("\n".join(lines))
    method = "_m_ [x](y): `z`"
    given = ["--benchmark", "folder", "--data", str(data), "--out", str(tmp_path)]
    assert main(["eval", "generate", *given, "--method", "plain", "--editor", "copy"]) == 0
    (tmp_path / "plain").rename(tmp_path / method)
    assert main(["eval", "judge", str(tmp_path / method)]) == 0
    assert main(["eval", "report", str(tmp_path / method), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.md").read_text(encoding="utf-8")
    for mark in ("[x]", "_m_", "`z`", "`b`", "~~c~~"):
        assert mark not in page.replace(f"\\{mark}", "")
    assert page.count("\\[x](y)") > 3


@pytest.mark.parametrize("start", ['=HYPERLINK("http://x")', "+1", "-1", "@x", "\t=1"])
def test_no_text_becomes_a_formula_in_the_items_table(tmp_path, start):
    data = tmp_path / "data"
    shutil.copytree(BENCHMARKS["folder"].sample, data)
    rows = [json.loads(line) for line in (data / "items.jsonl").read_text().splitlines()]
    (data / "items.jsonl").write_text(
        "\n".join(json.dumps({**r, "instruction": start}) for r in rows)
    )
    given = ["--benchmark", "folder", "--data", str(data), "--out", str(tmp_path)]
    assert main(["eval", "generate", *given, "--editor", "copy"]) == 0
    assert main(["eval", "judge", str(tmp_path / "copy")]) == 0
    assert main(["eval", "score", str(tmp_path / "copy")]) == 0
    with next((tmp_path / "copy" / "scores").rglob("items.csv")).open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["instruction"] == "'" + start


def test_no_control_sequence_of_a_reason_reaches_the_terminal(tmp_path, capsys):
    from hywu_core.cli.console import say

    say("a\x1b[2Jb\x07\x9bc\nd\te")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x07\\x9bc\nd\te\n"


# -- damaged files of a results folder -----------------------------------------------------------

MANIFESTS = {
    "a list": [], "a number for the benchmark": {"benchmark": 5}, "a list for the benchmark": {"benchmark": []},
    "a number for the data": {"data": 5}, "nothing for the data": {"data": None, "benchmark": "folder"},
    "no path for the data": {"data": "a\0b"}, "a list of selections": {"selection": [1]},
    "an unknown selection": {"selection": {"colour": "red"}}, "a text for the limit": {"selection": {"limit": "x"}},
    "a negative limit": {"selection": {"limit": -1}}, "a number for the tasks": {"selection": {"tasks": 5}},
    "numbers among the tasks": {"selection": {"tasks": [5]}}, "another list of items": {"items": 5},
    "half an emoji": {"selection": {"tasks": ["\ud83d"]}},
}  # fmt: skip


@pytest.mark.parametrize("damage", MANIFESTS)
@pytest.mark.parametrize("step", ["judge", "score", "report", "generate"])
def test_a_damaged_manifest_is_one_sentence(tmp_path, capsys, damage, step):
    root = evaluated(tmp_path)
    path = root / "hywu_run.json"
    value = MANIFESTS[damage]
    if isinstance(value, dict):
        value = {**json.loads(path.read_text()), **value}
    path.write_text(json.dumps(value))
    before = path.read_bytes()
    capsys.readouterr()
    arguments = {
        "judge": ["judge", str(root)],
        "score": ["score", str(root)],
        "report": ["report", str(root), "--out", str(tmp_path / "r.html")],
        "generate": ["generate", "--benchmark", "folder", "--data", "samples", "--out", str(tmp_path),
                     "--editor", "copy"],
    }[step]  # fmt: skip
    code = main(["eval", *arguments])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if step == "generate" and code == 0:
        return  # it compares what it wants and writes a whole manifest anew
    assert code == 1
    assert "copy" in said
    assert path.read_bytes() == before


JUDGEMENTS = (
    b"[]", b"{}", b'{"item": 1}', b"[" * 5000, b'{"item": ' + b"9" * 5000 + b"}", b"\xff", b"null",
)  # fmt: skip
FIELDS = {
    "status": [5, "unexpected", None], "text": [None, 5], "model": [5, None], "tokens_in": ["x", -1, 1.5, None, True],
    "attempts": ["x"], "item": [5, []], "question": [None, {}], "pictures": [5], "prompt": [[]],
}  # fmt: skip


def stored(root: Path) -> Path:
    (path,) = (root / "judgements").glob("*.jsonl")
    return path


@pytest.mark.parametrize("step", ["judge", "score"])
def test_a_damaged_judgement_is_named_by_its_line(tmp_path, capsys, step):
    root = evaluated(tmp_path)
    path = stored(root)
    head, first, second = path.read_bytes().splitlines(keepends=True)
    lines = [line + b"\n" for line in JUDGEMENTS]
    for name, values in FIELDS.items():
        lines += [
            json.dumps({**json.loads(first), name: value}).encode() + b"\n" for value in values
        ]
    for line in lines:
        path.write_bytes(head + line + second)
        capsys.readouterr()
        assert main(["eval", step, str(root)]) == 1, line[:80]
        said = capsys.readouterr().err
        assert "line 2" in said, (line[:80], said)
        assert "Traceback" not in said


@pytest.mark.parametrize(
    "head", [b"{}", b"[]", b"null", b"\xff", b'{"format": "hywu-judgements-1"}']
)
def test_a_damaged_head_of_judgements_is_one_sentence(tmp_path, capsys, head):
    root = evaluated(tmp_path)
    path = stored(root)
    path.write_bytes(head + b"\n" + path.read_bytes().partition(b"\n")[2])
    assert main(["eval", "score", str(root)]) == 1
    assert path.name in capsys.readouterr().err
    rows = [{"judge": 5}, {"judge_version": None}, {"questionnaire": []}]
    whole = {"format": "hywu-judgements-1", "judge": "a", "judge_version": "b", "questionnaire": "wu-eval",
             "questionnaire_version": "c"}  # fmt: skip
    for row in rows:
        path.write_text(json.dumps({**whole, **row}) + "\n")
        with pytest.raises(HYWUError, match=r"not a file of judgements"):
            list_stores(root / "judgements")


def test_a_store_that_is_a_folder_or_empty_is_one_sentence(tmp_path, capsys):
    root = evaluated(tmp_path)
    path = stored(root)
    path.write_bytes(b"")
    assert main(["eval", "score", str(root)]) == 1
    path.unlink()
    path.mkdir()
    assert main(["eval", "score", str(root)]) == 1
    assert "Traceback" not in capsys.readouterr().err


CSV_HEAD = "source_image,edited_image,instruction,sementics_score,quality_score,intersection_exist,instruction_language\n"
CSVS = {
    "infinite": "a,b,c,inf,3,True,en\n", "no number": "a,b,c,nan,3,True,en\n", "negative": "a,b,c,-1,3,True,en\n",
    "half a row": "a,b,c\n", "a NUL": "a,b,c,1\0,3,True,en\n", "huge": f"a,b,{'x' * 200_000},1,high,True,en\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", [*CSVS, "not UTF-8"])
def test_a_foreign_table_that_is_damaged_is_named(tmp_path, capsys, kind):
    path = tmp_path / "m_ps_human_all_vie_score.csv"
    data = b"\xff\xfe" if kind == "not UTF-8" else (CSV_HEAD + CSVS[kind]).encode()
    path.write_bytes(data)
    assert main(["eval", "score", str(tmp_path)]) == 1
    assert path.name in capsys.readouterr().err


# -- resuming ------------------------------------------------------------------------------------


def own_data(folder: Path) -> Path:
    shutil.copytree(BENCHMARKS["folder"].sample, folder)
    return folder


def test_results_of_other_sources_are_not_mixed_in(tmp_path, capsys):
    data = own_data(tmp_path / "data")
    given = ["eval", "generate", "--benchmark", "folder", "--data", str(data), "--out", str(tmp_path), "--editor",
             "copy"]  # fmt: skip
    assert main(given) == 0
    (tmp_path / "copy" / "rocket.png").unlink()
    assert main(given) == 0
    with Image.open(data / "sources" / "rocket.jpg") as image:
        changed = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    changed.save(data / "sources" / "rocket.jpg")
    (tmp_path / "copy" / "rocket.png").unlink()
    capsys.readouterr()
    assert main(given) == 1
    said = capsys.readouterr().err
    assert "other source images" in said
    assert not (tmp_path / "copy" / "rocket.png").exists()


def test_a_folder_of_the_former_version_learns_its_sources(tmp_path):
    data = own_data(tmp_path / "data")
    given = ["eval", "generate", "--benchmark", "folder", "--data", str(data), "--out", str(tmp_path), "--editor",
             "copy"]  # fmt: skip
    assert main(given) == 0
    path = tmp_path / "copy" / "hywu_run.json"
    manifest = json.loads(path.read_text())
    sources = manifest.pop("sources")
    path.write_text(json.dumps(manifest))
    assert main(given) == 0
    assert json.loads(path.read_text())["sources"] == sources


def test_scores_of_one_folder_are_written_by_one_run_at_a_time(tmp_path, capsys):
    root = evaluated(tmp_path)
    assert main(["eval", "score", str(root)]) == 0
    (folder,) = (root / "scores").iterdir()
    with folder_lock(folder):
        assert main(["eval", "score", str(root)]) == 1
    assert "another run" in capsys.readouterr().err


# -- packed data ---------------------------------------------------------------------------------


def packed(folder: Path, rows: list[dict]) -> Path:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        pa.Table.from_pylist(rows), folder / "train.parquet", compression="zstd"
    )
    return folder


def row(**fields) -> dict:
    png = BENCHMARKS["folder"].sample / "sources" / "rocket.jpg"
    image = {"bytes": png.read_bytes(), "path": None}
    return {"task_type": "ps_human", "key": "k", "instruction": "x", "instruction_language": "en",
            "input_image": image, "input_image_raw": image, "Intersection_exist": True, **fields}  # fmt: skip


def test_names_too_long_for_a_file_lose_one_row_not_all(tmp_path):
    folder = packed(
        tmp_path / "hub",
        [row(key="改" * 80, task_type="改" * 80), row(), row(key="a\0b"), row(key=" ")],
    )
    items = read_items("gedit", folder, tmp_path)
    assert [item.key for item in items.items] == ["k"]
    assert len(items.bad) == 3


def test_data_that_changed_is_unpacked_anew(tmp_path):
    folder = packed(tmp_path / "hub", [row(instruction="one")])
    assert read_items("gedit", folder, tmp_path).items[0].instruction == "one"
    size = (folder / "train.parquet").stat().st_size
    packed(folder, [row(instruction="two")])
    assert (folder / "train.parquet").stat().st_size == size
    assert read_items("gedit", folder, tmp_path).items[0].instruction == "two"


def test_a_parquet_file_that_unpacks_beyond_measure_is_refused(tmp_path):
    folder = packed(
        tmp_path / "hub", [row(instruction=f"{n}" + "x" * 20_000_000) for n in range(10)]
    )
    assert (folder / "train.parquet").stat().st_size < 2_000_000
    with pytest.raises(HYWUError, match=r"train.parquet: .* unpacked"):
        unpack(packed_files(folder), tmp_path / "out")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"\xff" * 5000])
def test_a_parquet_file_that_is_none_is_named(tmp_path, data):
    pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    (tmp_path / "train.parquet").write_bytes(data)
    with pytest.raises(HYWUError, match=r"train.parquet: not a whole parquet"):
        unpack([tmp_path / "train.parquet"], tmp_path / "out")


def test_an_open_store_is_still_read(tmp_path):
    root = evaluated(tmp_path)
    results, items = open_results(root)
    (name,) = list_stores(results.root / "judgements")
    with JudgementStore(results.root / "judgements", name) as store:
        assert len(store) == len(items.items)
