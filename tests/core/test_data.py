"""Images: the committed split, reading, crops, a user's rows."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from hywu_core.errors import HYWUError
from hywu_core.training.data import SPLIT, ImagePool, read_image, read_pairs


def test_the_sides_of_the_split_share_nothing():
    split = json.loads(SPLIT.read_text(encoding="utf-8"))
    assert len(split["held_out"]) >= 40
    assert not set(split["train"]) & set(split["held_out"])
    assert not set(split["train"].values()) & set(split["held_out"].values())


def test_reading_turns_and_fills(tmp_path):
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    pixels = read_image(tmp_path / "a.png")
    assert pixels.shape == (3, 8, 4)
    assert (pixels == 255).all(), "transparency is laid on white"


def test_crops_follow_the_generator(tmp_path):
    Image.effect_noise((200, 120), 80).convert("RGB").save(tmp_path / "a.png")
    pool = ImagePool([tmp_path / "a.png"])
    one, two = (pool.crops(5, 32, torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.shape == (5, 3, 32, 32)
    assert torch.equal(one, two)
    assert 0 <= one.min() <= one.max() <= 1


def test_bad_rows_are_named_and_skipped(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = {"source": "a.png", "target": "a.png", "instruction": "blur", "task": "blur"}
    rows = [
        json.dumps(good),
        "{not json",
        json.dumps({**good, "instruction": " "}),
        json.dumps({**good, "target": "b.png"}),
        json.dumps({**good, "target": "broken.png"}),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    pairs, bad = read_pairs(tmp_path)
    assert [p.instruction for p in pairs] == ["blur"]
    assert [text.split(", row ")[1][0] for text in bad] == ["2", "3", "4", "5"]
    assert "instruction" in bad[1]
    assert "(9, 8)" in bad[2]
    assert "broken.png" in bad[3]


def test_no_good_row_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(HYWUError, match="none of 1 rows"):
        read_pairs(tmp_path / "rows.jsonl")
