"""A user's own pairs: rows of JSONL files, files side by side in a folder, tar shards, parquet and arrow files.

Whatever they lie in, a pair is a source, a target, an instruction, a task and up to two references.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from .. import fingerprint
from ..errors import HYWUError, get_logger, need, one_line
from ..files import parse_json, read_json_lines
from ..images import MAX_SIDE, SUFFIXES, image_size, load_image, read_image
from .workers import in_workers

logger = get_logger(__name__)

#: Images of a row besides source and target.
MAX_REFERENCES = 2


@dataclass(frozen=True)
class Stored:
    """An image inside another file.

    name: for messages.
    read: its bytes.
    """

    name: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


#: Where an image lies.
Source = Path | Stored


@dataclass(frozen=True)
class Pair:
    """One example of a user: images and what was asked.

    references: images for the condition only.
    size: (width, height) of source and target where that was looked at.
    """

    source: Source
    target: Source
    instruction: str
    task: str
    references: tuple[Source, ...] = ()
    size: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def images(self) -> tuple[Source, ...]:
        return (self.source, self.target, *self.references)


def read_source(image: Source, max_side: int = MAX_SIDE) -> Tensor:
    """uint8 ``[3, H, W]``, at most `max_side` pixels per side. Raises HYWUError naming the image."""
    if isinstance(image, Path):
        return read_image(image, max_side)
    try:
        return read_image(io.BytesIO(image.read()), max_side)
    except HYWUError as error:
        raise HYWUError(f"{image}: {error}") from error


def size_of(pair: Pair) -> tuple[int, int]:
    """(width, height) of source and target. Raises HYWUError naming the image where it isn't a whole one."""
    return pair.size or _size(pair.source)


def _size(image: Source) -> tuple[int, int]:
    """(width, height). Raises HYWUError naming the image where it isn't a whole one."""
    if isinstance(image, Path):
        return image_size(image)
    try:
        return load_image(io.BytesIO(image.read())).size
    except HYWUError as error:
        raise HYWUError(f"{image}: {error}") from error


def pairs_identity(pairs: Sequence[Pair]) -> str:
    """16 digits of all rows: texts and images (of large files some places); the same on another machine."""

    @lru_cache(None)
    def content(image: Source) -> str:
        if isinstance(image, Path):
            return fingerprint.sampled([image])
        return fingerprint.digest([image.read()])

    rows = [[p.instruction, p.task, *map(content, p.images)] for p in pairs]
    return fingerprint.of_json(rows, 16)


def phrasings(pairs: Iterable[Pair], most: int = 16) -> dict[str, list[str]]:
    """Task -> the first instructions asked for it; kept in a checkpoint's provenance."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        texts = found.setdefault(pair.task, [])
        if pair.instruction not in texts and len(texts) < most:
            texts.append(pair.instruction)
    return found


def held_out(pairs: Sequence[Pair], share: float, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, pairs kept from it): about `share` of the source images with all that is asked of them.

    The same images whatever the order of the rows. Raises HYWUError where either side would be empty.
    """
    if not 0 < share < 1:
        raise HYWUError(f"training: a validation share of {share}; it must be between 0 and 1.")
    names = {PurePosixPath(str(pair.source)).name for pair in pairs}
    ordered = sorted(names, key=lambda name: fingerprint.digest([f"{seed} {name}"]))
    kept = set(ordered[: max(1, round(share * len(ordered)))])
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[PurePosixPath(str(pair.source)).name in kept].append(pair)
    if not all(sides):
        raise HYWUError(
            f"training: {len(names)} source images can't be split for validation; give more, or none of it."
        )
    return sides


def number_of_references(pairs: Sequence[Pair]) -> int:
    """As many as every pair has. Raises HYWUError naming two pairs that differ."""
    first = pairs[0]
    for pair in pairs:
        if len(pair.references) != len(first.references):
            raise HYWUError(
                f"training: {first.source} has {len(first.references)} references and {pair.source} has "
                f"{len(pair.references)}; give every row the same number."
            )
    return len(first.references)


# -- reading ---------------------------------------------------------------------------------------


