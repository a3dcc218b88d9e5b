"""Files: safetensors with a JSON header of ours, JSON, text; names. Each has one reader and one writer.

What is written appears whole or not at all, see `atomic`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors import SafetensorError, safe_open

from .atomic import append_line, atomic_folder, atomic_path, folder_lock, reason
from .errors import HYWUError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "HEADER", "append_line", "as_json", "atomic_folder", "atomic_path", "check_fields", "check_name", "folder_lock", "is_device", "is_file", "open_tensors",
    "parse_header", "parse_json", "read_header", "read_json", "read_json_lines", "read_metadata", "read_tensors",
    "read_weights", "same_name", "save_tensors", "slug", "with_suffix", "write_json", "write_text",
]  # fmt: skip

#: Key of the safetensors metadata under which our JSON header lies.
HEADER = "hywu"
#: Characters that a name can't hold where it becomes part of a file's name.
FORBIDDEN = frozenset('/\\:*?"<>|') | frozenset(map(chr, (*range(32), *range(127, 160))))
#: Names that are devices on Windows, whatever follows behind a dot: what is written there is gone.
DEVICES = frozenset({"con", "prn", "aux", "nul", "conin$", "conout$"}) | {
    f"{port}{number}" for port in ("com", "lpt") for number in "0123456789\u00b9\u00b2\u00b3"
}

# -- safetensors -------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_tensors(path: str | Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """`safetensors.safe_open` whose errors are HYWUErrors that name the file."""
    if not is_file(path):
        raise HYWUError(f"{path}: there is no such file.")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise HYWUError(
            f"{path}: not a whole safetensors file ({error}); download or save it again."
        ) from error


def read_header(path: str | Path) -> dict[str, Any]:
    """Our JSON header of a safetensors file; empty when another program wrote it."""
    with open_tensors(path) as file:
        return parse_header(path, file.metadata())


def read_metadata(path: str | Path) -> dict[str, str]:
    """All metadata of a safetensors file, of whatever program."""
    with open_tensors(path) as file:
        return dict(file.metadata() or {})


def parse_header(path: str | Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Our JSON header in a safetensors file's metadata; empty when there is none."""
    text = (metadata or {}).get(HEADER)
    return {} if text is None else parse_json(text, f"{path}: the '{HEADER}' header", dict)


