"""What lies in users' folders: a former version's results go on, and every file is written byte for byte.

The fixture was made by the version of November 2026; its README.md says how it is laid out.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest

from hywu_core.cli import main
from hywu_core.evaluation.benchmarks import load_questionnaire, read_items
from hywu_core.evaluation.editors.comfy import ComfyEditor
from hywu_core.evaluation.editors.command import CommandEditor
from hywu_core.evaluation.editors.copy import CopyEditor
from hywu_core.evaluation.items import Item
from hywu_core.evaluation.store import StoreName

FIXTURE = Path(__file__).with_name("fixtures") / "evaluation"
EXPECTED = FIXTURE / "expected"
JUDGED = [("folder", "wu-eval"), ("gedit", "gedit"), ("imgedit", "imgedit"), ("gedit", "wu-eval")]
PINS = json.loads((EXPECTED / "pins.json").read_text(encoding="utf-8"))
SAID = json.loads((EXPECTED / "said.json").read_text(encoding="utf-8"))
ITEM = Item("k", "add", 'Make it "so" <now>, 改', Path("s.png"))


@pytest.fixture
def before(tmp_path, monkeypatch) -> Path:
    """The former version's folders; its results are the working directory."""
    with zipfile.ZipFile(FIXTURE / "before.zip") as archive:
        archive.extractall(tmp_path)
    for path in tmp_path.rglob("hywu_run.json"):
        text = path.read_text(encoding="utf-8").replace("DATA", (tmp_path / "data").as_posix())
        path.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "results")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    """Content by path, without embedded images (their bytes are the JPEG library's) and locks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".hywu.lock":
            data = path.read_bytes()
            if path.suffix == ".html":
                data = re.sub(rb"data:image/jpeg;base64,[A-Za-z0-9+/=]+", b"data:image/jpeg", data)
            found[path.relative_to(folder).as_posix()] = data
    return found


@pytest.mark.parametrize(("benchmark", "questionnaire"), JUDGED)
def test_scores_and_reports_are_written_byte_for_byte(before, benchmark, questionnaire, capsys):
    methods = [f"{benchmark}/one", f"{benchmark}/two"]
    choice = ["--questionnaire", questionnaire, "--judged-by", "some/judge"]
    name = f"{benchmark}_{questionnaire}_some-judge"
    assert main(["eval", "score", *methods, *choice, "--price-in", "2", "--price-out", "8"]) == 0
    assert capsys.readouterr().out == SAID[f"score {name}"]
    assert main(["eval", "report", *methods, *choice, "--out", f"{name}.html", "--each", "1"]) == 0
    assert capsys.readouterr().out == SAID[f"report {name}"]
    for method in methods:
        (folder,) = (Path(method) / "scores").iterdir()
        assert files(folder) == files(EXPECTED / method / "scores" / folder.name)
    for ending in (".html", ".md"):
        assert files(Path())[name + ending] == files(EXPECTED)[name + ending]


def test_votes_are_reported_and_exported_byte_for_byte(before, capsys):
    votes = str(before / "votes")
    assert main(["eval", "gsb", "report", votes, "--out", "gsb.json"]) == 0
    assert capsys.readouterr().out == SAID["gsb report"]
    for kind in ("csv", "json"):
        assert main(["eval", "gsb", "export", votes, "--out", f"votes.{kind}"]) == 0
        assert capsys.readouterr().out == SAID[f"export {kind}"]
    for name in ("gsb.json", "votes.csv", "votes.json"):
        assert Path(name).read_bytes() == (EXPECTED / name).read_bytes()


@pytest.mark.parametrize("benchmark", ["folder", "gedit", "imgedit"])
def test_a_half_done_generation_goes_on(before, benchmark, capsys):
    folder = Path(benchmark) / "one"
    with (folder / "failures.jsonl").open("ab") as file:
        file.write(b'{"item": "x/en/y", "err')  # killed here
    (folder / ".1.png.abcdef.part").write_bytes(b"half")
    kept = {n: data for n, data in files(folder).items() if n not in ("failures.jsonl",)}
    del kept[".1.png.abcdef.part"]
    given = ["--benchmark", benchmark, "--data", str(before / "data" / benchmark)]
    given += ["--out", benchmark, "--method", "one", "--editor", "copy", "--seed", "3"]
    assert main(["eval", "generate", *given]) == 0
    count = len(read_items(benchmark, before / "data" / benchmark).items)
    assert f"1 made, {count - 1} kept, 0 failed" in capsys.readouterr().out
    now = files(folder)
    manifests = [json.loads(found["hywu_run.json"]) for found in (now, kept)]
    assert {**manifests[0], "sources": None} == {**manifests[1], "sources": None}
    now["hywu_run.json"] = kept["hywu_run.json"]  # it has learned what sources it is of
    assert {name: now[name] for name in kept} == kept
    assert [name for name in now.keys() - kept if "_SRCIMG" not in name]
    assert len(now) - len(kept) == 1
    assert main(["eval", "generate", *given[:-1], "4"]) == 1
    assert "holds results with seed 3, now it is 4" in capsys.readouterr().err


def test_half_done_judging_goes_on(before, capsys):
    (store,) = Path("folder/two/judgements").glob("*reference*")
    before_bytes = store.read_bytes()
    whole = before_bytes[: before_bytes.rfind(b"\n") + 1]
    known = whole.count(b"\n") - 1  # without the header
    assert whole != before_bytes
    assert main(["eval", "judge", "folder/two", "--judge", "reference"]) == 3
    assert f"{known} known already; 1 items have no result" in capsys.readouterr().out
    after = store.read_bytes()
    assert after.startswith(whole)
    assert after.count(b"\n") == 1 + 8
    assert all(json.loads(line) for line in after.splitlines())


def test_names_and_digests_in_users_folders_stay():
    for told, file_name in PINS["stores"].items():
        judge, version, questionnaire = told.rsplit(" ", 2)
        assert StoreName(judge, version, questionnaire, "ours-1").file_name == file_name
    for name, pinned in PINS["questions"].items():
        questionnaire = load_questionnaire(name)
        found = {q.name: [q.digest, *q.roles] for q in questionnaire.questions(ITEM)}
        assert {**found, "title": questionnaire.title} == pinned
    for name, pinned in PINS["prompt files"].items():
        given = load_questionnaire(name, EXPECTED / "prompts.json")
        found = {q.name: q.digest for q in given.questions(ITEM)}
        assert {**found, "version": given.version, "title": given.title} == pinned


def test_the_items_fingerprints_stay(before):
    for benchmark, pinned in PINS["items"].items():
        assert read_items(benchmark, before / "data" / benchmark).fingerprint() == pinned


def test_what_editors_say_of_themselves_stays():
    editors = {
        "copy": CopyEditor(3),
        "command": CommandEditor("edit '{source}' {out} {instruction}", 2),
        "comfy": ComfyEditor(
            "http://127.0.0.1:9", EXPECTED / "workflow.json", "LoadImage.image", "改.text", "2.seed", "3"
        ),
    }  # fmt: skip
    for name, editor in editors.items():
        assert json.dumps(editor.describe()) == json.dumps(PINS["editors"][name])


OPTIONS = {
    "generate": "--benchmark --data --out --method --seed --tasks --languages --limit --tries --editor "
    "--workers --lora --fine-tuned --steps --strength --device --server --workflow --comfy-image "
    "--comfy-instruction --comfy-seed --comfy-output --command --item-timeout",
    "judge": "--benchmark --data --questionnaire --prompts --judge --url --model --key-env --parallel "
    "--per-minute --retries --timeout --folder --device --max-tokens --again",
    "score": "--benchmark --data --questionnaire --prompts --judged-by --answered-by --price-in "
    "--price-out",
    "report": "--out --each --benchmark --data --questionnaire --prompts --judged-by --answered-by",
    "own": "--out --experiment --methods --images --seed --device --each",
    "unpack": "--out",
    "gsb create": "--out --benchmark --data --name --seed --pairs-per-voter",
    "gsb serve": "--host --port --allow-host",
    "gsb link": "--server",
    "gsb report": "--out",
    "gsb export": "--out",
}


@pytest.mark.parametrize("step", OPTIONS)
def test_no_option_is_lost(step, capsys):
    with pytest.raises(SystemExit):
        main(["eval", *step.split(), "--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert set(OPTIONS[step].split()) <= set(re.findall(r"--[a-z-]+", usage))
