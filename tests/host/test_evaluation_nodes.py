"""Benchmark Items, Judge and Score Table on a real server, with a stock node as the editor."""

from __future__ import annotations

import json
import shutil

import pytest
from judge_stub import GOOD, Stub
from PIL import Image, ImageStat

import dev
from hywu_core.cli import main
from hywu_core.evaluation.benchmarks import BENCHMARKS
from hywu_core.evaluation.results import open_results
from hywu_core.headless.client import NodeFailed, Refused, run_sync
from hywu_core.headless.graph import read_graph


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def items(benchmark: str = "folder", path: str = "samples", index: int = 0, count: int = 0) -> dict:
    return node("HYWUBenchmarkItems", benchmark=benchmark, path=path, index=index, count=count)


def judge(image: list, method: str, **more) -> dict:
    given = {"judge": "reference", "questionnaire": "auto", "folder": "eval_test", **more}
    return node("HYWUJudge", image=image, item=["items", 2], method=method, **given)


def graph(benchmark: str = "folder", method: str = "blurred", **item_options) -> dict:
    """Every item blurred, judged, tabulated."""
    return {
        "items": items(benchmark, **item_options),
        "edit": node("ImageBlur", image=["items", 0], blur_radius=5, sigma=2.0),
        "judge": judge(["edit", 0], method),
        "table": node("HYWUScoreTable", scores=["judge", 0]),
        "chart": node("SaveImage", images=["table", 1], filename_prefix=f"chart_{method}"),
    }


def text(record: dict, node_id: str) -> str:
    return record["outputs"][node_id]["text"][0]


@pytest.mark.parametrize(
    ("benchmark", "shown"),
    [("folder", "WU-Eval"), ("gedit", "GEdit-Bench"), ("imgedit", "ImgEdit-Bench")],
)
def test_one_run_edits_judges_and_tabulates_both_items(server, benchmark, shown):
    record, _ = run_sync(server.url, graph(benchmark, f"blurred_{benchmark}"), timeout=180)
    answers = [json.loads(answer) for answer in record["outputs"]["judge"]["text"]]
    assert [a["outcome"] for a in answers] == ["scored", "scored"]
    assert "2 scored of 2 items" in text(record, "table")
    assert shown in text(record, "table")
    name = record["outputs"]["chart"]["images"][0]["filename"]
    with Image.open(server.base / "output" / name) as chart:
        assert chart.width == 700
        assert (
            ImageStat.Stat(chart.convert("L")).stddev[0] > 10
        )  # bars and letters, not a blank page


def test_what_the_graph_keeps_is_what_the_command_line_reads(server, capsys):
    run_sync(server.url, graph(method="both_ways"), timeout=180)
    root = server.base / "output" / "eval_test" / "both_ways"
    results, listed = open_results(root)
    assert not results.missing(listed)
    assert main(["eval", "judge", str(root), "--judge", "reference"]) == 0
    assert "0 answered" in capsys.readouterr().out  # the graph had asked already
    assert main(["eval", "score", str(root)]) == 0
    assert "2 scored of 2 items" in capsys.readouterr().out


def test_items_come_one_a_run_and_the_table_counts_what_is_missing(server):
    first, _ = run_sync(server.url, graph(method="stepwise", index=0, count=1), timeout=180)
    assert "1 scored, 1 missing of 2 items" in text(first, "table")
    second, _ = run_sync(server.url, graph(method="stepwise", index=1, count=1), timeout=180)
    assert "2 scored of 2 items" in text(second, "table")
    with pytest.raises(NodeFailed, match="2 items, 0 to 1"):
        run_sync(server.url, graph(method="stepwise", index=2, count=1), timeout=180)


def test_methods_are_compared_and_the_target_scores_five(server, tmp_path):
    data = server.base / "input" / "own"
    shutil.copytree(BENCHMARKS["folder"].sample, data, dirs_exist_ok=True)
    # as PNG: ComfyUI 0.33.0 decodes JPEGs by FFmpeg, a few levels off what the judge reads
    with Image.open(data / "targets" / "astronaut.jpg") as target:
        target.save(server.base / "input" / "target.png")
    both = {
        **graph(method="compared", path="own", count=1),
        "target": node("LoadImage", image="target.png"),
        "judge_2": judge(["target", 0], "the_target"),
    }
    both["table"]["inputs"]["scores_2"] = ["judge_2", 0]
    record, _ = run_sync(server.url, both, timeout=180)
    assert json.loads(text(record, "judge_2"))["scores"]["overall"] == 5
    assert "difference to compared" in text(record, "table")


