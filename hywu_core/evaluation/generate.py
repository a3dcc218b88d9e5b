"""Produce a method's results: item by item, resumable, in parallel, failures listed and retried."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..errors import HYWUError
from ..files import as_json, atomic_path, folder_lock, write_json
from ..images import load_image, write_image
from . import gedit
from .editors import EditFailed, Editor
from .items import Item, ItemList
from .results import FAILURES, MANIFEST, Results, read_manifest

log = logging.getLogger(__name__)

FORMAT = "hywu-results-1"


@dataclass
class GenerationCount:
    """What one run did: results made, results found, and items that still have none, with reasons."""

    made: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def generate_results(
    results: Results,
    items: ItemList,
    editor: Editor,
    data: str | Path,
    seed: int = 0,
    tries: int = 2,
    selection: dict[str, Any] | None = None,
    progress: bool = True,
) -> GenerationCount:
    """Make every result that is missing; what is there stays as it is.

    items: all of the benchmark's; selection: keyword arguments of ItemList.select, kept in the
    manifest. tries: how often an item is tried in this run. Items that still fail stand in
    ``failures.jsonl`` and are tried again by the next run. Interrupted or killed, finished results
    are kept and none is half there. Raises HYWUError when the folder holds another editor's results.
    """
    selection = {name: value for name, value in (selection or {}).items() if value is not None}
    chosen = items.select(**selection)
    with folder_lock(results.root):
        write_manifest(results, items, editor.describe(), data, seed, selection)
        missing = results.missing(chosen)
        count = GenerationCount(kept=len(chosen.items) - len(missing))
        failures = _Failures(results.root / FAILURES)
        failures.settle(results, items)  # a killed run may have left half a line
        bar = tqdm(
            total=len(chosen.items),
            initial=count.kept,
            desc=f"generating {results.method}",
            disable=not progress,
        )
        try:
            with bar:
                _run(missing, results, editor, seed, tries, count, failures, bar)
        finally:
            failures.settle(results, items)
    return count


def write_manifest(
    results: Results,
    items: ItemList,
    editor: dict[str, Any],
    data: str | Path,
    seed: int | None,
    selection: dict[str, Any],
) -> None:
    """Say in the folder what makes its results; `editor` as Editor.describe gives it.

    Raises HYWUError when the folder holds results that something else made.
    """
    fixed = {
        "format": FORMAT,
        "benchmark": results.benchmark,
        "items": items.fingerprint(),
        "editor": editor,
        "seed": seed,
    }
    before = read_manifest(results.root)
    for name, value in fixed.items():
        if before and before.get(name) != as_json(value):
            raise HYWUError(
                f"{results.root}: holds results with {name} {before.get(name)!r}, now it is "
                f"{value!r}; choose another name for the method, or remove the folder."
            )
    write_json(
        results.root / MANIFEST,
        {
            **fixed,
            "method": results.method,
            "data": str(Path(data).resolve()),
            "selection": selection,
            "bad_items": [str(bad) for bad in items.bad],
        },
    )


def _run(
    missing: list[Item],
    results: Results,
    editor: Editor,
    seed: int,
    tries: int,
    count: GenerationCount,
    failures: _Failures,
    bar: tqdm,
) -> None:
    waiting: Iterator[Item] = iter(missing)
    running: dict[Future[str | None], Item] = {}
    with ThreadPoolExecutor(max(1, editor.parallel)) as pool:
        try:
            while True:
                while len(running) <= editor.parallel and (item := next(waiting, None)):
                    running[pool.submit(_make, item, results, editor, seed, tries)] = item
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    item = running.pop(future)
                    if reason := future.result():
                        count.failed[item.id] = reason
                        failures.add(item, reason)
                        bar.set_postfix(failed=len(count.failed))
                    else:
                        count.made += 1
                        bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _make(item: Item, results: Results, editor: Editor, seed: int, tries: int) -> str | None:
    """Make and write one result; the reason when it failed."""
    reason = None
    for _ in range(max(1, tries)):
        try:
            source = editor_source(results, item)
            save_result(results, item, editor.edit(source, item, seed))
            return None
        except (EditFailed, HYWUError, OSError, RuntimeError) as error:
            reason = str(error).strip() or type(error).__name__
            log.warning("%s: %s", item.id, reason)
    return reason


def save_result(results: Results, item: Item, edited: Image.Image) -> None:
    """Write one result where its benchmark wants it, over an earlier one."""
    if results.benchmark == "gedit":
        write_image(load_image(item.judged_source), gedit.source_path(results.root, item))
    write_image(edited.convert("RGB"), results.picture(item))


def editor_source(results: Results, item: Item) -> Image.Image:
    """The picture given to the editor; GEdit's at the authors' reference size."""
    source = load_image(item.source)
    if results.benchmark == "gedit":
        source = source.resize(gedit.reference_size(*source.size), Image.Resampling.BICUBIC)
    return source


class _Failures:
    """The list of items without a result: appended at once, settled at the end of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def add(self, item: Item, reason: str) -> None:
        with self._lock, self.path.open("ab") as file:
            file.write(_line(item.id, reason))
            file.flush()
            os.fsync(file.fileno())

    def settle(self, results: Results, items: ItemList) -> None:
        """Leave one line, the latest, for each item that has still no result."""
        reasons = read_failures(results.root)
        lines = [
            _line(item.id, reasons[item.id])
            for item in results.missing(items)
            if item.id in reasons
        ]
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
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            row = json.loads(line)
            reasons[str(row["item"])] = str(row["error"])
        except (ValueError, KeyError, TypeError):
            continue
    return reasons
