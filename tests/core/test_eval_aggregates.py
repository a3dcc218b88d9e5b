"""Parsing and aggregation against an independent recomputation, to the last printed digit.

The recomputation shares no code with the package: exact decimals and fractions, plain loops.
"""

from __future__ import annotations

import csv
import json
import random
import re
from decimal import ROUND_HALF_EVEN, Decimal, getcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from hywu_core.errors import HYWUError
from hywu_core.evaluation import gedit, imgedit, wu_eval
from hywu_core.evaluation.scores import parse
from hywu_core.evaluation.statistics import bootstrap_mean, bootstrap_mean_of_means
from hywu_core.evaluation.tables import three

FILES = 1000


def decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def rounded(value: Decimal, digits: int) -> str:
    return str(value.quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_EVEN))


# -- GEdit-Bench ---------------------------------------------------------------------------------

GARBAGE = (
    "", "I cannot rate this.", '{"score": "high"}', '{"score": [11, 3]}', "{broken", "{}", "9" * 5000,
)  # fmt: skip


def random_answer(rng: random.Random) -> tuple[str, int | None]:
    """An answer in one of the accepted shapes with its minimum, or one that can't be parsed."""
    if rng.random() < 0.08:
        return rng.choice(GARBAGE), None
    pair = [rng.randint(0, 10), rng.randint(0, 10)]
    body = json.dumps({"score": pair, "reasoning": "because {of} this"})
    shape = rng.randrange(5)
    if shape == 0:
        return f"```json\n{body}\n```", min(pair)
    if shape == 1:
        return f"||V^=^V||{body}||V^=^V||", min(pair)
    if shape == 2:
        return f'{{"score": {pair[0]}, "reasoning": "one"}}', pair[0]
    if shape == 3:
        return json.dumps(pair), min(pair)
    return f"My rating:\n{body}", min(pair)


def random_gedit(rng: random.Random) -> list[dict]:
    rows = []
    for task in rng.sample(gedit.TASKS, rng.randint(1, len(gedit.TASKS))):
        for number in range(rng.randint(1, 9)):
            semantics, quality = random_answer(rng), random_answer(rng)
            rows.append(
                {
                    "task": task,
                    "key": f"{task}{number}",
                    "language": rng.choice(["en", "cn"]),
                    "intersection": rng.random() < 0.7,
                    "answers": {"semantics": semantics[0], "quality": quality[0]},
                    "expected": (semantics[1], quality[1]),
                    "missing": rng.random() < 0.05,
                }
            )
    return rows


def double_mean(values: list[float]) -> float:
    """Mean in doubles, added in the order of numpy's reduction (the authors use numpy), written out."""
    count, whole = len(values), len(values) - len(values) % 8
    if count < 8:
        total = 0.0
        for value in values:
            total += value
        return total / count
    r = values[:8]
    for start in range(8, whole, 8):
        r = [r[i] + values[start + i] for i in range(8)]
    total = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]))
    for value in values[whole:]:
        total += value
    return total / count