def test_paths_stay_inside_the_folders_of_comfyui(server, tmp_path):
    shutil.copytree(BENCHMARKS["folder"].sample, tmp_path / "elsewhere")
    link = server.base / "input" / "link_out"
    link.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for path in (str(tmp_path / "elsewhere"), "../../elsewhere", "link_out", ""):
        with pytest.raises(Refused, match="no such benchmark inside"):
            run_sync(server.url, graph(path=path), timeout=180)
    for folder in ("../escaped", str(tmp_path / "escaped"), ""):
        with pytest.raises(Refused, match="leads out of ComfyUI's output folder"):
            out = graph()
            out["judge"]["inputs"]["folder"] = folder
            run_sync(server.url, out, timeout=180)
    for method in ("../escaped", "a/b", "", "NUL:"):
        with pytest.raises(Refused, match="method can't be used"):
            run_sync(server.url, graph(method=method), timeout=180)
    assert not (tmp_path / "escaped").exists()
    assert not (server.base / "escaped").exists()


def test_results_of_another_program_are_left_alone(server):
    out = server.base / "output" / "eval_test"
    given = ["--benchmark", "folder", "--data", "samples", "--out", str(out)]
    assert main(["eval", "generate", *given, "--method", "theirs", "--editor", "copy"]) == 0
    before = {p: p.read_bytes() for p in sorted((out / "theirs").rglob("*")) if p.is_file()}
    with pytest.raises(NodeFailed, match="holds results with editor"):
        run_sync(server.url, graph(method="theirs"), timeout=180)
    assert {p: p.read_bytes() for p in before} == before


def test_mistakes_are_one_sentence_and_the_next_prompt_works(server):
    batch = graph()
    batch["edit"] = node("RepeatImageBatch", image=["items", 0], amount=2)
    with pytest.raises(NodeFailed, match="batch of 2 images"):
        run_sync(server.url, batch, timeout=180)
    nameless = graph()
    nameless["judge"]["inputs"]["judge"] = "openai"
    with pytest.raises(NodeFailed, match="needs model"):
        run_sync(server.url, nameless, timeout=180)
    with pytest.raises(Refused):
        run_sync(server.url, graph("another"), timeout=180)
    record, _ = run_sync(server.url, graph(), timeout=180)
    assert "2 scored of 2 items" in text(record, "table")


@pytest.fixture
def endpoint():
    """A judge's endpoint on loopback that answers WU-Eval once, then garbage."""
    with Stub(lambda prompt, n: GOOD if len(stub.keys) == 1 else "I'd rather not say") as stub:
        yield stub


def test_a_model_judges_at_the_operators_endpoint(comfyui, tmp_path, endpoint, monkeypatch):
    """A server of its own, since the endpoint comes from its environment; a garbled answer is counted."""
    monkeypatch.setenv("HYWU_JUDGE_URL", endpoint.url)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-for-the-test")
    asked = graph(method="judged_by_model")
    asked["judge"]["inputs"].update(judge="openai", model="tiny-vlm")
    with dev.server_of(comfyui, tmp_path / "comfyui") as own:
        record, _ = run_sync(own.url, asked, timeout=180)
        log = own.log.read_text()
    assert "1 scored, 1 unparsable of 2 items" in text(record, "table")
    assert endpoint.keys == ["Bearer secret-for-the-test"] * 2
    written = [p for p in (tmp_path / "comfyui" / "output").rglob("*") if p.is_file()]
    assert all(b"secret-for-the-test" not in p.read_bytes() for p in written)
    assert "secret-for-the-test" not in log + json.dumps(record)