def read_tensors(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file, copied out of the file's memory map, and our header."""
    with open_tensors(path, device) as file:
        header = parse_header(path, file.metadata())
        # A clone, since a mapped file can't be overwritten on Windows and changes under us elsewhere
        return {key: file.get_tensor(key).clone() for key in file.keys()}, header  # noqa: SIM118


def read_weights(path: str | Path, finite: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`read_tensors` of a network's weights: floating point, 8-bit ones widened.

    finite: NaN and Infinity are errors.
    Raises HYWUError on values of another kind, which copying into a network would make numbers of.
    """
    import torch

    from .precision import FLOATS, widened

    tensors, header = read_tensors(path)
    tensors = {name: widened(value) for name, value in tensors.items()}
    for name, value in tensors.items():
        if value.dtype not in FLOATS:
            raise HYWUError(
                f"{path}: {name} is {value.dtype}, and weights are floating point. Get the file anew."
            )
        if finite and not torch.isfinite(value).all():
            raise HYWUError(f"{path}: {name} holds values that are not finite. Get the file anew.")
    return tensors, header


def with_suffix(path: str | Path) -> Path:
    """Where `save_tensors` writes: the path, with ``.safetensors`` added where it lacks it."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    durable: bool = True,
) -> Path:
    """Write a safetensors file through a temporary one beside it, so that none is ever half there.

    header: JSON-safe, stored under the key ``hywu``.
    metadata: further string entries.
    durable: see `atomic_path`.
    Raises HYWUError when the file exists and `overwrite` is False, or the folder can't be written.
    """
    from safetensors.torch import save_file  # torch only where tensors are

    path = with_suffix(path)
    text = {**(metadata or {}), HEADER: json.dumps(header)}
    data = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic_path(path, overwrite, durable) as part:
        save_file(_unshared(data), str(part), metadata=text)
    return path


# -- JSON and text -----------------------------------------------------------------------------------


def read_json(path: str | Path, kind: type | None = None, way_out: str = "", finite: bool = True):
    """A JSON file's content, with or without a byte order mark.

    kind: dict or list, where only that will do.
    way_out: what the user can do about a damaged file.
    finite: NaN and Infinity are errors.
    Raises HYWUError naming the file.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise HYWUError(f"{path}: can't be read ({reason(error)}).") from error
    return parse_json(data, str(path), kind, way_out, finite)


def parse_json(
    text: str | bytes,
    name: str,
    kind: type | None = None,
    way_out: str = "",
    finite: bool = True,
    unique: bool = False,
):
    """JSON text -> Python values; see `read_json`.

    name: whose text it is, for the error.
    unique: a key that an object gives twice is an error.
    """
    way_out = f"; {way_out}" if way_out else ""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        options: dict[str, Any] = {"object_pairs_hook": _unique} if unique else {}
        if finite:
            options |= {"parse_constant": _not_finite, "parse_float": _finite}
        data = json.loads(text, **options)
    except RecursionError as error:
        raise HYWUError(f"{name}: not JSON (nested too deeply){way_out}.") from error
    except UnicodeDecodeError as error:
        raise HYWUError(f"{name}: not JSON (not UTF-8 text: {error}){way_out}.") from error
    except ValueError as error:  # numbers of thousands of digits too
        raise HYWUError(f"{name}: not JSON ({error}){way_out}.") from error
    if kind is not None and not isinstance(data, kind):
        raise HYWUError(f"{name}: holds {_kind(data)}, {_KINDS[kind]} is needed{way_out}.")
    return data


def as_json(data: Any) -> Any:
    """JSON-safe data as a reader gives it back: tuples as lists, keys as text."""
    return json.loads(json.dumps(data))


def read_json_lines(path: str | Path) -> list[tuple[int, Any]]:
    """(line number, value) of each line of a JSONL file that isn't blank; a bad line's value is a HYWUError.

    Lines end with a line feed alone: an instruction may hold U+2028 and others, which JSON doesn't
    escape. Raises HYWUError when the file can't be read.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (OSError, ValueError) as error:
        raise HYWUError(f"{path}: can't be read ({reason(error)}).") from error
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append((number, parse_json(line, f"{path}, line {number}")))
            except HYWUError as error:
                rows.append((number, error))
    return rows


def write_json(
    path: str | Path, data: Any, indent: int | None = 2, ascii: bool = False, end: str = "\n"
) -> Path:
    """Write JSON through a temporary file, replacing one.

    ascii: other characters are escaped.
    """
    return write_text(path, json.dumps(data, indent=indent, ensure_ascii=ascii) + end)


def write_text(path: str | Path, text: str, overwrite: bool = True) -> Path:
    """Write UTF-8 text through a temporary file; lone surrogates are escaped."""
    with atomic_path(path, overwrite) as part:
        # in JSON the escape of a surrogate is the surrogate
        part.write_bytes(text.encode("utf-8", "backslashreplace"))
    return Path(path)


def check_fields(
    data: Mapping[str, Any],
    kinds: Mapping[str, type | tuple[type, ...]],
    name: str,
    null: bool = True,
) -> None:
    """Raise HYWUError unless every field that is there is of its kind; what a file says may be anything.

    kinds: field -> type or types; a field that is absent is not looked at.
    name: whose fields they are, for the error.
    null: whether a field may be null.
    """
    for field, kind in kinds.items():
        if field not in data or (null and data[field] is None):
            continue
        value = data[field]
        if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
            kinds_ = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(_KINDS.get(k, k.__name__) for k in kinds_)
            raise HYWUError(
                f"{name}: '{field}' is {_kind(value)}, {wanted} is needed; it is damaged."
            )


_KINDS: dict[type, str] = {
    dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number",
    bool: "true or false",
}  # fmt: skip


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _kind(data: Any) -> str:
    return "nothing" if data is None else _KINDS.get(type(data), "a number")


# -- names -------------------------------------------------------------------------------------------


def is_file(path: str | Path) -> bool:
    """Whether a file lies there; names that no file can have are no error."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long, a NUL
        return False


def check_name(value: object, what: str) -> str:
    """A text or number that is safe as part of a file's name, as text. Raises HYWUError naming `what`."""
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        size = 0
    unusable = FORBIDDEN & set(text) or not size or is_device(text)
    if not text or text.strip(" .") != text or unusable or len(text) > 120 or size > 240:
        raise HYWUError(f"its {what} is {value!r}, which can't be a file name")
    return text


def is_device(name: str) -> bool:
    """Whether Windows takes a file's name for a device."""
    return name.partition(".")[0].rstrip(" ").lower() in DEVICES


def same_name(name: str) -> str:
    """Equal for names that some disks don't tell apart: in other letters of the same, composed otherwise."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def slug(text: str) -> str:
    """A name as part of a file name: letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory: clone all but the first of each storage."""
    seen: set[int] = set()
    result = {}
    for key, value in tensors.items():
        pointer = value.untyped_storage().data_ptr()
        whole = value.untyped_storage().nbytes() == value.nbytes
        result[key] = value if whole and pointer not in seen else value.clone()
        seen.add(pointer)
    return result