def check_average(
    printed: list[str], rows: list[dict], language: str | None, intersection: bool
) -> None:
    """Mean of task means of (semantics, quality, overall), recomputed twice.

    In the authors' double arithmetic: the same digits, always. In 60-digit decimals: the same
    digits, except where the exact value is a tie between two printed ones.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        if row["missing"] or None in row["expected"]:
            continue
        if language not in (None, row["language"]) or (intersection and not row["intersection"]):
            continue
        groups.setdefault(row["task"], []).append(row["expected"])
    if not groups:
        assert printed == ["–"] * 3
        return
    ordered = [groups[task] for task in gedit.TASKS if task in groups]
    functions = (lambda s, q: s, lambda s, q: q, lambda s, q: Decimal(s * q).sqrt())
    for text, function in zip(printed, functions, strict=True):
        means = [double_mean([float(function(s, q)) for s, q in group]) for group in ordered]
        assert text == f"{double_mean(means):.3f}"
        exact = sum(
            sum(Decimal(function(Decimal(s), Decimal(q))) for s, q in group) / len(group)
            for group in ordered
        ) / len(ordered)
        tie = abs(exact * 1000 % 1 - Decimal("0.5")) < Decimal("1e-9")
        assert tie or text == rounded(exact, 3)


def test_gedit_agrees_on_random_files(tmp_path: Path):
    getcontext().prec = 60
    rng = random.Random(7)
    unparsable = missing = 0
    for number in range(FILES):
        rows = random_gedit(rng)
        ours = []
        for row in rows:
            values = parse("gedit", row["answers"])
            assert (values is None) == (None in row["expected"]), row["answers"]
            unparsable += values is None
            missing += row["missing"]
            if values is None or row["missing"]:
                continue
            ours.append(
                gedit.Row(
                    row["task"],
                    f"{row['key']}_SRCIMG.png",
                    f"{row['key']}.png",
                    'say "a, b"\nand 你好',
                    values["semantics"],
                    values["quality"],
                    row["intersection"],
                    row["language"],
                )
            )
        if number % 10 == 0:  # through the authors' files and back
            back = []
            for task in dict.fromkeys(row.task for row in ours):
                path = tmp_path / gedit.csv_name("m", task)
                gedit.write_csv(path, [row for row in ours if row.task == task])
                back += gedit.read_csv(path, task)
            assert back == ours
        for language in (None, "en", "cn"):
            for intersection in (False, True):
                average = gedit.aggregate(ours, language, intersection).average
                check_average([three(v) for v in average], rows, language, intersection)
    assert unparsable > 1000
    assert missing > 500


def test_gedit_csv_is_the_authors_layout(tmp_path: Path):
    row = gedit.Row("ps_human", "s.png", "e.png", "老照片", 7, 5, True, "cn")
    gedit.write_csv(tmp_path / "x.csv", [row])
    with (tmp_path / "x.csv").open(encoding="utf-8", newline="") as file:
        header, line = list(csv.reader(file))
    assert header == [
        "source_image",
        "edited_image",
        "instruction",
        "sementics_score",
        "quality_score",
        "intersection_exist",
        "instruction_language",
    ]
    assert line == ["s.png", "e.png", "老照片", "7", "5", "True", "cn"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # By hand: area 512*512 at the ratio, sides rounded to 32, then one step of the width
        ((512, 512), (512, 512)),  # exactly the area: no step
        ((1024, 768), (608, 448)),  # 591.2 x 443.4 -> 576 x 448, below the area -> 608
        ((768, 1024), (480, 576)),  # 443.4 x 591.2 -> 448 x 576, below the area -> 480
        ((1920, 1080), (704, 384)),  # 682.7 x 384 -> 672 x 384, below the area -> 704
        ((640, 480), (608, 448)),
        ((4000, 10), (10208, 32)),  # 10240 x 25.6 -> 10240 x 32, above the area -> 10208
    ],
)
def test_gedit_reference_size(size, expected):
    assert gedit.reference_size(*size) == expected


# -- ImgEdit-Bench -------------------------------------------------------------------------------


NO_SCORES = ("", "No.", "Score: five", "Compliance:5", "A: 3: 4", "A: 3.5", "A: " + "9" * 5000)


def random_imgedit(rng: random.Random) -> tuple[str, list[int]]:
    if rng.random() < 0.08:
        return rng.choice(NO_SCORES), []
    count = rng.choice([3, 3, 3, 3, 2, 1])
    scores = [rng.randint(1, 5) for _ in range(count)]
    lines = ["Brief reasoning: the sky, 3 clouds"]
    lines += [f"  Dimension {i}: {score} " for i, score in enumerate(scores)]
    return "\n".join(lines), scores


def half_even(value: Fraction) -> Fraction:
    """Two decimals of the nearest double, which is what Python's round sees."""
    exact = Decimal(float(value))
    return Fraction(exact.quantize(Decimal("0.01"), rounding=ROUND_HALF_EVEN))


def test_imgedit_agrees_on_random_files():
    getcontext().prec = 60
    rng = random.Random(11)
    unparsable = 0
    for _ in range(FILES):
        types, answers, expected = {}, {}, {}
        for number in range(rng.randint(1, 60)):
            key = str(number)
            types[key] = rng.choice(imgedit.EDIT_TYPES)
            answer, scores = random_imgedit(rng)
            if rng.random() < 0.05:
                continue  # missing
            answers[key] = answer
            if scores:
                expected[key] = half_even(Fraction(sum(scores), len(scores)))
            else:
                unparsable += 1
        ours = {k: s for k, a in answers.items() if (s := imgedit.item_score(a)) is not None}
        assert {k: f"{v:.2f}" for k, v in ours.items()} == {
            k: rounded(decimal(v), 2) for k, v in expected.items()
        }
        groups: dict[str, list[float]] = {}
        for key, value in expected.items():
            groups.setdefault(types[key], []).append(float(value))
        by_type = {}
        for name, values in groups.items():
            total = 0.0
            for value in values:  # the authors add floats in the order of the file
                total += value
            by_type[name] = half_even(Fraction(total / len(values)))
        found = imgedit.type_scores(ours, types)
        assert {k: f"{v:.2f}" for k, v in found.items()} == {
            k: rounded(decimal(v), 2) for k, v in by_type.items()
        }
        total = imgedit.total_score(found)
        if not by_type:
            assert total is None
            continue
        added = 0.0
        for value in by_type.values():
            added += float(value)
        assert f"{total:.2f}" == rounded(decimal(half_even(Fraction(added / len(by_type)))), 2)
    assert unparsable > 1000


