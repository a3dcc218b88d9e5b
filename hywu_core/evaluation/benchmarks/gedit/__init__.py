"""GEdit-Bench (stepfun-ai/Step1X-Edit): its data and result tree here, its questions in `scoring`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

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
from .scoring import TASKS, GEditQuestions
from .unpack import packed_files, unpack

INDEX_FILES = ("gedit.jsonl", "gedit.json", "metadata.jsonl")


class GEdit(Benchmark):
    """``<method>/fullset/<task>/<language>/<key>.png``, the source beside it as ``<key>_SRCIMG.png``."""

    name = usual = GEditQuestions.name
    sample = Path(__file__).with_name("sample")

    def read(self, path: Path, beside: Path | None = None) -> ItemList:
        """Parquet or arrow files as published, or an exported folder.

        The exported folder has ``gedit.jsonl`` (or gedit.json, metadata.jsonl): rows with the
        dataset's own fields ``task_type, key, instruction, instruction_language, input_image,
        input_image_raw, Intersection_exist``, where the two images are paths relative to the file
        (either may be left out) and ``target_image`` may name a known target. Packed files are
        unpacked into ``<beside>/gedit_data``. Raises HYWUError naming the file.
        """
        exported = any((path / name).is_file() for name in INDEX_FILES)
        if path.is_dir() and not exported and (files := packed_files(path)):
            if beside is None:
                raise HYWUError(
                    f"{path}: holds parquet or arrow files; unpack them first with "
                    "`hywu eval unpack`."
                )
            path = unpack(files, beside / "gedit_data")
        file = path if path.is_file() else first_file(path, INDEX_FILES, "benchmark's items")
        return collect(self.name, read_rows(file), lambda row: _parse_row(row, file.parent))

    def index_files(self, path: Path) -> list[Path]:
        return super().index_files(path) or packed_files(path)

    def packed_files(self, folder: Path) -> list[Path]:
        return packed_files(folder)

    def unpack(self, files: Sequence[Path], out: Path) -> Path:
        return unpack(files, out)

    def result_path(self, root: Path, item: Item) -> Path:
        return root / "fullset" / item.task / item.language / f"{item.key}.png"

    def source_path(self, root: Path, item: Item) -> Path:
        return root / "fullset" / item.task / item.language / f"{item.key}_SRCIMG.png"

    def editor_source(self, source: Image.Image) -> Image.Image:
        """At the authors' size of the image given to an editor."""
        return source.resize(reference_size(*source.size), Image.Resampling.BICUBIC)

    def judged(self, edited: Image.Image, source: Image.Image) -> Image.Image:
        """Brought to the source's size, as the authors do."""
        if edited.size == source.size:
            return edited
        return edited.resize(source.size, Image.Resampling.BICUBIC)


BENCHMARK = GEdit()
QUESTIONNAIRE = GEditQuestions


def _parse_row(row: Mapping[str, Any], root: Path) -> Item:
    task = check_name(row.get("task_type"), "task_type")
    if task not in TASKS:
        raise HYWUError(f"its task_type is '{task}', none of the {len(TASKS)} of GEdit-Bench")
    shown, raw = (
        check_image(row[name], root, name) if row.get(name) is not None else None
        for name in ("input_image", "input_image_raw")
    )
    if (source := raw or shown) is None:
        raise HYWUError("it has neither input_image nor input_image_raw")
    target = row.get("target_image")
    return Item(
        key=check_name(row.get("key"), "key"),
        task=task,
        instruction=check_instruction(row.get("instruction")),
        source=source,
        language=check_name(row.get("instruction_language"), "instruction_language"),
        target=None if target is None else check_image(target, root, "target_image"),
        shown_source=shown or raw,
        intersection=bool(row.get("Intersection_exist", False)),
    )


def reference_size(width: int, height: int, area: int = 512 * 512) -> tuple[int, int]:
    """The authors' size of the image given to an editor: about `area`, sides multiples of 32."""
    ratio = width / height
    wide = math.sqrt(area * ratio)
    new_width, new_height = round(wide / 32) * 32, round(wide / ratio / 32) * 32
    if new_width * new_height < area:
        new_width += 32
    elif new_width * new_height > area:
        new_width -= 32
    # Beyond the authors: a strip so thin that a side rounds to nothing keeps 32 pixels
    return max(new_width, 32), max(new_height, 32)
