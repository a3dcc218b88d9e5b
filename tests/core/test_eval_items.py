"""Readers of benchmark data: layouts as published, and every bad row named."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hywu_core.errors import HYWUError
from hywu_core.evaluation.benchmarks import BENCHMARKS, QUESTIONNAIRES, read_items
from hywu_core.evaluation.benchmarks.gedit.unpack import packed_files
from hywu_core.evaluation.editors import EDITORS
from hywu_core.evaluation.judges import JUDGES
from hywu_core.evaluation.results import Results


@pytest.mark.parametrize(
    ("benchmark", "paths"),
    [
        (
            "gedit",
            [
                "fullset/style_change/en/sample_astronaut.png",
                "fullset/tone_transfer/en/sample_rocket.png",
            ],
        ),
        ("imgedit", ["1.png", "2.png"]),
        ("folder", ["astronaut.png", "rocket.png"]),
    ],
)
def test_samples_in_each_layout(benchmark, paths):
    items = read_items(benchmark, BENCHMARKS[benchmark].sample)
    assert not items.bad
    assert all(item.target is not None and item.source.is_file() for item in items.items)
    results = Results(Path("out/method"), BENCHMARKS[benchmark])
    assert [results.image(i).relative_to(results.root).as_posix() for i in items.items] == paths


def image(path: Path, colour=(200, 30, 30), size=(8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_every_bad_row_of_a_folder_is_named(tmp_path: Path):
    image(tmp_path / "a.png")
    image(tmp_path.parent / "outside.png")
    good = {"source": "a.png", "instruction": "blur \u2028 it"}
    rows = [
        json.dumps(good, ensure_ascii=False),
        json.dumps({**good, "source": "none.png"}),
        json.dumps({**good, "source": "../outside.png"}),
        json.dumps({**good, "instruction": "  "}),
        "{broken",
        json.dumps({**good, "key": "../../x"}),
        json.dumps({**good, "key": "00000"}),
        json.dumps({**good, "task": "a/b"}),
        json.dumps({**good, "target": "gone.png"}),
        json.dumps([1]),
        json.dumps({**good, "source": None}),
        json.dumps({**good, "instruction": "add \ud83d"}),
        json.dumps({**good, "key": "\ud83d"}),
        json.dumps({**good, "source": "a\0b"}),
        json.dumps("blur\nit"),
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(rows), encoding="utf-8")
    items = read_items("folder", tmp_path)
    assert [item.instruction for item in items.items] == ["blur \u2028 it"]
    told = [str(bad) for bad in items.bad]
    expected = [
        "line 2: its source 'none.png' does not exist",
        "line 3: its source '../outside.png' lies outside",
        "line 4: its instruction is '  '",
        "line 5: is not JSON",
        "line 6: its key is '../../x', which can't be a file name",
        "line 7: repeats the item edit/en/00000",
        "line 8: its task is 'a/b'",
        "line 9: its target 'gone.png' does not exist",
        "line 10: is not a JSON object",
        "line 11: its source is None, not a path",
        "line 12: its instruction is 'add \\ud83d'",
        "line 13: its key is '\\ud83d', which can't be a file name",
        "line 14: its source is 'a\\x00b', not a path",
        "line 15: is not a JSON object",
    ]
    assert len(told) == len(expected)
    for line, text in zip(told, expected, strict=True):
        assert f"items.jsonl {text}" in line


@pytest.mark.parametrize(
    ("one", "other"), [("Photo", "photo"), ("caf\u00e9", "cafe\u0301"), ("\u00df", "SS")]
)
def test_keys_that_some_disks_do_not_tell_apart(tmp_path, one, other):
    """The second one's edit and judgement would take the place of the first's there."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"key": key, "source": "a.png", "instruction": "blur it"} for key in (one, other, "c")]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "items.jsonl").write_text(text, encoding="utf-8")
    items = read_items("folder", tmp_path)
    assert [item.key for item in items.items] == [one, "c"]
    assert "which many disks don't tell apart from edit/en/" in str(items.bad[0])


def test_nothing_usable_is_one_error(tmp_path: Path):
    (tmp_path / "items.jsonl").write_text('{"source": "x"}\n')
    with pytest.raises(HYWUError, match=r"No usable item of folder: items.jsonl line 1: its inst"):
        read_items("folder", tmp_path)
    with pytest.raises(HYWUError, match="holds none of gedit.jsonl"):
        read_items("gedit", tmp_path)
    with pytest.raises(HYWUError, match=r"holds no basic_edit.json"):
        read_items("imgedit", tmp_path)


