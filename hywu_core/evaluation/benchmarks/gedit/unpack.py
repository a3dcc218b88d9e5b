"""GEdit-Bench as published (parquet or arrow files) into the exported folder that `gedit` reads."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ....errors import HYWUError, need, one_line
from ....files import atomic_path, check_name, folder_lock, read_json, write_json, write_text
from ....images import image_format

FIELDS = ("task_type", "key", "instruction", "instruction_language", "Intersection_exist")
IMAGES = ("input_image", "input_image_raw")
INDEX = "gedit.jsonl"


def packed_files(folder: Path) -> list[Path]:
    """The parquet or arrow files of a folder, those of the train split first where splits are told."""
    for ending in ("parquet", "arrow"):
        files = sorted(folder.rglob(f"*.{ending}"))
        if files:
            return [f for f in files if "train" in f.name or f.parent.name == "train"] or files
    return []


def unpack(files: Sequence[Path], out: Path) -> Path:
    """Write ``gedit.jsonl`` and the images under `out`; returns `out`. Done once, then reused.

    Images keep their encoded bytes. Raises HYWUError naming the file when a field is missing.
    """
    done = out / "unpacked.json"
    states = [(str(file), file.stat()) for file in files]
    stamp = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
    if done.is_file() and (out / INDEX).is_file() and read_json(done) == stamp:
        return out
    with folder_lock(out):
        lines = []
        for number, row in enumerate(tqdm(_rows(files), desc="unpacking", unit="item")):
            entry: dict[str, Any] = {field: row[field] for field in FIELDS}
            for field in IMAGES:
                entry[field] = _write_image(row[field], out / field, _name(number, row))
            lines.append(json.dumps(entry, ensure_ascii=False, default=str))
        write_text(out / INDEX, "\n".join(lines) + "\n")
        write_json(done, stamp, indent=None, ascii=True, end="")
    return out


def _name(number: int, row: dict[str, Any]) -> str:
    """What an image's file is called: by key and task, where they can be part of a file's name."""
    try:
        named = check_name(row["key"], "key") + f"_{check_name(row['task_type'], 'task_type')}"
    except HYWUError:
        named = ""
    return f"{number:05d}_{named if 0 < len(named.encode()) <= 200 else f'row_{number:05d}'}"


def _rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    need("pyarrow", "to read GEdit-Bench's parquet or arrow files")
    for file in files:
        for batch in _batches(file):
            if missing := set(FIELDS) - set(batch.schema.names):
                raise HYWUError(
                    f"{file}: lacks the columns {', '.join(sorted(missing))}; is it GEdit-Bench?"
                )
            columns = [name for name in (*FIELDS, *IMAGES) if name in batch.schema.names]
            for row in batch.select(columns).to_pylist():
                yield {**dict.fromkeys(IMAGES), **row}


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            # A few rows at a time: each holds two photographs
            reader = pq.ParquetFile(file)
            _check_size(file, reader.metadata)
            yield from reader.iter_batches(batch_size=8)
            return
        with pa.memory_map(str(file)) as source:
            try:
                yield from pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                source.seek(0)
                reader = pa.ipc.open_file(source)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    except (pa.ArrowException, OSError) as error:
        raise HYWUError(
            f"{file}: not a whole parquet or arrow file ({one_line(error)})."
        ) from error


def _check_size(file: Path, metadata: Any) -> None:
    """Raises HYWUError for a file that would take many times its size: encoded images don't shrink."""
    groups = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    if sum(groups) > max(1 << 26, 20 * file.stat().st_size):
        raise HYWUError(
            f"{file}: its {file.stat().st_size:,} bytes would be {sum(groups):,} unpacked; that is no file "
            "of photographs: download it again."
        )


def _write_image(value: Any, folder: Path, name: str) -> str | None:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        return None
    # "broken": the row is kept; reading the item will name this file
    ending = (image_format(io.BytesIO(data)) or "broken").lower()
    path = folder / f"{name}.{ending}"
    if not path.is_file() or path.read_bytes() != data:
        with atomic_path(path, overwrite=True, durable=False) as part:
            part.write_bytes(data)
    return f"{folder.name}/{path.name}"
