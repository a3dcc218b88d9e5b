"""Parsing and aggregation against an independent recomputation, to the last printed digit.

Each of the random files is a judge's, as it lies on disk: answers in many forms, garbage, refusals,
failures, questions not asked, items without an image, both languages. What is compared is what is
printed. The recomputation shares no code with the package: exact decimals and fractions, plain loops.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_EVEN, Decimal, getcontext
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hywu_core.errors import HYWUError
from hywu_core.evaluation import statistics
from hywu_core.evaluation.benchmarks import BENCHMARKS, imgedit, load_questionnaire, wu_eval
from hywu_core.evaluation.benchmarks.gedit import reference_size
from hywu_core.evaluation.benchmarks.gedit import scoring as gedit
from hywu_core.evaluation.items import Item, ItemList
from hywu_core.evaluation.results import JUDGEMENTS, Results
from hywu_core.evaluation.run import ImageHashes
from hywu_core.evaluation.scores import MethodScores, score_results, write_scores
from hywu_core.evaluation.statistics import SEED, bootstrap_mean, bootstrap_mean_of_means
from hywu_core.evaluation.store import FORMAT, StoreName

FILES = 1000


class Benchmark:
    """Items with and without results, from which each random file takes some.

    name: gedit, imgedit or wu-eval; answer: a random answer and what it says, None for garbage.
    """

    def __init__(
        self, root: Path, name: str, tasks: Sequence[str], answer: Callable[[random.Random], tuple]
    ) -> None:
        self.answer, self.rng = answer, random.Random(name)
        self.questionnaire = load_questionnaire(name)
        self.results = Results(root / "mine", BENCHMARKS["folder" if name == "wu-eval" else name])
        self.hashes = ImageHashes(self.results)
        self.name = StoreName("judge", "1", name, self.questionnaire.version)
        sources = [root / f"{number}.png" for number in range(4)]
        for source in sources:
            source.write_bytes(source.name.encode())  # nobody looks at the pixels
        self.lines: dict[str, list[dict[str, str]]] = {}
        self.missing: set[str] = set()
        self.items: dict[str, list[Item]] = {task: [] for task in tasks}
        for task in tasks:
            for number in range(20):
                language = "en" if name == "imgedit" else self.rng.choice(["en", "cn"])
                fields = {"language": language, "intersection": self.rng.random() < 0.7}
                source = self.rng.choice(sources)
                self._add(Item(f"{task}{number}", task, 'say "a, b"\nand 你好', source, **fields))

    def _add(self, item: Item) -> None:
        image = self.results.image(item)
        if self.rng.random() < 0.05:
            self.missing.add(item.id)
        else:
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(item.key.encode())
        self.items[item.task].append(item)
        key = {"item": item.id, "pictures": self.hashes.of(item)}
        self.lines[item.id] = [
            {**key, "question": question.name, "prompt": question.digest}
            for question in self.questionnaire.questions(item)
        ]

    def random_file(self) -> tuple[MethodScores, dict[str, list], Counter[str]]:
        """Write a file and score it. Also: what each item's answers say, and how many came to what."""
        chosen = []
        for task in self.rng.sample(list(self.items), self.rng.randint(1, len(self.items))):
            chosen += self.rng.sample(self.items[task], self.rng.choice([1, 1, 2, 3, 9]))
        rows, said, outcomes = [], {}, Counter()
        for item in chosen:
            found = [self._ask(line, rows) for line in self.lines[item.id]]
            statuses = [status for status, _ in found]
            if item.id in self.missing:
                outcome = "missing"
            elif unscored := [s for s in ("failed", "refused", "unjudged") if s in statuses]:
                outcome = unscored[0]
            elif None in (values := [value for _, value in found]):
                outcome = "unparsable"
            else:
                outcome, said[item.id] = "scored", values
            outcomes[outcome] += 1
        self.rng.shuffle(rows)
        rows = [row for again in rows for row in again]
        path = self.results.root / JUDGEMENTS / self.name.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, **vars(self.name)}
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (header, *rows))
        path.write_text(text, encoding="utf-8")
        items = ItemList(self.results.benchmark.name, tuple(chosen))
        scores = score_results(self.results, items, self.questionnaire, self.name)
        assert scores.outcomes() == {**dict.fromkeys(scores.outcomes(), 0), **outcomes}
        return scores, said, outcomes

    def check_tables(self, rows: Callable[[Sequence[Item], dict], list], read: Callable) -> None:
        """Tables of random files have these rows, also those of the authors' files that `read` reads."""
        getcontext().prec = 60
        seen: Counter[str] = Counter()
        for number in range(FILES):
            scores, said, outcomes = self.random_file()
            seen += outcomes
            table = scores.questionnaire.table(scores)
            assert list(table.rows) == rows(scores.items.items, said)
            if number % 10 == 0 and said:
                assert read(write_scores(scores), scores.items).rows == table.rows
        assert len(seen) == 6
        assert min(seen.values()) > 100

    def _ask(self, line: dict[str, str], rows: list[list[dict[str, str]]]) -> tuple[str, object]:
        """Add a question's lines; how it ended and what the answer says."""
        text, value = self.answer(self.rng)
        status = self.rng.choices(["answered", "refused", "failed", "unjudged"], [90, 3, 3, 3])[0]
        if status == "unjudged":
            return status, None
        rows.append([{**line, "status": status, "text": text}])
        if self.rng.random() < 0.05:  # it had failed before: the last line counts
            rows[-1].insert(0, {**line, "status": "failed", "text": "HTTP 503"})
        return status, value


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