def test_imgedit_images_in_the_authors_subfolder(tmp_path: Path):
    image(tmp_path / "singleturn" / "animal" / "000342021.jpg")
    entry = {"id": "animal/000342021.jpg", "prompt": "Smooth shell.", "edit_type": "adjust"}
    data = {
        "1082": entry,
        "7": {**entry, "edit_type": "fly"},
        "8": {**entry, "id": "no.jpg"},
        "9": 3,
        "10": "two\nlines",
    }
    (tmp_path / "basic_edit.json").write_text(json.dumps(data))
    items = read_items("imgedit", tmp_path)
    assert [(i.key, i.task, i.id) for i in items.items] == [("1082", "adjust", "adjust/en/1082")]
    told = "\n".join(map(str, items.bad))
    assert "'7': its edit_type is 'fly'" in told
    assert "'8': its id 'no.jpg' does not exist" in told
    assert "'9': is not a JSON object" in told
    assert "'10': is not a JSON object" in told


@pytest.mark.parametrize("form", ["parquet", "arrow stream", "arrow file"])
def test_gedit_as_published(tmp_path: Path, form: str):
    """Parquet, as on the hub; arrow, as `datasets` keeps it: image bytes inside, both languages."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    importlib.import_module("pyarrow.parquet")

    rows = []
    for number, (task, language) in enumerate(
        [("ps_human", "en"), ("ps_human", "cn"), ("text_change", "en")]
    ):
        raw, shown = tmp_path / f"raw{number}.jpg", tmp_path / f"shown{number}.png"
        image(raw, (10, 20, 30 * number), (64, 48))
        image(shown, (10, 20, 30 * number), (32, 24))
        rows.append(
            {
                "task_type": task,
                "key": f"k{number}",
                "instruction": "改" if language == "cn" else "change",
                "instruction_language": language,
                "input_image": {"bytes": shown.read_bytes(), "path": None},
                "input_image_raw": {"bytes": raw.read_bytes(), "path": "x.jpg"},
                "Intersection_exist": number != 1,
            }
        )
    rows.append({**rows[0], "key": "bad", "input_image": None, "input_image_raw": None})
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    if form == "parquet":
        pa.parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    else:
        maker = pa.ipc.new_stream if form == "arrow stream" else pa.ipc.new_file
        with maker(str(folder / "data-00000.arrow"), table.schema) as writer:
            writer.write_table(table)
    assert len(packed_files(tmp_path / "hub")) == 1
    with pytest.raises(HYWUError, match="unpack"):
        read_items("gedit", tmp_path / "hub")
    items = read_items("gedit", tmp_path / "hub", tmp_path)
    assert [i.id for i in items.items] == [
        "ps_human/en/k0",
        "ps_human/cn/k1",
        "text_change/en/k2",
    ]
    assert [i.intersection for i in items.items] == [True, False, True]
    assert items.items[1].instruction == "改"
    assert Image.open(items.items[2].source).size == (64, 48)
    assert Image.open(items.items[2].judged_source).size == (32, 24)
    assert items.items[0].source.read_bytes() == (tmp_path / "raw0.jpg").read_bytes()
    assert [str(bad) for bad in items.bad] == [
        "gedit.jsonl line 4: it has neither input_image nor input_image_raw"
    ]
    before = items.items[0].source.stat().st_mtime_ns
    assert read_items("gedit", tmp_path / "hub", tmp_path) == items
    assert items.items[0].source.stat().st_mtime_ns == before


def test_selection():
    items = read_items("folder", BENCHMARKS["folder"].sample)
    assert [i.task for i in items.select(tasks=["blur"]).items] == ["blur"]
    with pytest.raises(HYWUError, match="no items of the task fly; the tasks are blur, brighten"):
        items.select(tasks=["fly"])
    with pytest.raises(HYWUError, match="leaves no item"):
        items.select(languages=["cn"])


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("hywu_core.evaluation.benchmarks", ("pyarrow", "skimage", "matplotlib", "aiohttp")),
        ("hywu_core.evaluation.judges", ("skimage", "transformers", "aiohttp")),
        ("hywu_core.evaluation.gsb.server", ("torch", "numpy", "PIL", "aiohttp")),
        ("hywu_core.evaluation.gsb.session", ("torch", "numpy", "PIL")),
    ],
)
def test_importing_takes_no_more_than_it_needs(module, heavy):
    program = f"import sys, {module}; print(*(m for m in {heavy!r} if m in sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_no_room_compares_a_name_that_a_registry_holds():
    """Who runs things asks the object: names stand in their own file and in the registry's order alone."""
    everything = {*BENCHMARKS, *QUESTIONNAIRES, *EDITORS, *JUDGES}
    root = Path(__file__).parents[2]
    found = []
    asking = ("hywu_core/evaluation", "hywu_core/cli/eval")
    for folder in (*asking, "hywu_core/experiments", "nodes"):
        # elsewhere a word like "bundled" is also something else's name
        names = everything if folder in asking else {*QUESTIONNAIRES}
        for path in sorted((root / folder).rglob("*.py")):
            if {"benchmarks", "editors", "judges"} & set(path.relative_to(root).parts):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare):
                    words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                    if words & names:
                        found.append(f"{path.name}:{node.lineno}")
    assert not found
