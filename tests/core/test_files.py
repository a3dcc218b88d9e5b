"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hywu_core import HYWUError, atomic
from hywu_core.atomic import real_path
from hywu_core.errors import get_logger
from hywu_core.evaluation.results import Failures
from hywu_core.evaluation.store import Judgement, JudgementStore, StoreName
from hywu_core.files import (
    append_line,
    atomic_folder,
    atomic_path,
    check_name,
    folder_lock,
    parse_json,
    read_header,
    read_json,
    read_json_lines,
    read_tensors,
    save_tensors,
    write_json,
)
from hywu_core.training.logs import FIELDS, Log


def tree(folder):
    return {
        str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def old_folder(tmp_path):
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("old a")
    (folder / "sub" / "mine.txt").write_text("mine")
    return folder


def test_new_folder_appears_when_the_block_ends(tmp_path):
    folder = tmp_path / "deep" / "out"
    with atomic_folder(folder) as part:
        (part / "a.txt").write_text("new")
        assert not folder.exists()
    assert tree(tmp_path) == {"deep/out/a.txt": "new"}
    if os.name == "posix":
        (tmp_path / "usual").mkdir()
        assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_overwriting_replaces_and_keeps_other_files(tmp_path):
    folder = old_folder(tmp_path)
    with atomic_folder(folder, overwrite=True) as part:
        (part / "a.txt").write_text("new a")
        assert (folder / "a.txt").read_text() == "old a"
    assert tree(tmp_path) == {"out/a.txt": "new a", "out/sub/mine.txt": "mine"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_interrupted_write_leaves_the_old_folder(tmp_path, error):
    folder = old_folder(tmp_path)
    before = tree(tmp_path)
    wanted = HYWUError if error is OSError else error
    with pytest.raises(wanted), atomic_folder(folder, overwrite=True) as part:
        (part / "a.txt").write_text("half")
        raise error("stopped")
    assert tree(tmp_path) == before
    with pytest.raises(wanted), atomic_folder(tmp_path / "new") as part:
        (part / "a.txt").write_text("half")
        raise error("stopped")
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder = old_folder(tmp_path)
    before, replace = tree(tmp_path), os.replace

    def fails_for_the_new(source, target):
        if os.path.basename(source) == "new":
            raise PermissionError(13, "in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_for_the_new)
    with (
        pytest.raises(HYWUError, match=r"out: can't be written \(in use\)"),
        atomic_folder(folder, overwrite=True) as part,
    ):
        (part / "a.txt").write_text("new")
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    folder = old_folder(tmp_path)
    link = tmp_path / "link"
    try:
        link.symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("this system lets only administrators make symbolic links")
    with atomic_folder(link, overwrite=True) as part:
        (part / "a.txt").write_text("new a")
    assert link.is_symlink()
    assert tree(folder) == {"a.txt": "new a", "sub/mine.txt": "mine"}


def test_refusals_of_folders(tmp_path):
    folder = old_folder(tmp_path)
    for path, overwrite, words in (
        (folder, False, "exists already"),
        (folder / "a.txt", True, "is a file"),
        (folder / "a.txt" / "x", False, "can't be written"),
    ):
        with pytest.raises(HYWUError, match=words), atomic_folder(path, overwrite):
            raise AssertionError("the block must not be entered")


def test_an_interrupted_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path, overwrite=True) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"x.txt": "old"}


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    whole = torch.arange(6.0)
    path = save_tensors(
        tmp_path / "x", {"whole": whole, "part": whole[:2], "same": whole}, {"n": 1}
    )
    tensors, header = read_tensors(path)
    assert header == {"n": 1}
    assert torch.equal(tensors["whole"], whole)
    assert torch.equal(tensors["part"], whole[:2])
    assert torch.equal(tensors["same"], whole)


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files, which Windows can't")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(HYWUError, match=r"x.safetensors: can't be written \(.*too large"):
            save_tensors(tmp_path / "x", {"a": torch.ones(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files, which Windows can't")
def test_a_file_of_a_folder_is_named_as_it_would_have_been(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(HYWUError) as caught, atomic_folder(tmp_path / "out") as new:
            save_tensors(new / "x", {"a": torch.ones(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).startswith(f"{tmp_path / 'out' / 'x.safetensors'}: can't be written")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files, which Windows can't")
def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    import resource

    path, before = tmp_path / "x.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    append_line(path, b"first")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(HYWUError, match=r"x.jsonl: can't be written \(.*too large"):
            append_line(path, b"n" * 2000)
        append_line(path, b"second\n", durable=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with path.open("ab") as file:
        file.write(b"half of on")
    append_line(path, b"third")
    assert path.read_bytes() == b"first\nsecond\nhalf of on\nthird\n"
    with pytest.raises(HYWUError, match="no/folder: can't be written"):
        append_line(tmp_path / "no" / "folder", b"x")


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files, which Windows can't")
def test_what_is_appended_to_is_as_it_was_on_a_full_disk(tmp_path):
    """Judgements, reasons of failures and a training's log: named, not half there, and the next one fits."""
    import resource

    name = StoreName("judge", "1", "wu-eval", "1")
    log = Log(tmp_path, 0)
    row = dict.fromkeys(FIELDS, 0.1234567890123)
    with JudgementStore(tmp_path, name, writable=True) as store:
        kept = Judgement("a", "q", "i", "p", "answered", "short")
        store.append(kept)
        failures = Failures(SimpleNamespace(root=tmp_path))
        for number in range(6):
            log.add({**row, "step": number})
        failures.add(SimpleNamespace(id="a"), "r" * 450)
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = max(map(len, files.values()))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit + 10, before[1]))
        try:
            with pytest.raises(HYWUError, match="jsonl: can't be written"):
                store.append(replace(kept, item="b", text="t" * limit))
            with pytest.raises(HYWUError, match="failures.jsonl: can't be written"):
                failures.add(SimpleNamespace(id="b"), "r" * limit)
            with pytest.raises(HYWUError, match="log.csv: can't be written"):
                for number in range(6, 600):
                    log.add({**row, "step": number})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert len(store) == 1
        after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert {n: d for n, d in after.items() if n != "log.csv"} == {
            n: d for n, d in files.items() if n != "log.csv"
        }
        assert after["log.csv"].startswith(files["log.csv"])
        assert after["log.csv"].endswith(b"\r\n")
        store.append(replace(kept, item="b"))
    assert [one.item for one in JudgementStore(tmp_path, name)] == ["a", "b"]


def test_what_came_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "x.txt"
    with pytest.raises(HYWUError, match="exists already"), atomic_path(path) as part:
        part.write_text("mine")
        path.write_text("theirs")
    with pytest.raises(HYWUError, match="exists already"), atomic_folder(tmp_path / "f") as part:
        (part / "a").write_text("mine")
        (tmp_path / "f").mkdir()
        (tmp_path / "f" / "a").write_text("theirs")
    assert tree(tmp_path) == {"x.txt": "theirs", "f/a": "theirs"}


KILLED = """
import os, sys, signal
from pathlib import Path
from hywu_core import atomic
folder = Path(sys.argv[1])
if sys.argv[2] == "swap":
    replace = os.replace
    def killed(source, target):
        replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace = killed
    with atomic.atomic_folder(folder / "f", overwrite=True) as part:
        (part / "a").write_text("new")
with atomic.atomic_path(folder / "x", overwrite=True) as part:
    part.write_text("half")
    with atomic.atomic_folder(folder / "f", overwrite=True) as part:
        (part / "a").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process, where locks tell who is alive")
@pytest.mark.parametrize("where", ["write", "swap"])
def test_leftovers_of_killed_saves_are_swept_and_only_those(tmp_path, where):
    folder = old_folder(tmp_path).rename(tmp_path / "f")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), where], check=False)
    assert list(tmp_path.glob(".*.part"))
    assert folder.exists() is (where == "write")
    with atomic_path(tmp_path / "living") as part:
        atomic.sweep(tmp_path)
        save_file({"a": torch.ones(3)}, str(part))  # which makes the file anew
        atomic.sweep(tmp_path)
        assert list(tmp_path.glob(".*.part")) == [part.parent]
    (tmp_path / "living").unlink(missing_ok=True)
    assert tree(tmp_path) == {"f/a.txt": "old a", "f/sub/mine.txt": "mine"}
    assert not list(tmp_path.glob(".*.part"))


def test_names_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("图" * 84)
    write_json(path, {})
    assert read_json(path) == {}
    with pytest.raises(HYWUError, match="can't be written"):
        write_json(tmp_path / ("x" * 300), {})
    with pytest.raises(HYWUError, match="can't be written"):
        write_json(tmp_path / "a\0b", {})
    with pytest.raises(HYWUError, match="can't be read"):
        read_json(tmp_path / "a\0b")
    with pytest.raises(HYWUError, match="no such file"):
        read_header(tmp_path / ("x" * 300))


def test_one_run_at_a_time(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".a.1.part").write_text("of a killed run of the former version")
    (tmp_path / ".b.2.part" / "new").mkdir(parents=True)
    with (
        folder_lock(tmp_path),
        pytest.raises(HYWUError, match="another run"),
        folder_lock(tmp_path),
    ):
        raise AssertionError("the block must not be entered")
    with folder_lock(tmp_path):
        assert sorted(p.name for p in tmp_path.rglob("*")) == [".hywu.lock", "sub"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": Infinity}', "Infinity is no number"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"[1]", "holds a list, an object is needed; write it again"),
        (b"", "not JSON"),
    ],
)
def test_json_that_is_none_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(HYWUError, match=words) as caught:
        read_json(path, dict, "write it again")
    assert str(caught.value).startswith(str(path))


def test_json_keeps_half_an_emoji_and_takes_a_byte_order_mark(tmp_path):
    data = {"text": "half \ud83d, whole 😀, é", "n": [1, 2.5, None]}
    assert read_json(write_json(tmp_path / "x.json", data)) == data
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "bom.json") == {}
    assert parse_json("\ufeff[1]", "x") == [1]
    assert parse_json("[Infinity]", "x", finite=False) == [float("inf")]


def test_rows_end_with_a_line_feed_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    texts = ["a\u2028b", "c\u2029d", "e\u0085f", "g\x0bh"]
    lines = [json.dumps({"t": t}, ensure_ascii=False).encode() for t in texts]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*lines, b"", b"{", b'{"t": "\xff"}']))
    rows = read_json_lines(path)
    assert [value["t"] for _, value in rows[:3]] == texts[:3]
    assert [number for number, _ in rows] == [1, 2, 3, 4, 6, 7]
    assert all(isinstance(value, HYWUError) for _, value in rows[4:])
    assert "line 7: not JSON (not UTF-8" in str(rows[5][1])


def test_errors_can_be_written_anywhere():
    text = str(HYWUError("there is no \ud83d here"))
    assert text == "there is no \\ud83d here"
    assert text.encode("utf-8")


@pytest.mark.parametrize(
    "name",
    ["", "a/b", " a", "a.", "nul\0", "\ud83d", "x" * 121, "图" * 90, "a\x1b[2J", "a\x7f", "a\x85",
     "con", "NUL", "Aux.png", "com1", "LPT9.tar.gz", "com¹", "nul .png", "CONIN$"],
)  # fmt: skip
def test_names_that_no_file_can_have(name):
    with pytest.raises(HYWUError, match="can't be a file name"):
        check_name(name, "key")


@pytest.mark.parametrize(
    "name", ["console", "com", "com10", "nul_", "a.con", "lpt", "auxiliary.x", "名"]
)
def test_names_that_only_look_like_devices(name):
    assert check_name(name, "key") == name


def test_lines_of_logs_can_be_written_anywhere():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    handler = logging.StreamHandler(stream)
    logger = get_logger("hywu_core.test")
    assert get_logger("hywu_core.test") is logger
    assert len(logger.filters) == 1
    logger.addHandler(handler)
    try:
        logger.warning("module %s of %d", "half \ud83d", 3)
        logger.warning("100 % \udc80")
    finally:
        logger.removeHandler(handler)
    stream.flush()
    assert stream.buffer.getvalue() == b"module half \\ud83d of 3\n100 % \\udc80\n"


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_promised_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch, folder):
    """A rename outlives a power loss before the bytes do."""
    target, done = tmp_path / "it", []
    real = os.fsync

    def sync(handle):
        done.append(target.exists())
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    if folder:
        with atomic.atomic_folder(target) as new:
            (new / "a").write_text("a")
    else:
        with atomic.atomic_path(target) as part:
            part.write_text("a")
    assert done == [False, True] or (os.name == "nt" and done == [False])


def test_links_that_lead_in_a_circle(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert real_path(loop).name == "loop"
    assert real_path("a\0b").is_absolute()
    for overwrite in (False, True):
        with pytest.raises(HYWUError, match="loop"), atomic_folder(loop, overwrite) as folder:
            (folder / "x").write_text("x")
    assert os.readlink(loop) == str(loop)
    assert os.listdir(tmp_path) == ["loop"]