def average(groups: list[list[tuple[int, int]]]) -> list[str]:
    """Mean of the groups' means of (semantics, quality, overall), recomputed twice.

    In the authors' double arithmetic: these digits are returned. In 60-digit decimals: the same
    digits, except where the exact value is a tie between two printed ones.
    """
    printed = []
    for function in (lambda s, q: s, lambda s, q: q, lambda s, q: Decimal(s * q).sqrt()):
        if not groups:
            printed.append("–")
            continue
        means = [double_mean([float(function(s, q)) for s, q in group]) for group in groups]
        printed.append(f"{double_mean(means):.3f}")
        exact = sum(
            sum(Decimal(function(Decimal(s), Decimal(q))) for s, q in group) / len(group)
            for group in groups
        ) / len(groups)
        tie = abs(exact * 1000 % 1 - Decimal("0.5")) < Decimal("1e-9")
        assert tie or printed[-1] == rounded(exact, 3)
    return printed


def gedit_rows(items: Sequence[Item], said: dict[str, list]) -> list[tuple[str, ...]]:
    """The rows that GEdit-Bench's table must print."""
    scored = [item for item in items if item.id in said]

    def groups(language: str, intersection: bool) -> dict[str, list]:
        chosen = [
            item
            for item in scored
            if language in ("", item.language) and (item.intersection or not intersection)
        ]
        tasks = [task for task in gedit.TASKS if any(item.task == task for item in chosen)]
        return {t: [said[item.id] for item in chosen if item.task == t] for t in tasks}

    rows = [(task, str(len(g)), *average([g])) for task, g in groups("", False).items()]
    for language in ("", *sorted({item.language for item in scored})):
        for intersection in (False, True):
            found = groups(language, intersection)
            title = f"Average {language}".strip() + (", intersection" if intersection else "")
            count = sum(map(len, found.values()))
            rows.append((title, str(count), *average(list(found.values()))))
    return rows


def test_gedit_agrees_on_random_files(tmp_path: Path):
    benchmark = Benchmark(tmp_path, "gedit", gedit.TASKS, random_answer)
    benchmark.check_tables(gedit_rows, lambda folder, items: gedit.their_tables(folder)[0])


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
    assert reference_size(*size) == expected


# -- ImgEdit-Bench -------------------------------------------------------------------------------


NO_SCORES = ("", "No.", "Score: five", "Compliance:5", "A: 3: 4", "A: 3.5", "A: " + "9" * 5000)


def random_imgedit(rng: random.Random) -> tuple[str, list[int] | None]:
    if rng.random() < 0.08:
        return rng.choice(NO_SCORES), None
    count = rng.choice([3, 3, 3, 3, 2, 1])
    scores = [rng.randint(1, 5) for _ in range(count)]
    lines = ["Brief reasoning: the sky, 3 clouds"]
    lines += [f"  Dimension {i}: {score} " for i, score in enumerate(scores)]
    return "\n".join(lines), scores


def half_even(value: Fraction) -> Fraction:
    """Two decimals of the nearest double, which is what Python's round sees."""
    exact = Decimal(float(value))
    return Fraction(exact.quantize(Decimal("0.01"), rounding=ROUND_HALF_EVEN))


def imgedit_rows(items: Sequence[Item], said: dict[str, list]) -> list[tuple[str, ...]]:
    """The rows that ImgEdit-Bench's table must print."""
    groups: dict[str, list[float]] = {}
    for item in items:
        if item.id in said:
            (scores,) = said[item.id]
            value = float(half_even(Fraction(sum(scores), len(scores))))
            groups.setdefault(item.task, []).append(value)
    means = {}
    for name, values in groups.items():
        total = 0.0
        for value in values:  # the authors add floats in the order of the file
            total += value
        means[name] = half_even(Fraction(total / len(values)))
    rows = [
        (name, str(len(groups[name])), rounded(decimal(means[name]), 2))
        for name in imgedit.EDIT_TYPES
        if name in groups
    ]
    added = 0.0
    for value in means.values():
        added += float(value)
    whole = rounded(decimal(half_even(Fraction(added / len(means)))), 2) if means else "–"
    return [*rows, ("Total", str(sum(map(len, groups.values()))), whole)]


