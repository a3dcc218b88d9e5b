"""A user's pairs in files, folders, tar shards and parquet; bad ones by name; split, cached, made ahead."""

from __future__ import annotations

import io
import json
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from hywu_core.errors import HYWUError
from hywu_core.training import decoding, pairs
from hywu_core.training.base import Batch
from hywu_core.training.data import Ahead, Images, PairBatches
from hywu_core.training.pairs import held_out, pairs_identity, read_pairs, read_source


def png(seed: int, size=(20, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


#: name -> content of the files of three samples: two good ones, and one without a target.
SAMPLES = {
    "one.source.png": png(1), "one.target.png": png(2), "one.txt": b"make it new\n",
    "two.source.png": png(3), "two.target.png": png(4), "two.reference1.png": png(5, (9, 30)),
    "two.json": json.dumps({"instruction": "line\u2028break", "task": "odd"}).encode(),
    "bad.source.png": png(6), "bad.txt": b"nothing to see",
}  # fmt: skip


@pytest.fixture(params=["folder", "tar", "tars", "parquet", "arrow", "jsonl"])
def stored(request, tmp_path):
    """The same samples in each form."""
    if request.param == "folder":
        for name, content in SAMPLES.items():
            (tmp_path / "sub").mkdir(exist_ok=True)
            (tmp_path / "sub" / name).write_bytes(content)
        return tmp_path
    if request.param in ("tar", "tars"):
        with tarfile.open(tmp_path / "shard-000.tar", "w") as archive:
            for name, content in SAMPLES.items():
                member = tarfile.TarInfo(f"data/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return tmp_path if request.param == "tars" else tmp_path / "shard-000.tar"
    rows = [
        {"source": SAMPLES["one.source.png"], "target": SAMPLES["one.target.png"],
         "instruction": "make it new", "task": "", "references": []},
        {"source": SAMPLES["two.source.png"], "target": SAMPLES["two.target.png"],
         "instruction": "line\u2028break", "task": "odd", "references": [SAMPLES["two.reference1.png"]]},
        {"source": SAMPLES["bad.source.png"], "target": None, "instruction": "x", "task": "",
         "references": []},
    ]  # fmt: skip
    if request.param == "parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        return tmp_path
    if request.param == "arrow":  # as `datasets` keeps images
        arrow = pytest.importorskip("pyarrow")
        for row in rows:
            for key in ("source", "target"):
                row[key] = row[key] and {"bytes": row[key], "path": None}
        (tmp_path / "one.png").write_bytes(rows[0]["target"]["bytes"])
        rows[0]["target"] = {"bytes": None, "path": "one.png"}  # as it keeps them in parquet
        table = arrow.Table.from_pylist(rows)
        with arrow.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", table.schema) as file:
            file.write_table(table, max_chunksize=2)
        (tmp_path / "state.json").write_text("{}")
        return tmp_path
    written = []
    for number, row in enumerate(rows):
        named = {"instruction": row["instruction"], "task": row["task"], "references": []}
        for key in ("source", "target"):
            if row[key]:
                named[key] = f"{number}_{key}.png"
                (tmp_path / named[key]).write_bytes(row[key])
        for i, content in enumerate(row["references"]):
            named["references"].append(f"{number}_{i}.png")
            (tmp_path / f"{number}_{i}.png").write_bytes(content)
        written.append(json.dumps(named, ensure_ascii=False))
    (tmp_path / "rows.jsonl").write_text("\n".join(written), encoding="utf-8")
    return tmp_path


def test_every_form_gives_the_same_pairs(stored):
    found, bad = read_pairs(stored)
    assert [(p.instruction, p.task) for p in found] == [
        ("make it new", "custom"),
        ("line\u2028break", "odd"),
    ]
    for pair, (source, target) in zip(found, ((1, 2), (3, 4)), strict=True):
        for image, seed in ((pair.source, source), (pair.target, target)):
            wanted = np.array(Image.open(io.BytesIO(png(seed)))).transpose(2, 0, 1)
            assert (read_source(image).numpy() == wanted).all()
    assert [len(p.references) for p in found] == [0, 1]
    assert read_source(found[1].references[0]).shape == (3, 30, 9)
    assert len(bad) == 1
    assert "target" in bad[0]


@pytest.mark.parametrize("name", ["shard.tar", "rows.parquet", "rows.arrow"])
def test_a_damaged_container_is_named(tmp_path, name):
    if not name.endswith("tar"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"no such thing" * 100)
    with pytest.raises(HYWUError, match=f"{name}: not a whole"):
        read_pairs(tmp_path / name)


def test_a_truncated_image_in_a_shard_is_named_with_both(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in {**SAMPLES, "one.target.png": png(2)[:90]}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found, bad = read_pairs(tmp_path / "a.tar")
    assert len(found) == 1
    assert any("a.tar" in line and "one.target.png" in line for line in bad)


def test_nothing_to_read_names_the_forms(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for place in (tmp_path, tmp_path / "notes.txt", tmp_path / "gone.jsonl"):
        with pytest.raises(HYWUError, match=r"\*\.tar, \*\.parquet"):
            read_pairs(place)


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(HYWUError, match="pip install pyarrow"):
        read_pairs(tmp_path)


def test_identity_is_of_what_is_read_not_of_where_it_lies(tmp_path, write_pairs):
    for folder in ("here", "there", "other"):
        (tmp_path / folder).mkdir()
        write_pairs(tmp_path / folder, 3)
    found = {f: read_pairs(tmp_path / f)[0] for f in ("here", "there", "other")}
    assert pairs_identity(found["here"]) == pairs_identity(found["there"])
    assert pairs_identity(found["here"]) != pairs_identity(found["here"][:2])
    (tmp_path / "other" / "1.png").write_bytes(png(9, (80, 60)))
    assert pairs_identity(found["here"]) != pairs_identity(read_pairs(tmp_path / "other")[0])


def test_validation_keeps_whole_images_whatever_the_order(tmp_path, write_pairs):
    found = read_pairs(write_pairs(tmp_path, 10))[0]
    twice = found + [pairs.Pair(p.source, p.target, "again", p.task) for p in found]
    trained, kept = held_out(twice, 0.3)
    assert len(kept) == 6
    assert len(trained) == 14
    assert not {p.source for p in trained} & {p.source for p in kept}
    again = held_out(twice[::-1], 0.3)[1]
    assert {p.source for p in again} == {p.source for p in kept}
    for share in (0, 1, 1.5):
        with pytest.raises(HYWUError, match="between 0 and 1"):
            held_out(twice, share)
    with pytest.raises(HYWUError, match="1 source images can't be split"):
        held_out(found[:1], 0.5)


def test_once_shows_every_pair_once_and_the_same(tmp_path, write_pairs):
    source = PairBatches(read_pairs(write_pairs(tmp_path, 5))[0], 2, 32)
    one, two = source.once(), source.once()
    assert [len(batch) for batch in one] == [2, 2, 1]
    texts = [text for batch in one for text in batch.instruction]
    assert sorted(texts) == [f"negate {i}" for i in range(5)]
    assert all(torch.equal(a.source, b.source) for a, b in zip(one, two, strict=True))


def test_only_one_task(tmp_path, write_pairs):
    found = read_pairs(write_pairs(tmp_path, 4))[0]
    mixed = [
        pairs.Pair(p.source, p.target, p.instruction, "ab"[i % 2]) for i, p in enumerate(found)
    ]
    batch = PairBatches(mixed, 4, 32, only="b")(0)
    assert set(batch.task) == {"b"}
    with pytest.raises(HYWUError, match="no pair is of the task 'c'; there are a, b"):
        PairBatches(mixed, 4, 32, only="c")


def test_images_are_decoded_once_and_kept_up_to_a_limit(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        decoding,
        "read_source",
        lambda s, side: read.append(s) or torch.zeros(3, 10, 10, dtype=torch.uint8),
    )
    images = Images(most=700)  # two of 300 bytes
    for name in "aabab":
        images(tmp_path / name)
    assert len(read) == 2
    images(tmp_path / "c")
    images(tmp_path / "b")
    images(tmp_path / "a")
    assert [p.name for p in read] == ["a", "b", "c", "a"]
    assert images.bytes <= 700


def test_ahead_changes_no_batch_and_works_in_another_thread():
    threads = []

    def source(step: int) -> Batch:
        threads.append(threading.current_thread() is threading.main_thread())
        value = torch.full((1, 3, 1, 1), float(step))
        return Batch(value, value, ("x",), ("y",))

    ahead = Ahead(source)
    assert [float(ahead(step).source.mean()) for step in (0, 1, 2, 7, 8, 0)] == [0, 1, 2, 7, 8, 0]
    assert threads.count(True) == 3  # the first, and after each jump


def test_an_error_of_a_batch_made_ahead_is_raised_where_it_is_asked_for():
    def source(step: int) -> Batch:
        if step == 1:
            raise HYWUError("broken.png: no image")
        return Batch(torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1), ("x",), ("y",))

    ahead = Ahead(source)
    ahead(0)
    with pytest.raises(HYWUError, match=r"broken\.png"):
        ahead(1)
