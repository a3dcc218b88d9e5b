"""Crops by policy and resolution, a cache of decoded images, workers: nothing of it changes what a step sees."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import data as data_bench
from hywu_core import fingerprint
from hywu_core.cli import main
from hywu_core.errors import HYWUError
from hywu_core.files import read_header
from hywu_core.training import decoding
from hywu_core.training.base import Batch
from hywu_core.training.crops import POLICIES, Order, cut, nearest
from hywu_core.training.data import Ahead, PairBatches
from hywu_core.training.decoding import Images
from hywu_core.training.pairs import read_pairs
from hywu_core.training.workers import in_workers

FORMER = Path(__file__).with_name("former_runs")
#: What the data path gave when it had one policy for steps 0, 3 and 11 of these pairs.
TEXTS = [[6, 9, 0], [4, 2, 10], [10, 4, 6]]
PIXELS = "669907971e4a81e6c54b9f023a64f84a"
SIZES = [(32, 32), (24, 48), (48, 24)]


@pytest.fixture
def pairs(tmp_path):
    """7 wide, 3 tall and 2 square ones of 90 to 140 pixels."""
    rows = []
    for i, size in enumerate([(140, 70)] * 7 + [(70, 130)] * 3 + [(90, 90)] * 2):
        for side in (0, 1):
            pixels = np.random.default_rng(2 * i + side).integers(
                0, 256, (*size[::-1], 3), np.uint8
            )
            Image.fromarray(pixels).save(tmp_path / f"{i}_{side}.png")
        rows.append({"source": f"{i}_0.png", "target": f"{i}_1.png", "instruction": f"edit {i}"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_pairs(tmp_path / "pairs.jsonl")[0]


def same(one: Batch, other: Batch) -> bool:
    images = ((one.source, other.source), (one.target, other.target))
    return one.instruction == other.instruction and all(torch.equal(*both) for both in images)


def test_the_crops_of_former_runs(pairs):
    """Half-done runs of former versions go on with these."""
    found = [PairBatches(pairs, 3, 32, seed=5)(step) for step in (0, 3, 11)]
    texts = [[int(text.split()[1]) for text in batch.instruction] for batch in found]
    assert texts == TEXTS
    assert fingerprint.digest([t for b in found for t in (b.source, b.target)]) == PIXELS


def test_every_batch_is_of_one_resolution_and_an_epoch_shows_every_pair(pairs):
    batches = PairBatches(pairs, 2, SIZES, crop="cover")
    wanted = {(24, 48): set(range(7)), (48, 24): {7, 8, 9}, (32, 32): {10, 11}}
    for epoch in range(3):
        seen: dict[tuple[int, ...], list[int]] = {}
        for step in range(7 * epoch, 7 * (epoch + 1)):
            batch = batches(step)
            numbers = [int(text.split()[1]) for text in batch.instruction]
            seen.setdefault(tuple(batch.source.shape[2:]), []).extend(numbers)
        assert {size: set(numbers) for size, numbers in seen.items()} == wanted
        assert sorted(len(numbers) for numbers in seen.values()) == [2, 4, 8]  # filled up: 4 and 8
    once = [text for batch in batches.once() for text in batch.instruction]
    assert sorted(once) == sorted(pair.instruction for pair in pairs)
    assert len({tuple(batches(step).instruction) for step in range(7)}) == 7


def test_a_group_smaller_than_a_batch_fills_it_with_its_own(pairs):
    order = Order([[0, 1, 2, 3, 4, 5, 6], [7]], 4, seed=1)
    for step in range(9):
        group, members = order(step)
        assert len(members) == 4
        assert set(members) <= set(order.groups[group])


def test_the_nearest_proportions_then_the_largest_that_enlarges_nothing():
    sizes = [(64, 64), (32, 32), (48, 96), (96, 48)]
    assert [sizes[nearest(image, sizes)] for image in ((500, 490), (40, 40), (20, 21), (100, 230), (230, 90))] == [
        (64, 64), (32, 32), (32, 32), (48, 96), (96, 48)
    ]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy):
    """An image whose two channels count rows and columns says where a crop lies and at what scale."""
    rows = torch.arange(120, dtype=torch.uint8)[:, None].expand(120, 200)
    columns = torch.arange(200, dtype=torch.uint8)[None].expand(120, 200)
    image = torch.stack([rows, columns, rows])[None]
    scales, places, mirrored = [], [], 0
    for seed in range(40):
        found = cut(image, (30, 40), policy, torch.Generator().manual_seed(seed))[0] * 255
        assert found.shape == (3, 30, 40)
        scales.append(float(found[0, 20, 9] - found[0, 10, 9]) / 10)
        mirrored += bool(found[1, 9, 9] > found[1, 9, 10])
        places.append(round(float(found[1].min())))
    cover = 120 / 30
    wanted = {
        "random": (1, 1),
        "cover": (cover, cover),
        "center": (cover, cover),
        "zoom": (1, cover),
    }[policy]
    assert wanted[0] - 0.05 <= min(scales)
    assert max(scales) <= wanted[1] + 0.05
    if policy == "zoom":
        assert max(scales) - min(scales) > 2
    if policy == "center":
        assert mirrored == 0
        assert set(places) == {21}  # 160 of 200 columns, from the middle: averaged, 4 to a pixel
    else:
        assert 8 < mirrored < 32
        assert len(set(places)) > 10


def test_no_cache_no_worker_and_nothing_made_ahead_changes_a_batch(pairs, tmp_path):
    def made(**options) -> PairBatches:
        return PairBatches(pairs, 3, SIZES, 1, crop="zoom", **options)

    plain = made(workers=1)
    others = [made(workers=4), made(cache=tmp_path / "cache"), made(cache=tmp_path / "cache"),
              Ahead(made(workers=3), depth=3)]  # fmt: skip
    small = made(workers=2)
    small.images.most = 1  # nothing stays in memory
    for step in (0, 1, 2, 3, 9, 4):
        wanted = plain(step)
        assert all(same(wanted, other(step)) for other in [*others, small])
    assert small.images.bytes <= 1


def test_warm_data_is_not_decoded_again_by_this_run_nor_the_next(pairs, tmp_path, monkeypatch):
    read = []
    real = decoding.read_source
    monkeypatch.setattr(decoding, "read_source", lambda *a: read.append(a[0]) or real(*a))
    first = PairBatches(pairs, 4, 32, cache=tmp_path / "cache")
    batches = [first(step) for step in range(6)]
    assert len(read) == len(set(read)) == 24  # each image once in two epochs
    again = PairBatches(pairs, 4, 32, cache=tmp_path / "cache")
    assert all(same(batch, again(step)) for step, batch in enumerate(batches))
    assert len(read) == 24


def test_nobody_decodes_what_another_is_decoding(tmp_path, monkeypatch):
    begun, may_end, read = threading.Event(), threading.Event(), []

    def slow(source, side):
        read.append(source)
        begun.set()
        may_end.wait(20)
        return torch.zeros(3, 4, 4, dtype=torch.uint8)

    monkeypatch.setattr(decoding, "read_source", slow)
    images = Images(workers=4)
    futures = [images.future(tmp_path / "a") for _ in range(3)]
    assert begun.wait(20)
    may_end.set()
    assert {id(future.result()) for future in futures} == {id(futures[0].result())}
    assert len(read) == 1


def test_a_cache_knows_an_image_by_its_content_and_mends_itself(pairs, tmp_path):
    source, cache = pairs[0].source, tmp_path / "cache"
    first = Images(folder=cache)(source)
    (file,) = cache.rglob("*.safetensors")
    for damage in (b"", b"nothing of the kind", file.read_bytes()[:-5]):
        file.write_bytes(damage)
        assert torch.equal(Images(folder=cache)(source), first)
    assert len(list(cache.rglob("*.safetensors"))) == 1
    Image.new("RGB", (140, 70), (1, 2, 3)).save(source)
    assert not torch.equal(Images(folder=cache)(source), first)
    assert Images(folder=cache, max_side=35)(source).shape == (3, 18, 35)
    assert len(list(cache.rglob("*.safetensors"))) == 3


def test_a_cache_that_can_not_be_written_is_done_without(pairs, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    batches = PairBatches(pairs, 3, 32, cache=tmp_path / "cache")
    assert same(batches(0), PairBatches(pairs, 3, 32)(0))
    assert "decoded again each time" in caplog.text


def test_a_cache_that_another_thread_gives_up_meanwhile(pairs, tmp_path, monkeypatch):
    """Several decode at once, and the disk is full for one of them while another looks for its place."""
    images, real = Images(folder=tmp_path / "cache"), decoding.fingerprint.of_file

    def of_file(path):
        images.folder = None
        return real(path)

    monkeypatch.setattr(decoding.fingerprint, "of_file", of_file)
    assert images(pairs[0].source).shape == (3, 70, 140)


def test_an_image_that_goes_away_is_named_and_found_again(pairs):
    content = pairs[0].source.read_bytes()
    pairs[0].source.unlink()
    images = Images()
    with pytest.raises(HYWUError, match=r"0_0\.png: can't be read as an image"):
        images(pairs[0].source)
    pairs[0].source.write_bytes(content)
    assert images(pairs[0].source).shape == (3, 70, 140)


def test_bad_rows_keep_their_order_whoever_reads_them_first(pairs, tmp_path):
    rows = (tmp_path / "pairs.jsonl").read_text().splitlines()
    mixed = [line for row in rows for line in (row, '{"source": "gone.png"}')]
    (tmp_path / "pairs.jsonl").write_text("\n".join(mixed))
    found, bad = read_pairs(tmp_path / "pairs.jsonl")
    assert [pair.instruction for pair in found] == [pair.instruction for pair in pairs]
    assert [int(line.partition("row ")[2].partition(":")[0]) for line in bad] == list(
        range(2, 25, 2)
    )


def test_workers_have_a_few_under_way_and_stop_at_an_error():
    begun = []

    def work(i: int) -> int:
        begun.append(i)
        if i == 5:
            raise HYWUError("five")
        return i

    with pytest.raises(HYWUError, match="five"):
        list(in_workers(work, range(1000), 2))
    assert len(begun) < 30
    assert list(in_workers(work, range(5), 3)) == list(range(5))


@pytest.mark.parametrize(("given", "said"), [
    ({"size": []}, "crops' sizes"), ({"size": [(8, 8), (8, 8)]}, "give each once"), ({"size": 0}, "1 or more"),
    ({"size": 8, "crop": "middle"}, "one of random, cover, zoom, center"),
])  # fmt: skip
def test_what_can_not_be_cut_is_refused(pairs, given, said):
    with pytest.raises(HYWUError, match=said):
        PairBatches(pairs, 2, **given)


def test_the_command_trains_on_several_resolutions_and_says_what_a_run_was_begun_with(
    tmp_path, capsys
):
    def train(*more: str) -> int:
        return main(["train", "--out", str(tmp_path / "run"), "--data", str(FORMER / "pairs.jsonl"), "--steps", "2",
                     "--strategy", "shared", "--batch-size", "2", "--sample-every", "0", "--device", "cpu",
                     "--editor", str(FORMER / "editor.safetensors"), *more])  # fmt: skip

    several = ["--sizes", "32x32", "32x64", "--crop", "cover"]
    assert train(*several, "--cache", str(tmp_path / "cache"), "--workers", "2") == 0
    header = read_header(tmp_path / "run" / "state.safetensors")
    assert header["identity"]["sizes"] == [[32, 32], [32, 64]]
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    capsys.readouterr()
    assert train("--sizes", "32x32", "32x64") == 1
    assert "crop cover -> random" in capsys.readouterr().err
    assert train(*several) == 0  # neither cache nor workers are settings
    assert main(["train", "--out", str(tmp_path / "other"), "--cache", str(tmp_path / "c")]) == 1
    assert "--cache is about --data" in capsys.readouterr().err


def test_the_bench_of_large_images(capsys):
    assert (
        data_bench.main(
            [
                "--pixels",
                "0.3",
                "--pairs",
                "2",
                "--batch-size",
                "2",
                "--size",
                "32",
                "--rounds",
                "1",
            ]
        )
        == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert figures["width"] == 632
    assert all(figures[name]["wall_ratio"] > 0 for name in ("cold", "warm", "folder"))
