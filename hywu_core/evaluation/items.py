"""Benchmark items: what an editor is asked, and where its result belongs.

One Item is one picture, one instruction and (where known) the picture wanted. Readers turn what the
benchmarks' authors publish, or a folder of the user's own, into items; rows that can't be used are
returned by name beside them, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import HYWUError
from ..files import check_name, is_file, read_json, read_json_lines
from ..fingerprint import of_json

#: Two items of each benchmark, our own.
SAMPLES = Path(__file__).with_name("samples")


@dataclass(frozen=True)
class Item:
    """One edit to make.

    source: the picture given to the editor; shown_source: the one given to the judge, where a
    benchmark keeps the two apart (GEdit-Bench), else None; target: the picture wanted, if known;
    intersection: GEdit's mark of the items that every compared system answered; photograph: what
    the source was cut or made from, where several sources share one.
    """

    key: str
    task: str
    instruction: str
    source: Path
    language: str = "en"
    target: Path | None = None
    shown_source: Path | None = None
    intersection: bool = False
    photograph: str = ""

    @property
    def id(self) -> str:
        """Unique within one benchmark: ``task/language/key``."""
        return f"{self.task}/{self.language}/{self.key}"

    @property
    def judged_source(self) -> Path:
        return self.shown_source or self.source

    @property
    def cluster(self) -> str:
        """The photograph that intervals count the item under: items of one are not independent."""
        return self.photograph or str(self.source)


@dataclass(frozen=True)
class BadItem:
    """A row that can't be evaluated: its name in the file it came from, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class ItemList:
    """Items in the order of their file, the rows that could not be used, and the benchmark's name."""

    benchmark: str
    items: tuple[Item, ...]
    bad: tuple[BadItem, ...] = ()

    def tasks(self) -> list[str]:
        """Tasks in order of first appearance."""
        return list(dict.fromkeys(item.task for item in self.items))

    def select(
        self,
        tasks: Sequence[str] | None = None,
        languages: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> ItemList:
        """The items of some tasks and languages, at most `limit` a task. Raises HYWUError if none."""
        if unknown := set(tasks or ()) - set(self.tasks()):
            raise HYWUError(
                f"There are no items of the task {', '.join(sorted(unknown))}; the tasks are "
                f"{', '.join(self.tasks())}."
            )
        taken: dict[str, int] = {}
        chosen = []
        for item in self.items:
            if (tasks and item.task not in tasks) or (languages and item.language not in languages):
                continue
            taken[item.task] = taken.get(item.task, 0) + 1
            if limit is None or taken[item.task] <= limit:
                chosen.append(item)
        if not chosen:
            raise HYWUError("The selection of tasks and languages leaves no item.")
        return replace(self, items=tuple(chosen))

    def fingerprint(self) -> str:
        """Hash of what is asked (not of the pixels), so that results of other items are recognized."""
        rows = [[i.id, i.instruction, i.intersection] for i in self.items]
        return of_json(rows, 16, ensure_ascii=False)


def check_image(value: object, root: Path, what: str) -> Path:
    """The path of an existing file inside `root`. Raises HYWUError saying what is wrong."""
    if not isinstance(value, str) or not value or "\0" in value or not _encodable(value):
        raise HYWUError(f"its {what} is {value!r}, not a path")
    path = (root / value).resolve()
    if not path.is_relative_to(root.resolve()):
        raise HYWUError(f"its {what} '{value}' lies outside {root}")
    if not is_file(path):
        raise HYWUError(f"its {what} '{value}' does not exist")
    return path


def check_instruction(value: object) -> str:
    """A non-empty instruction. Raises HYWUError saying what is wrong."""
    if not isinstance(value, str) or not value.strip() or not _encodable(value):
        raise HYWUError(f"its instruction is {value!r}")
    return value


def _encodable(text: str) -> bool:
    """Whether a file can hold the text: JSON may hold half of an emoji (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def collect(
    benchmark: str, rows: Iterable[tuple[str, Mapping[str, Any] | str]], parse: Any
) -> ItemList:
    """Parse named rows with ``parse(row) -> Item``; a row given as text is bad, and that is why.

    Raises HYWUError when nothing usable is left.
    """
    items: dict[str, Item] = {}
    bad: list[BadItem] = []
    for name, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise HYWUError(row if isinstance(row, str) else "is not a JSON object")
            item = parse(row)
            if item.id in items:
                raise HYWUError(f"repeats the item {item.id}")
            items[item.id] = item
        except HYWUError as error:
            bad.append(BadItem(name, str(error)))
    if not items:
        reasons = "; ".join(map(str, bad[:3])) or "there are no rows"
        raise HYWUError(f"No usable item of {benchmark}: {reasons}.")
    return ItemList(benchmark, tuple(items.values()), tuple(bad))


def read_rows(path: Path) -> list[tuple[str, Mapping[str, Any] | str]]:
    """Named rows of a JSON list or a JSONL file; a line that is not JSON comes as its complaint."""
    if path.suffix.lower() == ".jsonl":
        start = len(f"{path}, line ")
        return [
            (f"{path.name} line {n}", _complaint(row, start + len(f"{n}: ")))
            for n, row in read_json_lines(path)
        ]
    return [(f"{path.name} row {n}", row) for n, row in enumerate(read_json(path, list), 1)]


def _complaint(row: Any, start: int) -> Any:
    return f"is {str(row)[start:]}" if isinstance(row, HYWUError) else row


# -- a folder of the user's own ------------------------------------------------------------------

FOLDER_FILES = ("items.jsonl", "metadata.jsonl", "items.json")


def read_folder(path: str | Path) -> ItemList:
    """Own data: a JSONL file, or a folder with ``items.jsonl`` (or metadata.jsonl, items.json).

    Each row: ``source`` and ``instruction``, optional ``target``, ``task`` (default "edit"),
    ``language`` (default "en"), ``key`` (default: the row's number, five digits) and ``photograph``
    (a name that sources cut from one photograph share, for the intervals; default: the source).
    Paths are relative to the file.
    """
    path = Path(path)
    file = path if path.is_file() else first_file(path, FOLDER_FILES, "items")
    root = file.parent
    rows = read_rows(file)
    numbered = [
        (name, row if isinstance(row, str) or not isinstance(row, Mapping) else {"key": key, **row})
        for key, (name, row) in zip((f"{n:05d}" for n in range(len(rows))), rows, strict=True)
    ]

    def parse(row: Mapping[str, Any]) -> Item:
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

    return collect("folder", numbered, parse)


def first_file(folder: Path, names: Iterable[str], what: str) -> Path:
    if not folder.is_dir():
        raise HYWUError(f"{folder}: there is no such file or folder.")
    names = list(names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise HYWUError(f"{folder}: holds none of {', '.join(names)}, which list the {what}.")


def read_items(benchmark: str, path: str | Path, unpack_to: Path | None = None) -> ItemList:
    """Items of "gedit", "imgedit" or "folder" from the user's path.

    unpack_to: where the pictures of a GEdit parquet or arrow folder are written.
    """
    from .gedit import read_gedit
    from .imgedit import read_imgedit

    if benchmark == "gedit":
        return read_gedit(path, unpack_to)
    if benchmark == "imgedit":
        return read_imgedit(path)
    if benchmark == "folder":
        return read_folder(path)
    raise HYWUError(f"There is no benchmark '{benchmark}'; choose gedit, imgedit or folder.")


def data_path(benchmark: str | None, data: str | None) -> Path | None:
    """Where a benchmark's items lie; "samples" stands for our own. Raises HYWUError."""
    if data == "samples":
        if benchmark is None:
            raise HYWUError("--data samples needs --benchmark, to say which sample.")
        return SAMPLES / benchmark
    return None if data is None else Path(data)
