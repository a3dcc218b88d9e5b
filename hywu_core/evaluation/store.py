"""Judgements: raw answers, one JSON line each, on disk before the next is asked.

One file per judge, version and questionnaire. A line is found again by the item, the question, the
prompt and the pixels judged, so a changed image or prompt is judged anew and nothing is asked
twice. A line cut short by a crash is dropped when the file is opened next.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .. import fingerprint
from ..atomic import append_line, reason
from ..errors import HYWUError
from ..files import check_fields, parse_json, slug

FORMAT = "hywu-judgements-1"

ANSWERED, REFUSED, FAILED = "answered", "refused", "failed"


@dataclass(frozen=True)
class Judgement:
    """One answer to one question.

    pictures: hash of the images judged.
    prompt: of the prompt.
    """

    item: str
    question: str
    pictures: str
    prompt: str
    status: str
    text: str
    model: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    attempts: int = 1

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.item, self.question, self.pictures, self.prompt


#: Field of a line -> its type.
JUDGEMENT = {field.name: int if field.type == "int" else str for field in fields(Judgement)}


@dataclass(frozen=True)
class StoreName:
    """Who judged by which questions: one file's identity."""

    judge: str
    judge_version: str
    questionnaire: str
    questionnaire_version: str

    @property
    def file_name(self) -> str:
        # The hash keeps apart what the readable part maps onto each other
        readable = [slug(part) for part in (self.questionnaire, self.judge, self.judge_version)]
        digest = fingerprint.of_json(asdict(self), 8)
        return "__".join(readable)[:100] + f"__{digest}.jsonl"

    def __str__(self) -> str:
        return f"{self.judge} ({self.judge_version}) by {self.questionnaire} ({self.questionnaire_version})"


class JudgementStore:
    """The judgements of one StoreName in one folder; safe to append to from several threads."""

    def __init__(self, folder: Path, name: StoreName, writable: bool = False) -> None:
        """Read the file, or begin one. Raises HYWUError when it is another store's or damaged."""
        self.name = name
        self.path = folder / name.file_name
        self._lock = threading.Lock()
        self._latest: dict[tuple[str, str, str, str], Judgement] = {}
        self._writable = writable
        whole = self._read() if self.path.is_file() else 0
        if writable:
            self._begin(whole)

    def _begin(self, whole: int) -> None:
        """Cut off half a line that a killed run left; a new file gets its first line."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                os.truncate(self.path, whole)
        except OSError as error:
            raise HYWUError(f"{self.path}: can't be written ({reason(error)}).") from error
        if whole == 0:
            self._write({"format": FORMAT, **asdict(self.name)})

    def _read(self) -> int:
        """Load all whole lines; returns their length in bytes."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            name = f"{self.path}: line {number}"
            row = parse_json(line, name, dict, "remove that line")
            if number == 1:
                self._check_header(row)
                continue
            check_fields(row, JUDGEMENT, name, null=False)
            self._add(row, name)
        return whole

    def _add(self, row: dict[str, Any], name: str) -> None:
        try:
            judgement = Judgement(**row)
        except TypeError as error:
            raise HYWUError(f"{name} is damaged ({error}); remove that line.") from error
        counts = judgement.tokens_in, judgement.tokens_out, judgement.attempts
        if judgement.status not in (ANSWERED, REFUSED, FAILED) or min(counts) < 0:
            raise HYWUError(
                f"{name} is damaged (status {judgement.status!r:.60}, counts {counts}); remove that line."
            )
        self._latest[judgement.key] = judgement

    def _check_header(self, row: dict[str, Any]) -> None:
        if read_name(self.path, row) != self.name:
            raise HYWUError(
                f"{self.path}: holds judgements of {read_name(self.path, row)}, not {self.name}."
            )

    def __enter__(self) -> JudgementStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writable = False

    def __iter__(self) -> Iterator[Judgement]:
        return iter(self._latest.values())

    def __len__(self) -> int:
        return len(self._latest)

    def get(self, item: str, question: str, images: str, prompt: str) -> Judgement | None:
        """The latest judgement of exactly this question about exactly these images."""
        return self._latest.get((item, question, images, prompt))

    def append(self, judgement: Judgement) -> None:
        """Write one line and wait until the disk has it."""
        with self._lock:
            self._write(asdict(judgement))
            self._latest[judgement.key] = judgement

    def _write(self, row: dict[str, Any]) -> None:
        if not self._writable:
            raise HYWUError(f"{self.path}: was opened for reading only.")
        append_line(self.path, json.dumps(row, ensure_ascii=False).encode())


def read_name(path: Path, header: dict[str, Any] | None = None) -> StoreName:
    """Whose judgements a file holds. Raises HYWUError naming the file."""
    try:
        if header is None:
            with path.open("rb") as file:
                header = parse_json(file.readline(), "its first line", dict)
        if header.pop("format") != FORMAT:
            raise KeyError("format")
        check_fields(header, dict.fromkeys(header, str), "its first line", null=False)
        return StoreName(**header)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HYWUError(f"{path}: not a file of judgements ({error}).") from error


def list_stores(folder: Path) -> list[StoreName]:
    """The stores in a folder, in the order of their file names."""
    return [read_name(path) for path in sorted(folder.glob("*.jsonl"))] if folder.is_dir() else []


def choose_store(
    folder: Path, questionnaire: str | None = None, judge: str | None = None
) -> StoreName:
    """The one store that fits. Raises HYWUError when there is none, or a choice must be made."""
    stores = [
        name
        for name in list_stores(folder)
        if questionnaire in (None, name.questionnaire)
        and judge in (None, name.judge, f"{name.judge}:{name.judge_version}")
    ]
    if not stores:
        raise HYWUError(
            f"{folder.parent}: has no judgements that fit; run `hywu eval judge` first."
        )
    if len(stores) > 1:
        listed = "; ".join(map(str, stores))
        raise HYWUError(
            f"{folder.parent}: several judges' answers lie here and are never mixed: {listed}. "
            "Choose with --judged-by NAME or NAME:VERSION and --questionnaire."
        )
    return stores[0]