def read_pairs(path: str | Path) -> tuple[list[Pair], list[str]]:
    """The pairs of a file or a folder, whichever of `READERS` it is for.

    Returns the good ones and a line for each bad one, which names file and row and says what is wrong.
    Raises HYWUError when there is nothing to read, or no row is good.
    """
    path = Path(path)

    def look(row: Row) -> Pair | str:
        where, made = row
        try:
            if isinstance(made, HYWUError):
                raise made
            return _checked(made())
        except HYWUError as error:
            return f"{where}: {error}"

    pairs, bad = [], []
    for found in in_workers(look, _reader(path)(path)):
        (bad if isinstance(found, str) else pairs).append(found)
    for text in bad:
        logger.warning("skipped: %s", text)
    if not pairs:
        raise HYWUError(f"{path}: none of {len(bad)} rows can be used. First: {(bad or ['-'])[0]}")
    return pairs, bad


#: Where a row stands, and what makes its pair, or why it can't be read.
Row = tuple[str, "Callable[[], Pair] | HYWUError"]


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    for find, reader in READERS:
        if path.is_dir() and any(path.glob(find)):
            return reader
        if path.is_file() and path.match(find) and reader is not _folder:
            return reader
    kinds = ", ".join(find for find, _ in READERS)
    what = "holds no" if path.is_dir() else "is no"
    raise HYWUError(
        f"{path}: {what} .jsonl file with rows of source, target, instruction, task, nor any other kind of "
        f"pairs ({kinds}); see docs/training.md."
    )


def _files(path: Path, pattern: str) -> list[Path]:
    return sorted(path.glob(pattern)) if path.is_dir() else [path]


def _jsonl(path: Path) -> Iterator[Row]:
    """Rows ``{source, target, instruction, task, references}``; paths count from the file's folder."""
    for file in _files(path, "*.jsonl"):
        for number, row in read_json_lines(file):
            where = f"{file}, row {number}"
            if isinstance(row, HYWUError):
                yield where, row
            else:
                yield where, lambda row=row, folder=file.parent: _of_row(row, folder)


