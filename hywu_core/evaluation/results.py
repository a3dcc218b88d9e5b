"""A folder of one method's results: where pictures lie, and the notes kept beside them.

The pictures lie exactly where the benchmark's authors put them, so that their scripts read ours and
ours read theirs. Beside them: ``hywu_run.json`` (what made them), ``failures.jsonl`` (what is still
missing, and why) and ``judgements/`` (raw answers of judges).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HYWUError
from ..files import read_json
from . import gedit, imgedit
from .items import Item, ItemList, read_items

MANIFEST = "hywu_run.json"
FAILURES = "failures.jsonl"
JUDGEMENTS = "judgements"

BENCHMARKS = ("gedit", "imgedit", "folder")


@dataclass(frozen=True)
class Results:
    """One method's results on one benchmark."""

    root: Path
    benchmark: str

    @property
    def method(self) -> str:
        return self.root.resolve().name

    def picture(self, item: Item) -> Path:
        """Where the item's result lies, or should."""
        if self.benchmark == "gedit":
            return gedit.result_path(self.root, item)
        if self.benchmark == "imgedit":
            return imgedit.result_path(self.root, item)
        return self.root / f"{item.key}.png"

    def judged_source(self, item: Item) -> Path:
        """The source a judge is shown: GEdit's copy beside the result where there is one."""
        if self.benchmark == "gedit":
            copy = gedit.source_path(self.root, item)
            return copy if copy.is_file() else item.judged_source
        return item.judged_source

    def missing(self, items: ItemList) -> list[Item]:
        """Items without a result."""
        return [item for item in items.items if not self.picture(item).is_file()]


def read_manifest(root: Path) -> dict[str, Any]:
    """What made these results; empty when another program did. Raises HYWUError naming the file."""
    path = root / MANIFEST
    if not path.is_file():
        return {}
    return read_json(path, dict, "remove it to start anew")


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
    items = read_items(benchmark, data, unpack_to=root.parent / "gedit_data")
    if manifest.get("items") not in (None, items.fingerprint()):
        raise HYWUError(
            f"{root}: was made for other items than {data} holds now; give the --data it was made "
            "for, or generate anew under another --method."
        )
    return Results(root, benchmark), items.select(**manifest.get("selection", {}))
