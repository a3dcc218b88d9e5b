"""The experiment's figures from rows: means, pairs, joined Single LoRAs, and the page."""

from __future__ import annotations

import dataclasses

import pytest

from hywu_core.experiments.conflict.analysis import Summary
from hywu_core.experiments.conflict.plan import ConflictPlan
from hywu_core.experiments.conflict.report import render
from hywu_core.experiments.tasks import CONFLICT

TASKS = ("blur", "deblur")
IMAGES = ("one", "two", "three")
OPPOSITES = {"blur": "deblur", "deblur": "blur"}


def rows(level: dict[str, float], held_out: float = 0.0):
    """level: task -> dB; images differ by a constant that pairing takes out."""
    return [
        {
            "image": image,
            "crop": crop,
            "task": task,
            "phrasing": phrasing,
            "psnr": level[task] + 3 * IMAGES.index(image) + (held_out if phrasing != "seen" else 0),
            "ssim": 0.5,
        }
        for image in IMAGES
        for crop in range(2)
        for task in TASKS
        for phrasing in ("seen", "held_out")
    ]


@pytest.fixture
def plan() -> ConflictPlan:
    return dataclasses.replace(ConflictPlan(), tasks=TASKS, main_rank=2, ranks=(2,), seeds=1)


@pytest.fixture
def results():
    found = {
        "hywu_r2": rows({"blur": 30, "deblur": 28}, held_out=-0.5),
        "shared_r2": rows({"blur": 26, "deblur": 25}),
        "single_blur_r2": rows({"blur": 31, "deblur": 15}),
        "single_deblur_r2": rows({"blur": 14, "deblur": 29}),
    }
    flat = (
        "shared_large",
        "sft",
        "base",
        "unchanged",
        "hywu_shuffled",
        "hywu_mean",
        "hywu_task_mean",
    )
    return found | {name: rows({"blur": 20, "deblur": 21}) for name in flat}


def test_singles_are_joined_by_task(plan, results):
    summary = Summary(results, plan, OPPOSITES)
    assert summary.mean("single", "blur").mean == pytest.approx(34)
    assert summary.mean("single", "deblur").mean == pytest.approx(32)
    assert summary.mean("single_opposite", "blur").mean == pytest.approx(17)
    assert summary.mean("single_opposite", "deblur").mean == pytest.approx(18)


def test_pairs_take_out_what_images_have_in_common(plan, results):
    difference = Summary(results, plan, OPPOSITES).difference("hywu_r2", "shared_r2")
    assert difference.mean == pytest.approx(3.5)
    assert difference.high - difference.low == pytest.approx(0, abs=1e-9)
    mean = Summary(results, plan, OPPOSITES).mean("hywu_r2")
    assert mean.high - mean.low > 1


def test_held_out_phrasings_and_chosen_images(plan, results):
    summary = Summary(results, plan, OPPOSITES)
    assert summary.phrasing_loss("hywu_r2").mean == pytest.approx(-0.5)
    assert Summary(results, plan, OPPOSITES, ["one"]).mean("hywu_r2").mean == pytest.approx(29)


def test_the_page_says_what_the_figures_say(plan, results):
    summary = Summary(results, plan, OPPOSITES).to_json()
    figures = {
        "plan": plan.to_json(),
        "missing": ["sft"],
        "photographs": ["one"],
        "all_images": summary,
        "photographs_only": Summary(results, plan, OPPOSITES, ["one"]).to_json(),
        "held_out_phrasings": {task: CONFLICT[task].held_out for task in TASKS},
        "learning": {"steps": [50, 100], "loss": {"HY-WU": [-0.1, -0.2]}},
        "gradients": {"mean_of_all_pairs": -0.2, "mean_of_opposite_tasks": -0.4},
        "trained": {
            "hywu_r2": {
                "lr": 4e-4, "steps": 5, "examples": 120, "trained_values": 1000, "seconds": 3,
            }
        },
    }  # fmt: skip
    page = render(figures)
    assert "Not done yet:** sft" in page
    assert "| Shared | 3.50 [3.50, 3.50] | 3.50 [3.50, 3.50] |" in page
    assert "| blur | -1.00 [-1.00, -1.00] | 4.00 [4.00, 4.00] |" in page
    for text in CONFLICT["blur"].held_out:
        assert text in page


def test_what_is_not_done_is_left_out(plan, results):
    del results["sft"], results["hywu_task_mean"]
    figures = Summary(results, plan, OPPOSITES).to_json()
    assert list(figures["differences"]) == ["Shared", "Single", "Shared large"]
    assert "SFT" not in figures["psnr"]
    assert "hywu_task_mean" not in figures["controls"]
