"""What a file or folder holds: a generator, a LoRA, a condition, an editor, a training's state, results.

Examples:
  hywu inspect HY-WU/                     layout and size; reads headers only, however large
  hywu inspect lora.safetensors --norms   also the norm of each target's scale*B*A
  hywu inspect lora.safetensors --full    everything, where usually a screen of it is shown
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..condition import FORMAT as CONDITION
from ..errors import HYWUError, printable
from ..files import is_file, open_tensors, read_header, read_json, read_json_lines
from ..formats import load_lora, lora_header
from ..formats.native import layout_of
from ..formats.peft import weights_of
from ..generator.checkpoints import open_checkpoint
from ..layout import LoRALayout
from .console import say, table
from .convert import is_generator

#: Lines of metadata and rows of a table that a screen of 24 lines has room for.
LINES, ROWS = 13, 8
#: Files by which a folder of ours is known -> what it is called.
FOLDERS = {"hywu_run.json": "evaluation results", "plan.json": "conflict experiment"}


class Found(NamedTuple):
    """metadata: what is said line by line.

    rows, header: the table.
    json: what programs get.
    """

    metadata: dict[str, Any]
    rows: Sequence[Sequence[object]]
    header: Sequence[str]
    json: dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a file or folder of ours, or a LoRA in any format")
    parser.add_argument("--norms", action="store_true", help="norms per target (reads the LoRA)")
    parser.add_argument("--json", action="store_true", help="write JSON for programs")
    parser.add_argument("--full", action="store_true", help="everything, however long")


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    look, lora = _what(path)
    if args.norms and not lora:
        raise HYWUError(f"{path}: is no LoRA, which --norms needs.")
    found = _lora(args.path, args.norms) if lora else look(path)
    if args.json:
        say(json.dumps(found.json, indent=2))
        return 0
    width = shutil.get_terminal_size((100, 24)).columns
    _tell_metadata({k: v for k, v in found.metadata.items() if k != "norms"}, args.full, width)
    if found.rows:
        say()
        _tell_rows(found.rows, found.header, args.full)
    if args.norms:
        say()
        norms = found.metadata["norms"].items()
        rows = [(path, " ".join(f"{v:.4g}" for v in values)) for path, values in norms]
        _tell_rows(rows, ("target", "norm of each item"), True)
    return 0


def _what(path: Path) -> tuple[Callable[[Path], Found], bool]:
    """(how to look at it, whether it is a LoRA)."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return _generator, False
        if any((path / name).is_file() for name in FOLDERS):
            return _folder, False
        return _tensors, True
    if path.suffix == ".jsonl" and is_file(path):
        return _judgements, False
    if is_generator(path):
        return _generator, False
    kind = str(read_header(path).get("format", ""))
    other = kind.startswith("hywu-") and not kind.startswith("hywu-lora")
    return _tensors, not other


# -- for people -------------------------------------------------------------------------------------


def _tell_metadata(metadata: Mapping[str, Any], full: bool, width: int) -> None:
    lines = [f"{key}: {_text(value, full)}" for key, value in metadata.items()]
    if not full and len(lines) > LINES:
        # plain values share lines; what has parts keeps its own
        plain = [
            k
            for k, v in metadata.items()
            if k != "kind" and not isinstance(v, (dict, list)) and len(str(v)) < 24
        ]
        joined = ", ".join(f"{k} {metadata[k]}" for k in plain)
        rest = [f"{k}: {_text(metadata[k], full)}" for k in metadata if k not in plain]
        lines = [rest[0], *textwrap.wrap(joined, width), *rest[1:]]
    for line in lines:
        short = line if full or len(line) <= width else f"{line[: width - 10].rstrip()} … --full"
        say(_clean(short))


def _text(value: Any, full: bool) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)
    if full or not isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    return ", ".join(
        f"{k} {v if isinstance(v, (str, int, float)) else '…' if v else 'none'}"
        for k, v in value.items()
    )


def _tell_rows(rows: Sequence[Sequence[object]], header: Sequence[str], full: bool) -> None:
    shown = rows if full or len(rows) <= ROWS + 1 else rows[:ROWS]
    table([[_clean(str(cell)) for cell in row] for row in shown], header)
    if len(shown) < len(rows):
        say(f"… and {len(rows) - len(shown)} more (--full)")


