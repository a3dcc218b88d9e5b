"""Arguments that several steps have, and what is made of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import HYWUError
from ...evaluation.items import data_path
from ...evaluation.judges.base import Judge
from ...evaluation.questionnaires import NAMES, Questionnaire
from ...evaluation.results import BENCHMARKS
from ...evaluation.scores import MethodScores, open_scores

#: Exit code of a step that finished, but not for every item.
INCOMPLETE = 3


def add_data(parser: argparse.ArgumentParser, required: bool) -> None:
    """--benchmark and --data."""
    optional = "" if required else " (default: what the results were made for)"
    parser.add_argument(
        "--benchmark", choices=BENCHMARKS, required=required, help=f"whose items{optional}"
    )
    parser.add_argument(
        "--data",
        required=required,
        help="the benchmark's folder as its authors publish it, or a folder with items.jsonl; "
        f"'samples' is a two-item sample of our own{optional}",
    )


def add_questionnaire(parser: argparse.ArgumentParser) -> None:
    """--questionnaire and --prompts."""
    parser.add_argument(
        "--questionnaire",
        choices=NAMES,
        help="what is asked (default: the benchmark's own; wu-eval for a folder)",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON with the authors' prompts in place of ours: semantics and quality (gedit), one "
        "per edit type (imgedit's prompts.json), or wu-eval",
    )


def add_judge(parser: argparse.ArgumentParser) -> None:
    """--judge and its options."""
    parser.add_argument(
        "--judge",
        choices=("reference", "openai", "local"),
        default="reference",
        help="reference: computes from pixels, for items with a target; openai: any OpenAI-compatible "
        "endpoint; local: a transformers vision-language model's folder",
    )
    group = parser.add_argument_group("judge at an endpoint (openai)")
    group.add_argument("--url", default="https://api.openai.com/v1", help="base URL (%(default)s)")
    group.add_argument("--model", help="the model's name there, for instance gpt-4.1")
    group.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        help="environment variable with the key (%(default)s); it is written nowhere",
    )
    group.add_argument("--parallel", type=int, default=4, help="requests at once (%(default)s)")
    group.add_argument("--per-minute", type=float, default=0, help="rate limit; 0 for none")
    group.add_argument("--retries", type=int, default=6, help="further tries (%(default)s)")
    group.add_argument("--timeout", type=float, default=120, help="seconds a request (%(default)s)")
    local = parser.add_argument_group("judge on this machine (local)")
    local.add_argument("--folder", help="folder of the model, safetensors and processor")
    local.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="of an answer, openai and local (%(default)s)"
    )


def make_judge(args: argparse.Namespace) -> Judge:
    """The judge that the arguments describe. Raises HYWUError naming what is missing."""
    if args.judge == "openai":
        from ...evaluation.judges.openai import OpenAIJudge

        if not args.model:
            raise HYWUError("--judge openai needs --model, the model's name at the endpoint.")
        return OpenAIJudge(
            args.model,
            args.url,
            key_env=args.key_env,
            parallel=args.parallel,
            retries=args.retries,
            per_minute=args.per_minute,
            timeout=args.timeout,
            max_tokens=args.max_tokens,
        )
    if args.judge == "local":
        from ...evaluation.judges.local import LocalJudge

        if not args.folder:
            raise HYWUError("--judge local needs --folder, a transformers model's folder.")
        return LocalJudge(Path(args.folder), args.device, max_tokens=args.max_tokens)
    from ...evaluation.judges.reference import ReferenceJudge

    return ReferenceJudge()


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


def load_scores(root: str, args: argparse.Namespace) -> tuple[MethodScores, Questionnaire]:
    """One method's scores from its stored answers."""
    return open_scores(
        root, args.benchmark, data_path(args.benchmark, args.data), args.questionnaire, args.prompts,
        args.judged_by, args.answered_by,
    )  # fmt: skip
