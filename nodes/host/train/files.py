"""Files of a training inside ComfyUI: the pairs, the run's folder, the checkpoint, the cache of tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths

from ....hywu_core.errors import HYWUError
from ....hywu_core.files import as_json, check_name, read_json, read_json_lines, write_json
from ....hywu_core.generator.checkpoints import open_checkpoint
from ....hywu_core.training.pairs import Pair, read_pairs
from ..paths import BUNDLED, below

#: The pairs that come with the extension.
SAMPLES = "samples"
_SAMPLES = Path(__file__).resolve().parents[3] / "workflows" / "inputs" / "pairs"
#: Folder of all trainings, below ComfyUI's output folder.
FOLDER = "hywu_training"
RECORD = "run.json"


# -- the pairs ---------------------------------------------------------------------------------------


def pairs_path(text: str) -> tuple[Path, Path]:
    """(a folder or .jsonl file, the folder that its images may not leave). Raises HYWUError."""
    if text.strip() == SAMPLES:
        return _SAMPLES, _SAMPLES.parent
    root = Path(os.path.realpath(folder_paths.get_input_directory()))
    found = below(str(root), text.strip())
    if not text.strip() or found is None or not os.path.exists(found):
        raise HYWUError(
            f"pairs '{text}': there is no such folder or .jsonl file inside {root}; copy it there and "
            f"give its name, or write '{SAMPLES}' for the pairs that come along."
        )
    return found, root


def training_pairs(text: str) -> tuple[list[Pair], list[str]]:
    """(usable pairs, one line per row that isn't). Raises HYWUError when an image lies outside."""
    path, root = pairs_path(text)
    for file in _lists(path):
        for number, row in read_json_lines(file):
            for name in _named(row):
                if not Path(os.path.realpath(file.parent / name)).is_relative_to(root):
                    raise HYWUError(
                        f"{file}, row {number}: '{name}' lies outside {root}; copy the image beside "
                        "the list."
                    )
    return read_pairs(path)


def pairs_stamp(text: str) -> str:
    """Changes when a list of pairs does, so that ComfyUI trains again."""
    try:
        files = _lists(pairs_path(text)[0])
    except HYWUError:
        return "missing"
    return ";".join(f"{file.name}:{file.stat().st_mtime_ns}" for file in files)


def _lists(path: Path) -> list[Path]:
    return sorted(path.glob("*.jsonl")) if path.is_dir() else [path]


def _named(row: Any) -> list[str]:
    """The images that a row names; rows that can't be read are reported by `read_pairs`."""
    if not isinstance(row, dict):
        return []
    further = row.get("references")
    values = [row.get("source"), row.get("target")]
    values += further if isinstance(further, list) else [further]
    return [value for value in values if isinstance(value, str)]


# -- the run -----------------------------------------------------------------------------------------


def check_names(name: str | None, pairs: str | None) -> None:
    """HYWUError on a run's name, or on pairs, that can't be used; None is not known yet."""
    if name is not None:
        _checked(name)
    if pairs is not None:
        pairs_path(pairs)


def run_folder(name: str) -> Path:
    """Folder of state, log, samples and cache. Raises HYWUError on a name that is no file name."""
    return Path(folder_paths.get_output_directory()) / FOLDER / _checked(name)


def checkpoint_path(name: str) -> Path:
    """Where Load Generator finds the trained generator."""
    return Path(folder_paths.get_folder_paths("hywu")[0]) / f"{_checked(name)}.safetensors"


def _checked(name: str) -> str:
    try:
        name = check_name(name.strip(), "name")
    except HYWUError as error:
        raise HYWUError(f"name can't be used: {error}; take letters and digits.") from error
    if name == BUNDLED:
        raise HYWUError(f"name '{name}' is the bundled generator's; choose another one.")
    return name


def start_run(name: str, made_from: Mapping[str, Any]) -> str:
    """The run's identity: a new one, or that of an earlier start from the same things.

    Raises HYWUError when the name is another run's, or a generator of that name is from elsewhere.
    """
    folder, target = run_folder(name), checkpoint_path(name)
    record = folder / RECORD
    wanted = as_json(made_from)
    run = os.urandom(8).hex()
    if record.exists():
        found = read_json(record, dict, "move it away to start anew")
        run, earlier = found.get("run"), found.get("made_from")
        if not isinstance(run, str) or not isinstance(earlier, dict):
            raise HYWUError(
                f"{record}: doesn't say which run this is; move {folder} away to start anew."
            )
        changed = [key for key in wanted if earlier.get(key) != wanted[key]]
        if changed:
            raise HYWUError(
                f"{folder}: was started from another {', another '.join(changed)}; set them back to go on, "
                "or choose another name."
            )
    if target.exists() and _run_of(target) != run:
        raise HYWUError(
            f"{target}: exists and is not of this training; choose another name, or move it away."
        )
    write_json(record, {"run": run, "made_from": wanted}, indent=1, ascii=True, end="")
    return run


def _run_of(target: Path) -> str | None:
    """The run that wrote a generator; None for a file of another origin."""
    try:
        return open_checkpoint(target).config.provenance.get("run")
    except HYWUError:
        return None