def _clean(text: str) -> str:
    """Without what would steer a terminal: file headers are anybody's text."""
    return printable("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


# -- each kind -----------------------------------------------------------------------------------------


def _generator(path: str | Path) -> Found:
    source = open_checkpoint(path)
    parameters, size = 0, 0
    for file in source.files:
        size += file.stat().st_size
        with open_tensors(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                parameters += math.prod(opened.get_slice(key).get_shape())
    config = source.config.to_json()
    layout = source.config.layout
    for key in ("layout", "layout_digest"):
        config.pop(key, None)
    metadata = {"kind": "generator", "parameters": parameters, "bytes": size}
    return _of_layout(layout, {**metadata, "rank": layout.rank, "alpha": layout.alpha, **config})


def _lora(path: str, norms: bool) -> Found:
    header = lora_header(path)
    if header is not None and not norms:
        try:
            layout = layout_of(header)
            _check_count(path, layout, header)
        except HYWUError as error:
            raise HYWUError(f"{path}: {error}") from error
        batch, provenance = header.get("batch_size", 1), header.get("provenance", {})
        kind = header["format"]
        measured: dict[str, Any] = {}
    else:
        lora = load_lora(Path(path))
        layout, batch, provenance = lora.layout, lora.batch_size, dict(lora.provenance)
        kind = header["format"] if header else "foreign LoRA"
        measured = (
            {"norms": {p: value.tolist() for p, value in lora.norms().items()}} if norms else {}
        )
    metadata = {"kind": kind, "batch_size": batch, "rank": layout.rank, "alpha": layout.alpha}
    metadata["values"] = layout.num_values * batch
    return _of_layout(layout, {**metadata, "provenance": provenance, **measured})


def _check_count(path: str, layout: LoRALayout, header: Mapping[str, Any]) -> None:
    """Raises HYWUError where the file holds another number of values than its header says."""
    held = 0
    with open_tensors(weights_of(Path(path))) as file:
        for key in file.keys():  # noqa: SIM118
            if not key.endswith(".alpha"):
                held += math.prod(file.get_slice(key).get_shape())
    said = layout.num_values * header.get("batch_size", 1)
    # a native file's tokens are filled up
    if held < said or (held > said and header["format"] != "hywu-lora-1"):
        raise HYWUError(
            f"its header says {said:,} values and the file holds {held:,}; another program changed it."
        )


def _of_layout(layout: LoRALayout, metadata: dict[str, Any]) -> Found:
    rows = [(*row[:4], f"{row[4]:,}") for row in layout.describe()]
    header = ("layers", "count", "module", "out x in", "values")
    return Found(metadata, rows, header, {**metadata, "layout": layout.to_json()})


def _tensors(path: Path) -> Found:
    """A file of ours that is neither generator nor LoRA: its header, and its tensors by groups."""
    header = read_header(path)
    groups: dict[str, list[int]] = {}
    with open_tensors(path) as file:
        for key in file.keys():  # noqa: SIM118
            shape = file.get_slice(key).get_shape()
            name = f"{key} {list(shape)}" if header.get("format") == CONDITION else _group(key)
            counted = groups.setdefault(name, [0, 0])
            counted[0] += 1
            counted[1] += math.prod(shape)
    metadata = {"kind": header.pop("format"), "bytes": path.stat().st_size}
    metadata |= {"values": sum(values for _, values in groups.values()), **header}
    rows = [(name, count, f"{values:,}") for name, (count, values) in groups.items()]
    tensors = {
        name: {"tensors": count, "values": values} for name, (count, values) in groups.items()
    }
    return Found(metadata, rows, ("tensors", "count", "values"), {**metadata, "tensors": tensors})


def _group(key: str) -> str:
    """``blocks.3.attn.qkv.weight`` -> ``blocks.*``."""
    parts = key.split(".")
    cut = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join([*parts[:cut], "*"]) if len(parts) > 1 else key


def _folder(path: Path) -> Found:
    """A folder of results or of the experiment, by what it says of itself."""
    name = next(name for name in FOLDERS if (path / name).is_file())
    said = read_json(path / name, dict, finite=False)
    rows: dict[str, list[int]] = {}
    for file in path.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            counted = rows.setdefault(file.suffix or file.name, [0, 0])
            counted[0] += 1
            counted[1] += file.stat().st_size
    metadata = {"kind": FOLDERS[name], **{k: v for k, v in said.items() if k != "format"}}
    listed = [(kind, count, f"{size:,}") for kind, (count, size) in sorted(rows.items())]
    return Found(
        metadata,
        listed,
        ("files", "count", "bytes"),
        {**metadata, "files": dict(sorted(rows.items()))},
    )


def _judgements(path: Path) -> Found:
    """A file of judgements: whose they are, and how many of each outcome."""
    values = [value for _, value in read_json_lines(path)]
    rows = [value for value in values if isinstance(value, dict)]
    if not rows or not str(rows[0].get("format", "")).startswith("hywu-"):
        raise HYWUError(f"{path}: not a file of ours; `hywu eval` writes judgements so.")
    kind = {"kind": rows[0].pop("format"), "lines": len(values) - 1}
    counts = Counter(str(row.get("status", "?")) for row in rows[1:])
    metadata = {**kind, **rows[0]}
    return Found(metadata, sorted(counts.items()), ("outcome", "count"), {**metadata, **counts})
