"""Arguments that several steps have, and what is made of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import HYWUError
from ...evaluation.benchmarks import BENCHMARKS, QUESTIONNAIRES, find_benchmark
from ...evaluation.benchmarks.base import SAMPLES
from ...evaluation.options import Kind, Option
from ...evaluation.scores import MethodScores, open_scores

#: Exit code of a step that finished, but not for every item.
INCOMPLETE = 3


def add_data(parser: argparse.ArgumentParser, required: bool) -> None:
    """--benchmark and --data."""
    optional = "" if required else " (default: what the results were made for)"
    parser.add_argument(
        "--benchmark", choices=tuple(BENCHMARKS), required=required, help=f"whose items{optional}"
    )
    parser.add_argument(
        "--data",
        required=required,
        help="the benchmark's folder as its authors publish it, or a folder with items.jsonl; "
        f"'samples' is a two-item sample of our own{optional}",
    )


def data_path(benchmark: str | None, data: str | None) -> Path | None:
    """The path of --data; "samples" stands for our own."""
    if benchmark is not None and data is not None:
        return find_benchmark(benchmark).locate(data)
    if data == SAMPLES:
        raise HYWUError("--data samples needs --benchmark, to say which sample.")
    return None if data is None else Path(data)


def add_questionnaire(parser: argparse.ArgumentParser) -> None:
    """--questionnaire and --prompts."""
    parser.add_argument(
        "--questionnaire",
        choices=tuple(QUESTIONNAIRES),
        help="what is asked (default: the benchmark's own; wu-eval for a folder)",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON with the authors' prompts in place of ours: semantics and quality (gedit), one "
        "per edit type (imgedit's prompts.json), or wu-eval",
    )


def add_kinds(parser: argparse.ArgumentParser, kinds: Mapping[str, Kind], **options: Any) -> None:
    """The option that chooses one of some kinds, and a group of each one's own options.

    options: further arguments of ``add_argument`` for the choosing option.
    """
    told = "; ".join(f"{kind.name}: {kind.summary}" for kind in kinds.values())
    flag = next(iter(kinds.values())).what
    parser.add_argument(flag, choices=tuple(kinds), help=told, **options)
    users: dict[Option, list[str]] = {}
    for kind in kinds.values():
        for option in kind.options:
            users.setdefault(option, []).append(kind.name)
    groups: dict[tuple[str, ...], Any] = {}
    known = {}
    for option, names in users.items():
        if known.setdefault(option.name, option) != option:
            raise ValueError(f"{option.flag} means two things: {', '.join(names)}")
        group = groups.get(tuple(names)) or parser.add_argument_group(", ".join(names))
        groups[tuple(names)] = group
        if option.type is bool:
            group.add_argument(option.flag, action="store_true", help=option.help)
            continue
        group.add_argument(
            option.flag,
            type=option.type,
            default=option.default,
            metavar=option.metavar,
            help=option.help,
        )


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Which of several judges' answers a score or report takes."""
    parser.add_argument(
        "--judged-by",
        metavar="NAME[:VERSION]",
        help="whose answers, where several judges gave some",
    )
    parser.add_argument(
        "--answered-by",
        metavar="MODEL",
        help="only answers of this model, where an endpoint served several under one name",
    )


def load_scores(root: str, args: argparse.Namespace) -> MethodScores:
    """One method's scores from its stored answers."""
    return open_scores(
        root, args.benchmark, data_path(args.benchmark, args.data), args.questionnaire, args.prompts,
        args.judged_by, args.answered_by,
    )  # fmt: skip
