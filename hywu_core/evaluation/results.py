"""A folder of one method's results: where images lie, and the notes kept beside them.

The images lie exactly where the benchmark's authors put them, so that their scripts read ours and
ours read theirs. Beside them: ``hywu_run.json`` (what made them), ``failures.jsonl`` (what is still
missing, and why) and ``judgements/`` (raw answers of judges).
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..atomic import real_path
from ..errors import HYWUError
from ..files import (
    append_line,
    atomic_path,
    check_fields,
    parse_json,
    read_json,
    read_json_lines,
    write_json,
)
from ..images import load_image, write_image
from .benchmarks import BENCHMARKS, find_benchmark
from .benchmarks.base import Benchmark
from .items import Item, ItemList

MANIFEST = "hywu_run.json"
FAILURES = "failures.jsonl"
JUDGEMENTS = "judgements"
FORMAT = "hywu-results-1"


@dataclass(frozen=True)
class Results:
    """One method's results on one benchmark."""

    root: Path
    benchmark: Benchmark

    @property
    def method(self) -> str:
        return real_path(self.root).name

    def image(self, item: Item) -> Path:
        """Where the item's result lies, or should."""
        return self.benchmark.result_path(self.root, item)

    def judged_source(self, item: Item) -> Path:
        """The source a judge is shown: the copy beside the result where the benchmark keeps one."""
        copy = self.benchmark.source_path(self.root, item)
        return copy if copy is not None and copy.is_file() else item.judged_source

    def missing(self, items: ItemList) -> list[Item]:
        """Items without a result."""
        return [item for item in items.items if not self.image(item).is_file()]

    def editor_source(self, item: Item) -> Image.Image:
        """The image given to the editor. Raises HYWUError when it can't be read."""
        return self.benchmark.editor_source(load_image(item.source))

    def save(self, item: Item, edited: Image.Image) -> None:
        """Write one result where its benchmark wants it, over an earlier one."""
        if (copy := self.benchmark.source_path(self.root, item)) is not None:
            write_image(load_image(item.judged_source), copy)
        write_image(edited.convert("RGB"), self.image(item))


# -- what made the results -------------------------------------------------------------------------


def read_manifest(root: Path) -> dict[str, Any]:
    """What made these results; empty when another program did. Raises HYWUError naming the file."""
    path = root / MANIFEST
    if not path.is_file():
        return {}
    manifest = read_json(path, dict, "remove it to start anew")
    texts = dict.fromkeys(("benchmark", "data", "items", "sources"), str)
    check_fields(manifest, {**texts, "selection": dict}, str(path))
    if "\0" in (manifest.get("data") or ""):
        raise HYWUError(f"{path}: its data is no path; remove it to start anew.")
    selection = manifest.get("selection") or {}
    if not all(_selects(*pair) for pair in selection.items()):
        raise HYWUError(f"{path}: its selection is {selection!r}; remove it to start anew.")
    return manifest


def _selects(name: str, value: Any) -> bool:
    """Whether it is an argument of ItemList.select; null chooses all."""
    if value is None:
        return name in ("tasks", "languages", "limit")
    if name == "limit":
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    named = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return name in ("tasks", "languages") and named


def write_manifest(
    results: Results,
    items: ItemList,
    editor: dict[str, Any],
    data: str | Path,
    seed: int | None,
    selection: dict[str, Any],
    sources: str | None = None,
) -> None:
    """Say in the folder what makes its results; `editor` as Editor.describe gives it.

    sources: hash of the source images, where it is known; the folders of former versions have none.
    Raises HYWUError when the folder holds results that something else made.
    """
    fixed = {
        "format": FORMAT,
        "benchmark": results.benchmark.name,
        "items": items.fingerprint(),
        "editor": editor,
        "seed": seed,
    }
    before = read_manifest(results.root)
    if sources and before.get("sources", sources) != sources:
        raise HYWUError(
            f"{results.root}: holds results of other source images than {data} holds now; choose another "
            "name for the method, or remove the folder."
        )
    sources = sources or before.get("sources")
    for name, value in fixed.items():
        if before and before.get(name) != _stored(value):
            raise HYWUError(
                f"{results.root}: holds results with {name} {before.get(name)!r}, now it is "
                f"{value!r}; choose another name for the method, or remove the folder."
            )
    write_json(
        results.root / MANIFEST,
        {
            **fixed,
            "method": results.method,
            "data": str(real_path(data)),
            "selection": selection,
            "bad_items": [str(bad) for bad in items.bad],
            **({"sources": sources} if sources else {}),
        },
    )


def _stored(value: Any) -> Any:
    """A value as JSON gives it back: tuples as lists."""
    return parse_json(json.dumps(value), "the manifest")


def open_results(
    root: str | Path, benchmark: str | None = None, data: str | Path | None = None
) -> tuple[Results, ItemList]:
    """A method's folder and its benchmark's items.

    benchmark, data: needed where no ``hywu_run.json`` says them (results of another program).
    Raises HYWUError naming the folder and what is missing.
    """
    root = Path(root)
    if not root.is_dir():
        raise HYWUError(f"{root}: there is no such folder of results.")
    manifest = read_manifest(root)
    benchmark = benchmark or manifest.get("benchmark")
    data = data or manifest.get("data")
    if benchmark not in BENCHMARKS or data is None:
        raise HYWUError(
            f"{root}: has no {MANIFEST}, so say --benchmark ({', '.join(BENCHMARKS)}) and --data."
        )
    found = find_benchmark(benchmark)
    items = found.read(Path(data), root.parent)
    if manifest.get("items") not in (None, items.fingerprint()):
        raise HYWUError(
            f"{root}: was made for other items than {data} holds now; give the --data it was made "
            "for, or generate anew under another --method."
        )
    try:
        chosen = items.select(**(manifest.get("selection") or {}))
    except HYWUError as error:
        raise HYWUError(f"{root / MANIFEST}: its selection doesn't fit: {error}") from error
    return Results(root, found), chosen


# -- what is missing -------------------------------------------------------------------------------


class Failures:
    """The list of items without a result: appended at once, settled at the end of a run."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.path = results.root / FAILURES
        self._lock = threading.Lock()

    def add(self, item: Item, reason: str) -> None:
        """Write one line and wait until the disk has it."""
        with self._lock:
            append_line(self.path, _line(item.id, reason))

    def settle(self, items: ItemList) -> None:
        """Leave one line, the latest, for each item that has still no result."""
        reasons = read_failures(self.results.root)
        missing = self.results.missing(items)
        lines = [_line(item.id, reasons[item.id]) for item in missing if item.id in reasons]
        if lines:
            with atomic_path(self.path, overwrite=True) as part:
                part.write_bytes(b"".join(lines))
        else:
            self.path.unlink(missing_ok=True)


def _line(item: str, reason: str) -> bytes:
    return json.dumps({"item": item, "error": reason}, ensure_ascii=False).encode() + b"\n"


def read_failures(root: Path) -> dict[str, str]:
    """Items without a result and the latest reason; lines cut short by a crash are passed over."""
    path = root / FAILURES
    reasons = {}
    for _, row in read_json_lines(path) if path.is_file() else ():
        if isinstance(row, dict) and {"item", "error"} <= row.keys():
            reasons[str(row["item"])] = str(row["error"])
    return reasons