def _of_row(row: Any, folder: Path) -> Pair:
    if not isinstance(row, Mapping):
        raise HYWUError("not a JSON object")
    for key in ("source", "target", "instruction"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise HYWUError(f"'{key}' is missing or empty")
    references = row.get("references") or []
    if not isinstance(references, list) or not all(
        isinstance(n, str) and n.strip() for n in references
    ):
        raise HYWUError("'references' is not a list of names of images")
    return Pair(
        folder / row["source"],
        folder / row["target"],
        row["instruction"],
        str(row.get("task") or "custom"),
        tuple(folder / name for name in references),
    )


def _folder(path: Path) -> Iterator[Row]:
    """Files ``name.source.png``, ``name.target.png``, ``name.txt`` side by side; see `_of_sample`."""
    samples: dict[str, dict[str, Source]] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            name, _, kind = file.name.partition(".")
            samples.setdefault(str(file.parent / name), {})[kind.lower()] = file
    for name, files in samples.items():
        if any(kind.startswith("source.") for kind in files):
            yield name, lambda files=files: _of_sample(files)


def _shards(path: Path) -> Iterator[Row]:
    """Tar files of webdataset's form: members ``name.source.png`` and so on; see `_of_sample`."""
    for file in _files(path, "*.tar"):
        samples: dict[str, dict[str, Source]] = {}
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        place = PurePosixPath(member.name)
                        name, _, kind = place.name.partition(".")
                        stored = _member(file, member.name, member.offset_data, member.size)
                        samples.setdefault(str(place.with_name(name)), {})[kind.lower()] = stored
        except (tarfile.TarError, OSError) as error:
            yield str(file), HYWUError(f"not a whole tar file ({one_line(error)})")
        for name, files in samples.items():
            yield f"{file}, {name}", lambda files=files: _of_sample(files)


def _member(file: Path, name: str, offset: int, size: int) -> Stored:
    def read() -> bytes:
        with file.open("rb") as handle:
            handle.seek(offset)
            return handle.read(size)

    return Stored(f"{file}:{name}", read)


def _of_sample(files: Mapping[str, Source]) -> Pair:
    """From files by what follows their common name: ``source.png``, ``target.png``, ``reference1.png``, ``txt``
    with the instruction, or ``json`` with instruction and task.
    """
    images = {kind.partition(".")[0]: f for kind, f in files.items() if kind.endswith(SUFFIXES)}
    texts: dict[str, Any] = {"instruction": "", "task": ""}
    if "txt" in files:
        texts["instruction"] = _text(files["txt"]).strip()
    if "json" in files:
        texts |= parse_json(_text(files["json"]), str(files["json"]), dict)
    for key in ("source", "target"):
        if key not in images:
            raise HYWUError(f"'{key}' is missing (name.{key}.png)")
    if not isinstance(texts["instruction"], str) or not texts["instruction"].strip():
        raise HYWUError("the instruction is missing or empty (name.txt, or name.json)")
    references = tuple(images[k] for k in sorted(images) if k.startswith("reference"))
    task = str(texts["task"] or "custom")
    return Pair(images["source"], images["target"], texts["instruction"], task, references)


def _text(file: Source) -> str:
    try:
        data = file.read_bytes() if isinstance(file, Path) else file.read()
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise HYWUError(f"{file}: can't be read as UTF-8 text ({error})") from error


def _parquet(path: Path) -> Iterator[Row]:
    """Parquet files; see `_of_columns`."""
    parquet = need("pyarrow.parquet", "to read parquet files", "pyarrow")

    def parts(file: Path) -> Iterator[list[dict[str, Any]]]:
        table = parquet.ParquetFile(file)
        for group in range(table.num_row_groups):
            yield table.read_row_group(group).to_pylist()

    return _tables(_files(path, "*.parquet"), "parquet", parts)


def _arrow(path: Path) -> Iterator[Row]:
    """What `save_to_disk` of `datasets` leaves; see `_of_columns`."""
    arrow = need("pyarrow", "to read arrow files")
    stream = need("pyarrow.ipc", "to read arrow files", "pyarrow").open_stream

    def parts(file: Path) -> Iterator[list[dict[str, Any]]]:
        with arrow.memory_map(str(file)) as mapped, stream(mapped) as batches:
            for batch in batches:
                yield batch.to_pylist()

    return _tables(_files(path, "*.arrow"), "arrow", parts)


def _tables(
    files: Iterable[Path], kind: str, parts: Callable[[Path], Iterator[list[dict[str, Any]]]]
) -> Iterator[Row]:
    """Rows of tables that are read part by part."""
    for file in files:
        try:
            for number, row in enumerate(chain.from_iterable(parts(file))):
                where = f"{file}, row {number}"
                yield where, partial(_of_columns, row, where, file.parent)
        # pyarrow's errors have no class in common but this and OSError
        except (ValueError, OSError) as error:
            if isinstance(error, HYWUError):
                raise
            yield str(file), HYWUError(f"not a whole {kind} file ({one_line(error)})")


def _of_columns(row: Mapping[str, Any], where: str, folder: Path) -> Pair:
    """Of source and target (bytes, or the ``{bytes, path}`` of `datasets`), instruction, task, references.

    folder: what a path counts from, where there are no bytes.
    """

    def image(value: Any, name: str) -> Source:
        data = value
        if isinstance(value, Mapping):
            data, path = value.get("bytes"), value.get("path")
            if data is None and isinstance(path, str):
                return folder / path
        if not isinstance(data, bytes):
            raise HYWUError(f"'{name}' holds no image's bytes")
        return Stored(f"{where}, {name}", lambda: data)

    if not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
        raise HYWUError("'instruction' is missing or empty")
    further = row.get("references") or []
    return Pair(
        image(row.get("source"), "source"),
        image(row.get("target"), "target"),
        row["instruction"],
        str(row.get("task") or "custom"),
        tuple(image(value, f"reference {i}") for i, value in enumerate(further, 1)),
    )


#: What a folder holds, or a file is -> who reads it. The first that fits does.
READERS: tuple[tuple[str, Callable[[Path], Iterator[Row]]], ...] = (
    ("*.jsonl", _jsonl),
    ("*.tar", _shards),
    ("*.parquet", _parquet),
    ("*.arrow", _arrow),
    ("**/*.source.*", _folder),
)


def _checked(pair: Pair) -> Pair:
    """A pair whose images can all be read, source and target of one size."""
    if len(pair.references) > MAX_REFERENCES:
        raise HYWUError(
            f"'references' names {len(pair.references)} images; {MAX_REFERENCES} are the most"
        )
    sizes = [_size(image) for image in pair.images]
    if sizes[0] != sizes[1]:
        names = [PurePosixPath(str(i)).name for i in (pair.source, pair.target)]
        raise HYWUError(f"{names[0]} is {sizes[0]} and {names[1]} is {sizes[1]}")
    return replace(pair, size=sizes[0])
