"""HunyuanImage-3's token sequences and sizes against the official ones; what they refuse."""

from __future__ import annotations

import json
import time

import pytest
from hunyuan_golden import GOLDEN, pipeline
from PIL import Image

from hywu_core import HYWUError
from hywu_core.bases.hunyuan_image3 import vision
from hywu_core.bases.hunyuan_image3.images import (
    align,
    buckets,
    check_source,
    custom_size,
    parse_size,
    vae_image,
)  # fmt: skip
from hywu_core.bases.hunyuan_image3.sequence import (
    Prompt,
    SourceShape,
    check_length,
    cot_pieces,
)  # fmt: skip

METADATA = json.loads((GOLDEN / "templates.json").read_text("utf-8"))


def shape(width: int, height: int) -> SourceShape:
    image = Image.new("RGB", (width, height))
    _, size = vae_image(image, 256)
    patches = vision.patches_of(image, pipeline().prompts.processor)
    vae = (size.height // 16, size.width // 16)
    grid = (patches.height, patches.width)
    return SourceShape(size.ratio, vae, grid, len(patches.patches))


def built(case: dict) -> list:
    """The case's sequences: one, or both branches."""
    tokens = pipeline().prompts.tokens
    prompt = Prompt(
        case["prompt"],
        case["system_prompt"] or "",
        tuple(shape(*wh) for wh in case["images"]),
        case.get("cot_text", ""),
        case.get("drop_think", False),
    )
    if case["mode"] == "gen_text":
        task = case["bot_task"]
        if task == "img_ratio":
            return [prompt.ratio(tokens)]
        return [prompt.writing(tokens, None if task == "auto" else task)]
    size = parse_size(case["image_size"], 256, 16)
    marks = {name: case.get(name) is not None for name in ("guidance", "timestep_r")}
    branches = (False, True) if case["cfg_factor"] == 2 else (False,)
    return [prompt.image(tokens, size, 16, branch, **marks) for branch in branches]


@pytest.mark.parametrize("case", METADATA["cases"], ids=lambda case: case["name"])
def test_official_sequences(case):
    sequences = built(case)
    wanted = [[i for i, n in row for _ in range(n)] for row in case["tokens"]]
    assert [s.ids.tolist() for s in sequences] == wanted
    for row, s in enumerate(sequences):
        if "joint" in case:
            assert [[x.vae.start, x.stop] for x in s.sources] == case["joint"][row]
            assert [[x.vae.start, x.vae.stop] for x in s.sources] == case["vae"][row]
            assert [[x.vision.start, x.stop] for x in s.sources] == case["vit"][row]
            assert [x.timestep for x in s.sources] == (case["cond_timestep"] or [[], []])[row]
            found = [[x.vae.height, x.vision.height] for x in s.sources]
            given = [g["height"] for g in case["image_grids"][row] if g["type"] != "gen_image"]
            assert found == given
        if case["mode"] == "gen_image":
            target = s.target
            assert [[target.grid.start, target.grid.stop]] == case["gen"][row]
            assert [target.timestep] == case["gen_timestep"][row]
            for name in ("guidance", "timestep_r"):
                place = case.get(name)
                assert getattr(target, name) == (place[row][0] if place else None)


def test_special_ids_come_from_the_tokenizer():
    tokens = pipeline().prompts.tokens
    official = METADATA["special_ids"]
    assert tokens.ratios == tuple(official[f"<img_ratio_{i}>"] for i in range(37))
    assert tokens.ratios[33] != tokens.ratios[32] + 1
    assert (tokens.bos, tokens.eos, tokens.unconditional) == (268, 267, official["<cfg>"])


def test_what_tokens_see():
    """Segments of a sequence against the mask they stand for: causal, and full in each image."""
    case = next(c for c in METADATA["cases"] if c["name"] == "sample_edit_two")
    s = built(case)[0]
    full = [(37, 357), (362, 619), (681, 913)]
    rows = s.rows()
    assert [(a, b) for a, b, is_full in rows.segments if is_full] == full
    assert rows.start == 0
    assert rows.stop == len(s)
    later = s.rows(s.target.timestep, s.target.grid.stop)
    assert list(later.segments) == [(680, 681, False), (681, 913, True)]


def test_a_chain_of_thought_in_pieces():
    text = "before<think>a\nb</think>between<recaption>c</recaption>after"
    pieces = [p for p, _ in cot_pieces(text)]
    assert pieces == ["<think>", "a\nb", "</think>", "<recaption>", "c", "</recaption>"]
    assert [p for p, _ in cot_pieces(text, drop_think=True)] == pieces[3:]
    assert cot_pieces("") == []
    assert cot_pieces("<think>a</think>", drop_think=True) == []
    with pytest.raises(HYWUError, match="never closes it"):
        cot_pieces("<think>a<recaption>c</recaption>")


def test_sizes_a_user_names():
    assert parse_size("auto", 1024, 16) is None
    assert parse_size("1280x720", 1024, 16).ratio == 34
    assert parse_size("16:9", 1024, 16).ratio == 36
    custom = parse_size("1008 x 1040", 1024, 16)
    assert (custom.height, custom.width, custom.ratio) == (1008, 1040, 16)
    for index, (height, width) in enumerate(buckets(1024)):
        assert parse_size(f"{height}x{width}", 1024, 16).ratio == index
        assert parse_size(f"<img_ratio_{index}>", 1024, 16).height == height


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1000x1000", "the nearest is 1008x992|the nearest is 992x992"),
        ("16x1024", "16 times"),
        ("0x16", "multiples of 16"),
        ("<img_ratio_37>", "from 0 to 36"),
        ("large", "not understood"),
        ("0:1", "not understood"),
    ],
)
def test_sizes_that_are_refused(text, said):
    with pytest.raises(HYWUError, match=said):
        parse_size(text, 1024, 16)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000), (15, 15)])