@pytest.mark.parametrize("name", ["benchmark_gedit", "benchmark_imgedit", "wu_eval"])
def test_the_shipped_workflows_run_from_items_to_table(server, weights, name):
    shipped = read_graph(dev.ROOT / "workflows" / "api" / f"{name}.json")
    record, _ = run_sync(server.url, shipped, timeout=400)
    table = next(i for i, n in shipped.items() if n["class_type"] == "HYWUScoreTable")
    shown = text(record, table)
    assert shown.count("2 scored of 2 items") == (2 if name == "wu_eval" else 1)
    edited = next(i for i, n in shipped.items() if n["_meta"]["title"] == "Edited")
    assert len(record["outputs"][edited]["images"]) == 2


# -- the shipped workflows over a user's own benchmark -------------------------------------------------


def photo(path, colour: int, side: int = 80):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((side, 64)).point(lambda v: (v + colour) % 256).convert(
        "RGB"
    ).save(path)
    return path


def gedit_as_published(folder):
    """Two items in two languages in a parquet file, as on the hub, and one without an image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "task_type": task,
            "key": f"k{number}",
            "instruction": "把照片变亮" if language == "cn" else "Brighten the photo.",
            "instruction_language": language,
            "input_image_raw": {"bytes": photo(folder / f"{number}.png", 40 * number).read_bytes()},
            "Intersection_exist": True,
        }
        for number, (task, language) in enumerate(
            [("tone_transfer", "en"), ("tone_transfer", "cn")]
        )
    ]
    rows.append({**rows[0], "key": "lost", "input_image_raw": None})
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")


def imgedit_as_published(folder):
    """Three items, their images in a folder beside the list."""
    rows = {}
    for number, kind in enumerate(("adjust", "style", "background")):
        photo(folder / "singleturn" / kind / f"{number}.png", 40 * number)
        rows[f"{number}"] = {
            "id": f"{kind}/{number}.png",
            "prompt": "Darken the photo.",
            "edit_type": kind,
        }
    (folder / "basic_edit.json").write_text(json.dumps(rows), encoding="utf-8")


def folder_of_pairs(folder):
    """Three items with their targets, of sizes of their own, and one whose image is missing."""
    rows = []
    for number in range(3):
        photo(folder / f"{number}.png", 40 * number, 70 + 9 * number)
        photo(folder / f"{number}_wanted.png", 40 * number + 60, 70 + 9 * number)
        pair = {"source": f"{number}.png", "target": f"{number}_wanted.png"}
        rows.append({**pair, "instruction": "Brighten the photo.", "task": "light"})
    rows.append({"source": "nowhere.png", "instruction": "Brighten the photo."})
    lines = "\n".join(map(json.dumps, rows))
    (folder / "items.jsonl").write_text(lines, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "make", "shown"),
    [
        ("benchmark_gedit", gedit_as_published, "2 refused of 2 items"),
        ("benchmark_imgedit", imgedit_as_published, "3 refused of 3 items"),
        ("wu_eval", folder_of_pairs, "3 scored of 3 items"),
    ],
)
def test_one_path_takes_a_shipped_workflow_to_a_users_folder(server, weights, name, make, shown):
    """The judge of the shipped ones computes from pixels: it declines items without a target."""
    folder = server.base / "input" / f"my_{name}"
    folder.mkdir()
    make(folder)
    shipped = read_graph(dev.ROOT / "workflows" / "api" / f"{name}.json")
    reader = next(n for n in shipped.values() if n["class_type"] == "HYWUBenchmarkItems")
    reader["inputs"]["path"] = f"my_{name}"
    for each in shipped.values():
        if each["class_type"] == "HYWUJudge":
            each["inputs"]["method"] = "mine_" + each["inputs"]["method"]  # apart from other tests
    record, _ = run_sync(server.url, shipped, timeout=400)
    table = next(i for i, n in shipped.items() if n["class_type"] == "HYWUScoreTable")
    edited = next(i for i, n in shipped.items() if n["_meta"]["title"] == "Edited")
    assert shown in text(record, table)
    assert len(record["outputs"][edited]["images"]) == int(shown.split()[-2])
    if "refused" in shown:
        judge_id = next(i for i, n in shipped.items() if n["class_type"] == "HYWUJudge")
        answers = record["outputs"][judge_id]["text"]
        assert all("no target image" in answer for answer in answers)
