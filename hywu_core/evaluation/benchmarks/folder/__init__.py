"""A folder of the user's own: ``items.jsonl``, images beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....errors import HYWUError
from ....files import check_name
from ...items import (
    Item,
    ItemList,
    check_image,
    check_instruction,
    collect,
    first_file,
    read_rows,
)
from ..base import Benchmark

INDEX_FILES = ("items.jsonl", "metadata.jsonl", "items.json")


class Folder(Benchmark):
    """Rows ``{source, instruction, target?, task?, language?, key?, photograph?}``; results ``<key>.png``."""

    name = "folder"
    usual = "wu-eval"
    sample = Path(__file__).with_name("sample")

    def read(self, path: Path, beside: Path | None = None) -> ItemList:
        """Own data: a JSONL file, or a folder with ``items.jsonl`` (or metadata.jsonl, items.json).

        Each row: ``source`` and ``instruction``, optional ``target``, ``task`` (default "edit"),
        ``language`` (default "en"), ``key`` (default: the row's number, five digits) and ``photograph``
        (a name that sources cut from one photograph share, for the intervals; default: the source).
        Paths are relative to the file. Raises HYWUError when nothing is usable.
        """
        file = path if path.is_file() else first_file(path, INDEX_FILES, "items")
        numbered = [
            (name, {"key": f"{number:05d}", **row} if isinstance(row, Mapping) else row)
            for number, (name, row) in enumerate(read_rows(file))
        ]
        return collect(self.name, numbered, lambda row: _parse_row(row, file.parent))


def _parse_row(row: Mapping[str, Any], root: Path) -> Item:
    target, photograph = row.get("target"), row.get("photograph", "")
    if not isinstance(photograph, str):
        raise HYWUError(f"its photograph is {photograph!r}, not a name")
    return Item(
        key=check_name(row["key"], "key"),
        task=check_name(row.get("task", "edit"), "task"),
        instruction=check_instruction(row.get("instruction")),
        source=check_image(row.get("source"), root, "source"),
        language=check_name(row.get("language", "en"), "language"),
        target=None if target is None else check_image(target, root, "target"),
        photograph=photograph,
    )


BENCHMARK = Folder()
