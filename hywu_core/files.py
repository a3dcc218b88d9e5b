"""Safetensors files with a JSON header of ours: read with clear errors, written atomically."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import HYWUError

#: Key of the safetensors metadata under which our JSON header lies.
HEADER = "hywu"


@contextlib.contextmanager
def open_tensors(path: str | Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """`safetensors.safe_open` whose errors are HYWUErrors that name the file."""
    if not Path(path).is_file():
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


def parse_header(path: str | Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Our JSON header in a safetensors file's metadata; empty when there is none."""
    text = (metadata or {}).get(HEADER)
    if text is None:
        return {}
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise HYWUError(f"{path}: the '{HEADER}' header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise HYWUError(f"{path}: the '{HEADER}' header is not a JSON object.")
    return header


def read_tensors(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file, copied out of the file's memory map, and our header."""
    with open_tensors(path, device) as file:
        header = parse_header(path, file.metadata())
        # A clone, since a mapped file can't be overwritten on Windows and changes under us elsewhere
        return {key: file.get_tensor(key).clone() for key in file.keys()}, header  # noqa: SIM118


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
) -> Path:
    """Write a safetensors file through a temporary one beside it, so that none is ever half there.

    header: JSON-safe, stored under the key ``hywu``; metadata: further string entries.
    Raises HYWUError when the file exists and `overwrite` is False, or the folder can't be written.
    """
    path = with_suffix(path)
    text = {**(metadata or {}), HEADER: json.dumps(header)}
    data = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic_path(path, overwrite) as part:
        save_file(_unshared(data), str(part), metadata=text)
    return path


@contextlib.contextmanager
def atomic_path(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well, else removed."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise HYWUError(f"{path}: exists already; choose another name or allow overwriting.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise HYWUError(f"{path.parent}: can't be written ({error.strerror or error}).") from error
    part = Path(name)
    try:
        yield part
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except SafetensorError as error:  # what a full disk is to safetensors
        raise HYWUError(f"{path}: can't be written ({error}).") from error
    except OSError as error:
        raise HYWUError(f"{path}: can't be written ({error.strerror or error}).") from error
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`, moved onto it when the block ends well, else removed.

    Where `path` is a folder already and may be overwritten, the files in it that the new one lacks
    are kept. The old folder steps aside for the new one and comes back if that can't take its
    place; it is removed last. Raises HYWUError when `path` exists and `overwrite` is False, when it
    is a file, or when it can't be written.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()  # the folder it leads to is replaced, the link stays
    if path.exists() and not overwrite:
        raise HYWUError(f"{path}: exists already; choose another name or allow overwriting.")
    if path.exists() and not path.is_dir():
        raise HYWUError(f"{path}: is a file and a folder goes there; choose another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise HYWUError(f"{path.parent}: can't be written ({error.strerror or error}).") from error
    new = work / "new"
    try:
        new.mkdir()
        yield new
        if path.exists():
            _keep_others(path, new)
        _swap(path, new, work / "old")
    except OSError as error:
        raise HYWUError(f"{path}: can't be written ({error.strerror or error}).") from error
    finally:
        if not (work / "old").exists() or path.exists():
            shutil.rmtree(work, ignore_errors=True)


def _keep_others(old: Path, new: Path) -> None:
    """Copy what only the old folder has into the new one."""
    for item in old.iterdir():
        if not (new / item.name).exists():
            if item.is_dir() and not item.is_symlink():
                shutil.copytree(item, new / item.name, symlinks=True)
            else:
                shutil.copy2(item, new / item.name, follow_symlinks=False)


def _swap(path: Path, new: Path, aside: Path) -> None:
    """Put `new` in the place of `path`, whose folder, where there is one, goes `aside`."""
    # No system call exchanges two folders everywhere: between the two renames `path` is missing.
    if not path.exists():
        os.replace(new, path)
        return
    try:
        os.replace(path, aside)
        os.replace(new, path)
    except BaseException:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise


def _umask() -> int:
    # mkstemp makes files private; what a user saves gets his usual permissions
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