def test_imgedit_counts_only_integers_after_the_only_colon():
    answer = "Brief reasoning: a: 4\nPrompt Compliance: 5\nSeamless: 4 of 5\nFidelity: ²\nLast: 2"
    assert imgedit.integers(answer) == [5, 2]
    assert imgedit.item_score("A: 1\nB: 2\nC: 2") == 1.67


# -- WU-Eval -------------------------------------------------------------------------------------


def random_wu(rng: random.Random) -> tuple[str, list[int] | None]:
    scores = [rng.randint(1, 5) for _ in range(4)]
    answer = dict(zip(wu_eval.DIMENSIONS, scores, strict=True))
    body = json.dumps({**answer, "reason": "x"})
    broken = [
        "",
        body + " thanks",
        body.replace('"reason": "x"', '"other": 3'),
        json.dumps({**answer, "image_quality": 6}),
        json.dumps({**answer, "image_quality": True}),
        json.dumps({**answer, "image_quality": "5"}),
        json.dumps({k: v for k, v in answer.items() if k != "image_quality"}),
        body[:-1] + ', "image_quality": 2}',
        f"[{body}]",
    ]
    if rng.random() < 0.15:
        return rng.choice(broken), None
    return rng.choice([body, f"```json\n{body}\n```", f"  {json.dumps(answer)}\n"]), scores


def test_wu_eval_agrees_on_random_files():
    getcontext().prec = 60
    rng = random.Random(13)
    unparsable = 0
    for _ in range(FILES):
        rows, expected, photographs = [], [], []
        for number in range(rng.randint(1, 30)):
            answer, scores = random_wu(rng)
            if rng.random() < 0.05:
                continue
            parsed = parse("wu-eval", {"wu-eval": answer})
            assert (parsed is None) == (scores is None), answer
            if scores is None:
                unparsable += 1
                continue
            rows.append(parsed)
            expected.append([*map(Fraction, scores), Fraction(sum(scores), 4)])
            photographs.append(str(number % 4))
        found = wu_eval.estimates(rows, photographs, resamples=50)
        for i, name in enumerate((*wu_eval.DIMENSIONS, "overall")):
            if not expected:
                assert found[name].count == 0
                continue
            mean = Decimal(float(sum(row[i] for row in expected) / len(expected)))
            assert found[name].count == len(expected)
            assert f"{found[name].mean:.2f}" == rounded(mean, 2)
    assert unparsable > 1000


def test_bootstrap_interval_covers_the_true_mean():
    rng = np.random.default_rng(3)
    trials = 300
    hits = 0
    for trial in range(trials):
        estimate = bootstrap_mean(rng.normal(3, 1, 60).tolist(), resamples=400, seed=trial)
        hits += estimate.low <= 3 <= estimate.high
    assert 0.90 <= hits / trials <= 0.98


def test_clusters_widen_the_interval_as_they_must():
    rng = np.random.default_rng(5)
    photographs = np.repeat(np.arange(20), 10)
    values = rng.normal(0, 1, 20)[photographs] + rng.normal(0, 0.1, 200)
    loose = bootstrap_mean(values.tolist())
    honest = bootstrap_mean(values.tolist(), photographs.tolist())
    assert honest.mean == pytest.approx(loose.mean)
    # Ten items of one photograph say little more than one: about sqrt(10) wider
    assert 2.2 < (honest.high - honest.low) / (loose.high - loose.low) < 4.2


def test_no_interval_from_one_photograph():
    assert str(bootstrap_mean([4.0, 2.0], ["a", "a"])) == "3.00"
    assert str(bootstrap_mean([])) == "–"
    assert str(bootstrap_mean_of_means([[1.0], [2.0]])) == "1.50"
    assert re.fullmatch(r"3\.00 \[2\.\d\d, 3\.\d\d\]", str(bootstrap_mean([2.5, 3.0, 3.5])))


def test_foreign_csv_with_missing_columns_is_named(tmp_path: Path):
    path = tmp_path / "m_ps_human_all_vie_score.csv"
    path.write_text("source_image,edited_image\na,b\n")
    with pytest.raises(HYWUError, match=r"m_ps_human_all_vie_score.csv: lacks .*sementics_score"):
        gedit.read_csv(path, "ps_human")
    path.write_text(",".join(gedit.COLUMNS) + "\na,b,c,high,3,True,en\n")
    with pytest.raises(HYWUError, match="line 2 has no two scores"):
        gedit.read_csv(path, "ps_human")