def test_sources_that_are_refused(size):
    with pytest.raises(HYWUError, match=f"{size[0]} x {size[1]} pixels"):
        check_source(Image.new("RGB", size))


def test_a_sequence_over_the_limit_is_refused_with_both_numbers():
    case = next(c for c in METADATA["cases"] if c["name"] == "sample_edit_two")
    s = built(case)[0]
    with pytest.raises(HYWUError, match=f"has {len(s)} tokens, the checkpoint reads 900"):
        check_length(s, 900)
    check_length(s, len(s))


def test_outputs_take_the_aspect_of_their_source():
    square, source = Image.new("RGB", (1024, 1024)), Image.new("RGB", (500, 490))
    made = align(square, [source], 1024)
    assert made.height / made.width == pytest.approx(490 / 500, abs=2e-3)
    assert made.height * made.width == pytest.approx(1024**2, rel=2e-3)
    # another bucket, and an aspect that is the same already
    assert align(square, [Image.new("RGB", (800, 500))], 1024) is square
    assert align(square, [Image.new("RGB", (501, 500))], 1024) is square


@pytest.mark.parametrize(
    ("source", "base", "made"),
    [
        # 1024 * sqrt(490 / 500) = 1013.71 and 1024 / sqrt(490 / 500) = 1034.40
        ((500, 490), 1024, (1034, 1014)),
        ((490, 500), 1024, (1014, 1034)),
        # 253.43 and 258.60
        ((500, 490), 256, (259, 253)),
    ],
)
def test_an_aligned_output_is_rounded_to_whole_pixels(source, base, made):
    """Each side to the nearest pixel: not cut off, and not to the steps of a bucket."""
    square, sources = Image.new("RGB", (base, base)), [(800, 500), source, source[::-1]]
    # the first source has another bucket; of those that share it the first counts
    assert align(square, [Image.new("RGB", size) for size in sources], base).size == made


def test_custom_sizes_far_from_a_bucket():
    size = custom_size(64, 1024, 1024, 16)
    assert size.ratio == 0


def test_a_chain_of_thought_of_many_open_tags_is_read_at_once():
    started = time.process_time()
    with pytest.raises(HYWUError, match="opens <think> and never closes it"):
        cot_pieces("<think>" * 200_000)
    assert cot_pieces("<think>" * 200_000 + "</think>")[0] == ("<think>", False)
    assert time.process_time() - started < 2.0
