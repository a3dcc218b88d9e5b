"""Figures that others published, printed beside ours as theirs and never as ours."""

from __future__ import annotations

from ..tables import Table

THEIRS = "Published by the authors of HY-WU, with their judge and data; not measured here."
BY_PEOPLE = (
    "Published by the authors of HY-WU, from the votes of people on their data; not measured here."
)

WU_EVAL = Table(
    "Published: WU-Eval of HY-WU",
    ("dimension", "score"),
    (
        ("overall", "4.27"),
        ("content consistency", "4.13"),
        ("structural rationality", "4.30"),
        ("image quality", "3.98"),
    ),
    THEIRS + " Their prompt is not public, so scores by ours are not comparable with these.",
)

GSB = Table(
    "Published: human preference (GSB), win rate of HY-WU",
    ("against", "win rate of HY-WU"),
    (
        ("Step1X-Edit-v1.2", "78.4 %"),
        ("Qwen-Image-Edit-2511", "70.5 %"),
        ("LongCat-Image-Edit", "68.3 %"),
        ("FLUX.2 [Dev]", "67.8 %"),
        ("Seedream 4.5", "55.6 %"),
        ("GPT Image 1.5", "55.5 %"),
        ("Nano Banana 2", "47.6 %"),
        ("Nano Banana Pro", "46.2 %"),
    ),
    BY_PEOPLE,
)

GEDIT = Table(
    "Published: GEdit-Bench of HY-WU",
    ("claim", "figure"),
    (("rank among open models", "1"),),
    THEIRS,
)

IMGEDIT = Table(
    "Published: ImgEdit-Bench of HY-WU",
    ("claim", "figure"),
    (("total", "4.05"), ("rank", "2")),
    THEIRS,
)

BY_QUESTIONNAIRE = {"wu-eval": WU_EVAL, "gedit": GEDIT, "imgedit": IMGEDIT}
