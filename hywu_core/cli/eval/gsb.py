"""Human preference (GSB): a blind voting page for two methods, and its report.

  hywu eval gsb create results/mine results/other --out votes/mine-other
  hywu eval gsb serve  votes/mine-other          (prints the link to give to voters)
  hywu eval gsb link   ComfyUI/user/hywu/gsb/mine-other     (the link to the page inside ComfyUI)
  hywu eval gsb report votes/mine-other
  hywu eval gsb export votes/mine-other --out votes.csv

good, same and bad are seen from the first method: good means that it was judged better.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote, urlsplit

from ...atomic import real_path
from ...errors import HYWUError
from ...evaluation.benchmarks import BENCHMARKS
from ...evaluation.gsb.report import report
from ...evaluation.gsb.session import Entry, create_session
from ...evaluation.gsb.store import Store
from ...evaluation.results import open_results
from ...evaluation.tables import plain_cell
from ...files import atomic_path, write_json
from ..console import say, table


def configure(parser: argparse.ArgumentParser) -> None:
    """Add create, serve, link, report and export."""
    steps = parser.add_subparsers(dest="gsb", metavar="ACTION", required=True)
    create = steps.add_parser("create", help="make a voting session of two methods' results")
    create.add_argument("first", type=Path, help="the method that good and bad are about")
    create.add_argument("second", type=Path, help="the method it is compared with")
    create.add_argument("--out", type=Path, required=True, help="folder of the new session")
    create.add_argument(
        "--benchmark", choices=tuple(BENCHMARKS), help="only for results without hywu_run.json"
    )
    create.add_argument("--data", type=Path, help="items (JSONL or the benchmark's folder)")
    create.add_argument("--name", default="Which edit is better?", help="the page's title")
    create.add_argument("--seed", type=int, help="of order and sides (default: random)")
    create.add_argument(
        "--pairs-per-voter", type=int, default=0, help="a random part for each voter (0: all)"
    )
    create.set_defaults(run_gsb=_create)
    serve = steps.add_parser("serve", help="serve the voting page")
    serve.add_argument("session", type=Path)
    serve.add_argument("--host", default="127.0.0.1", help="loopback by default")
    serve.add_argument("--port", type=int, default=8199, help="0 takes a free one")
    serve.add_argument(
        "--allow-host", action="append", default=[], help="another host name voters may use"
    )
    serve.set_defaults(run_gsb=_serve)
    link = steps.add_parser("link", help="print the link to a session that ComfyUI serves")
    link.add_argument("session", type=Path, help="a folder in ComfyUI's user/hywu/gsb")
    link.add_argument(
        "--server", default="http://127.0.0.1:8188", help="as voters reach it (%(default)s)"
    )
    link.set_defaults(run_gsb=_link)
    for name, function, summary in (
        ("report", _report, "win rate with its interval, agreement, the paper's table"),
        ("export", _export, "all votes as CSV or JSON"),
    ):
        step = steps.add_parser(name, help=summary)
        step.add_argument("session", type=Path)
        step.add_argument(
            "--out",
            type=Path,
            required=name == "export",
            help="a .json file" if name == "report" else "a .csv or .json file; replaced if there",
        )
        step.set_defaults(run_gsb=function)


def run(args: argparse.Namespace) -> int:
    """Run the chosen action."""
    return args.run_gsb(args)


def _create(args: argparse.Namespace) -> int:
    if args.pairs_per_voter < 0:
        raise HYWUError(f"--pairs-per-voter is {args.pairs_per_voter}; it must be 0 or more.")
    first, items = open_results(args.first, args.benchmark, args.data)
    second, others = open_results(args.second, args.benchmark, args.data)
    theirs = {item.id for item in others.items}
    both = [i for i in items.items if i.id in theirs]
    whole = [i for i in both if first.image(i).is_file() and second.image(i).is_file()]
    entries = [Entry(i.id, i.instruction, i.source, first.image(i), second.image(i)) for i in whole]
    create_session(
        args.out,
        entries,
        (first.method, second.method),
        args.name,
        args.seed,
        args.pairs_per_voter,
    )
    say(f"{args.out}: {len(entries)} pairs, {first.method} against {second.method}.")
    left_out = len({i.id for i in items.items} | theirs) - len(entries)
    if left_out:
        say(f"{left_out} items were left out: they lack a result of one of the two methods.")
    say(f"Next: hywu eval gsb serve {args.out}")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from ...evaluation.gsb.server import serve

    def ready(url: str) -> None:
        say(f"Voting page: {url}")
        say("Whoever has the whole link can vote. Ctrl+C stops; votes are kept.")

    serve(args.session, args.host, args.port, args.allow_host, ready, say)
    return 0


def _link(args: argparse.Namespace) -> int:
    if urlsplit(args.server).scheme not in ("http", "https"):
        raise HYWUError(f"--server is '{args.server}'; it must begin with http:// or https://.")
    folder = real_path(args.session)
    if folder.parts[-3:-1] != ("hywu", "gsb"):
        raise HYWUError(
            f"{folder}: ComfyUI serves the sessions in hywu/gsb of its user folder; make it there, or "
            "move it while no server runs."
        )
    store = Store(folder)
    token = store.about["token"]
    store.close()
    say(f"{args.server.rstrip('/')}/hywu/gsb/#{quote(folder.name, safe='')}:{token}")
    return 0


def _report(args: argparse.Namespace) -> int:
    store = Store(args.session)
    try:
        data, tables = report(store)
    finally:
        store.close()
    for each in tables:
        say(f"\n{each.title}")
        table(each.rows, each.header)
        if each.note:
            say(each.note)
    if args.out:
        write_json(args.out, data)
    return 0


def _export(args: argparse.Namespace) -> int:
    kind = args.out.suffix.lower()
    if kind not in (".csv", ".json"):
        raise HYWUError(f"{args.out}: ends in '{kind}'; name a .csv or a .json file.")
    store = Store(args.session)
    try:
        methods = {key: store.about[key] for key in ("method_a", "method_b")}
        rows = [{**asdict(vote), **methods} for vote in store.votes()]
    finally:
        store.close()
    fields = ("voter", "pair", "item", "verdict", "a_on_left", "time", "method_a", "method_b")
    with (
        atomic_path(args.out, overwrite=True) as part,
        part.open("w", encoding="utf-8", newline="") as file,
    ):
        if kind == ".json":
            json.dump(rows, file, indent=2, ensure_ascii=False)
        else:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows({k: plain_cell(v) for k, v in row.items()} for row in rows)
    say(f"{args.out}: {len(rows)} votes.")
    return 0
