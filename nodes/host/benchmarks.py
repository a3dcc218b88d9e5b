"""Where benchmarks may lie and results may go: inside ComfyUI's folders, unless the operator adds some."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...hywu_core.errors import HYWUError
from ...hywu_core.evaluation.benchmarks import find_benchmark
from ...hywu_core.evaluation.benchmarks.base import SAMPLES
from .paths import below

#: Key of extra_model_paths.yaml under which the operator names further folders.
EXTRA = "hywu_benchmarks"


def data_folder(benchmark: str, path: str) -> Path:
    """The benchmark's folder or file: our samples, or a path inside a folder that may be read.

    `path` is relative to the input or output folder or to one of the operator's, or absolute inside
    one of them. Raises HYWUError naming the folders when it is not there or leads out.
    """
    if path.strip() == SAMPLES:
        return find_benchmark(benchmark).sample
    return _found(path.strip())


def check_path(path: str | None) -> None:
    """HYWUError as `data_folder`; None is not known yet."""
    if path is not None and path.strip() != SAMPLES:
        _found(path.strip())


def _found(path: str) -> Path:
    roots = _roots()
    for root in roots:
        found = below(root, path) if path else None
        if found is not None and os.path.exists(found):
            return found
    raise HYWUError(
        f"'{path}': there is no such benchmark inside {', '.join(roots)}; copy it into the input folder "
        f"and give its name there, have the server's operator list its folder under '{EXTRA}' in "
        f"extra_model_paths.yaml, or write '{SAMPLES}' for the two items that come along."
    )


def data_stamp(benchmark: str, path: str) -> str:
    """Changes when the list of items does, so that ComfyUI reads it again."""
    try:
        found = data_folder(benchmark, path)
    except HYWUError:
        return "missing"
    files = [found]
    if found.is_dir():
        files += find_benchmark(benchmark).index_files(found)
    return ";".join(f"{file.name}:{file.stat().st_mtime_ns}" for file in files)


def results_folder(name: str) -> Path:
    """A folder below ComfyUI's output folder. Raises HYWUError when the name leads out of it."""
    folder = below(folder_paths.get_output_directory(), name.strip())
    if folder is None or not name.strip() or os.path.isabs(name.strip()):
        raise HYWUError(
            f"folder '{name}' leads out of ComfyUI's output folder; use a name below it, such as "
            "'hywu_eval'."
        )
    return folder


def _roots() -> list[str]:
    extra = folder_paths.folder_names_and_paths.get(EXTRA, ([], set()))[0]
    return [folder_paths.get_input_directory(), folder_paths.get_output_directory(), *extra]
