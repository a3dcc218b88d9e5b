"""The tables of docs/speed.md, written anew from the JSON of the measurements.

    python -m bench.tables FIGURES.json ... [--docs docs/speed.md]

A file says by its keys what measured it (first_contact, switches, on_device, generator, estimate). Its tables
stand in the document between ``<!-- NAME -->`` and ``<!-- /NAME -->``; what is between is replaced. Raises
SystemExit where a file is none of these, or the document lacks a place.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hywu_core.cli.console import say

from .switches import verdict

DOCS = Path(__file__).parent.parent / "docs" / "speed.md"

Tables = dict[str, str]


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.3g}"


def first_contact(figures: dict[str, Any]) -> Tables:
    """Sizes and variants, attention by backend, kernels, decisions; the device in the first line."""
    device, rates = figures["environment"], figures.get("probe", {}).get("rates", {})
    sustained = rates.get("sustained_tflops")
    rows = []
    for name, found in figures["measured"].items():
        if "median_s" not in found:
            rows.append((name, found.get("failed") or found.get("skipped"), "", "", "", ""))
            continue
        eager = figures["measured"].get(f"{name.partition('/')[0]}/eager", {}).get("median_s")
        off = found.get("difference_from_eager")
        rows.append(
            (
                name,
                f"{1000 * found['median_s']:.4g} ms",
                f"{eager / found['median_s']:.2f}×" if eager else "",
                f"{100 * found['tflops'] / sustained:.0f} %" if sustained else "",
                _gigabytes(found.get("peak_over_weights_bytes")),
                "" if off is None else f"{off:.1e}",
            )
        )
    words = (
        f"{device.get('name', 'a CPU')}, torch {device['torch']}, triton {device.get('triton')}: "
        + ", ".join(f"{name} {value:.4g}" for name, value in rates.items() if name != "check_s")
    )
    header = ("", "time", "of eager's speed", "of sustained", "GB over weights", "off eager")
    tables = {"sizes": f"{words}\n\n{markdown(header, rows)}"}
    rows = [(d["question"], d["answer"], d["because"]) for d in figures["decisions"]]
    tables["decisions"] = markdown(("question", "answer", "because"), rows)
    return tables


def switches(figures: dict[str, Any]) -> Tables:
    """How much slower the whole is with each part switched the other way."""
    rows = [
        (v["part"], v["variant"], "on" if v["on"] else "off", f"{v['times']:.3f}×", verdict(v))
        for v in figures["verdicts"]
    ]
    settings = [
        (name, f"{1000 * found['median_s']:.4g} ms")
        for name, found in figures["settings"].items()
        if "median_s" in found
    ]
    parts = markdown(("part", "variant", "is", "time with it switched", "verdict"), rows)
    return {"switches": f"{parts}\n\n{markdown(('setting', 'time'), settings)}"}


def on_device(figures: dict[str, Any]) -> Tables:
    """Steps and crops per second of each training."""
    rows = [
        (name, f["batch_size"], f"{f['steps_per_s']:.3g}", f"{f['steps_per_s'] * f['batch_size']:.4g}")
        for name, f in figures["trainings"].items()
        if "steps_per_s" in f
    ]  # fmt: skip
    return {"training": markdown(("training", "batch", "steps/s", "crops/s"), rows)}


def cpu(figures: dict[str, Any]) -> Tables:
    """Both sizes of a CPU against plain eager."""
    rows = []
    for size, found in figures["cpu"].items():
        for name, clocks in found["time"].items():
            wall, used = clocks["wall_s"], clocks["cpu_s"]
            peak, eager = found["peak_bytes"][name], found["peak_bytes"]["plain eager"]
            rows.append(
                (
                    size,
                    name,
                    f"{1000 * wall['median']:.4g} ms",
                    f"{wall['speedup']:.2f}×",
                    f"{1000 * used['median']:.4g} ms",
                    f"{used['speedup']:.2f}×",
                    f"{peak / 2**20:.1f} MiB",
                    f"{peak / eager:.2f}",
                )
            )
    header = (
        "size", "", "wall", "faster", "processor time", "faster", "peak activations", "of eager's",
    )  # fmt: skip
    return {"cpu": markdown(header, rows)}


def estimate(figures: dict[str, Any]) -> Tables:
    """Launches, arithmetic, bytes and memory without a device."""
    rows = []
    for size, variants in figures["sizes"].items():
        for name, found in variants.items():
            products, rest = found["seconds_at_rates"]
            rows.append(
                (
                    f"{size}, {name}",
                    f"{found['launches']:,}",
                    f"{sum(found['flops'].values()) / 1e12:.4g}",
                    f"{found['other_bytes'] / 1e9:.4g}",
                    _gigabytes(found["peak_over_weights_bytes"]),
                    f"{1000 * products:.4g}",
                    f"{1000 * rest:.4g}",
                )
            )
    header = (
        "", "launches", "TFLOP", "GB beside products", "peak GB over the weights", "ms products",
        "ms the rest",
    )  # fmt: skip
    return {"estimate": markdown(header, rows)}


#: What only one measurement's JSON has -> its tables.
KINDS: dict[str, Callable[[dict[str, Any]], Tables]] = {
    "decisions": first_contact,
    "settings": switches,
    "trainings": on_device,
    "cpu": cpu,
    "rates": estimate,
}


def tables_of(path: Path) -> Tables:
    """The tables of one file of figures."""
    figures = json.loads(path.read_text())
    for key, make in KINDS.items():
        if key in figures:
            return make(figures)
    raise SystemExit(
        f"{path}: no figures that a table is made of (its keys are {', '.join(figures)}); give the "
        f"JSON of {', '.join(make.__name__ for make in KINDS.values())}."
    )


def placed(text: str, name: str, table: str) -> str:
    """The document with a table in its place."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, found, rest = text.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"the document has no place {start} … {end}; put it where the table goes.")
    return f"{head}{start}\n\n{table}\n\n{end}{tail}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", type=Path, nargs="+")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args(arguments)
    text = args.docs.read_text(encoding="utf-8")
    for path in args.figures:
        for name, table in tables_of(path).items():
            text = placed(text, name, table)
            say(f"{args.docs.name}: {name} from {path.name}")
    args.docs.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