def test_imgedit_agrees_on_random_files(tmp_path: Path):
    benchmark = Benchmark(tmp_path, "imgedit", imgedit.EDIT_TYPES, random_imgedit)
    benchmark.check_tables(
        imgedit_rows, lambda folder, items: imgedit.their_table(folder / "result.json", items)
    )


def test_imgedit_counts_only_integers_after_the_only_colon():
    answer = "Brief reasoning: a: 4\nPrompt Compliance: 5\nSeamless: 4 of 5\nFidelity: ²\nLast: 2"
    assert imgedit.integers(answer) == [5, 2]
    assert imgedit.item_score("A: 1\nB: 2\nC: 2") == 1.67


#: Their mean is 4.335. In doubles added from left to right it is a little more, added exactly (as `sum`
#: nearly does since Python 3.12) a little less: 4.34 on the authors' Python 3.10, else 4.33.
BETWEEN = (3.67, 4.33, 5, 4.67, 3.67, 4.67)


def test_sums_are_the_same_on_every_python(monkeypatch):
    for module in (imgedit, wu_eval, statistics):  # as if `sum` were another Python's
        monkeypatch.setattr(module, "sum", math.fsum, raising=False)
    keys = dict(zip("abcdef", BETWEEN, strict=True))
    assert imgedit.type_scores(keys, dict.fromkeys(keys, "add")) == {"add": 4.34}
    assert imgedit.total_score(keys) == 4.34
    answer = dict(zip(wu_eval.DIMENSIONS, (4.824, 4.791, 1.226, 1.339), strict=True))
    assert wu_eval.overall(answer) == 3.0450000000000004
    votes = ("bgbgg", "sgbggg", "ggbsbs", "gsb")
    assert statistics.krippendorff_alpha(votes) == -0.10322580645161272


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


RESAMPLES = 20


def interval(values: list[int], clusters: list[Path], unit: int) -> tuple[float, float] | None:
    """Percentile bootstrap over clusters in whole numbers; the same draws, nothing else in common."""
    sums, counts = Counter(), Counter()
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value
        counts[cluster] += 1
    if len(counts) < 2:
        return None
    pairs = [(sums[cluster], counts[cluster]) for cluster in counts]
    drawn = np.random.default_rng(SEED).integers(0, len(pairs), (RESAMPLES, len(pairs))).tolist()
    means = sorted(
        sum(pairs[i][0] for i in row) / (unit * sum(pairs[i][1] for i in row)) for row in drawn
    )
    ends = []
    for share in (0.025, 0.975):
        place = share * (RESAMPLES - 1)
        low = int(place)
        ends.append(means[low] + (place - low) * (means[low + 1] - means[low]))
    return ends[0], ends[1]


def check_cell(cell: str, values: list[int], clusters: list[Path], unit: int) -> None:
    """A mean of values / unit with its interval, as printed."""
    if not values:
        assert cell == "–"
        return
    mean = Decimal(float(Fraction(sum(values), unit * len(values))))
    text, _, ends = cell.partition(" ")
    assert text == rounded(mean, 2)
    expected = interval(values, clusters, unit)
    assert bool(ends) == (expected is not None)
    for printed, exact in zip(ends.strip("[]").split(", "), expected or (), strict=bool(expected)):
        assert abs(float(printed) - exact) < 0.005 + 1e-9


def test_wu_eval_agrees_on_random_files(tmp_path: Path, monkeypatch):
    getcontext().prec = 60
    fewer = partial(bootstrap_mean, resamples=RESAMPLES)  # or it would take an hour
    monkeypatch.setattr(wu_eval, "bootstrap_mean", fewer)
    benchmark = Benchmark(tmp_path, "wu-eval", ("blur", "add", "老"), random_wu)
    seen: Counter[str] = Counter()
    for _ in range(FILES):
        scores, said, outcomes = benchmark.random_file()
        seen += outcomes
        items = scores.items.items
        rows = scores.questionnaire.table(scores).rows
        assert [row[0] for row in rows] == ["all tasks", *dict.fromkeys(i.task for i in items)]
        for task, count, *cells in rows:
            chosen = [i for i in items if i.id in said and task in ("all tasks", i.task)]
            assert count == str(len(chosen))
            clusters = [item.source for item in chosen]
            answers = [said[item.id][0] for item in chosen]
            for number, cell in enumerate(cells[:-1]):
                check_cell(cell, [answer[number] for answer in answers], clusters, 1)
            check_cell(cells[-1], [sum(answer) for answer in answers], clusters, 4)
    assert len(seen) == 6
    assert min(seen.values()) > 100


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
