"""What a prompt made, in a folder on this machine: under the server's names, and over nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import HYWUError
from ..files import FORBIDDEN, atomic_path, is_device, parse_json
from .client import Client

#: Bytes of a file's name: what every file system takes, with room for a number behind it.
LONGEST = 200


def check_folder(folder: Path) -> None:
    """Raises HYWUError where a folder of this name can't be made or written to. Makes nothing."""
    there = folder.absolute()
    try:
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except (OSError, ValueError):
        usable = False
    if not usable:
        what = "is no folder" if there.exists() and not there.is_dir() else "can't be written to"
        raise HYWUError(f"--out {folder}: {there} {what}; name another folder.")


def safe_name(name: str) -> str:
    """A file name without folders, drive letters or characters that some system refuses."""
    last = name.replace("\\", "/").rpartition("/")[2]
    last = "".join("_" if c in FORBIDDEN or not c.isprintable() else c for c in last)
    last = last.lstrip(".").rstrip(" .")
    stem, suffix = os.path.splitext(last)
    stem = stem.encode()[: LONGEST - len(suffix.encode()[:20])].decode("utf-8", "ignore")
    name = stem + suffix[:20] or "unnamed"
    return f"_{name}" if is_device(name) else name


def save_new(path: Path, content: bytes) -> Path:
    """Write a file at `path`, or at the first of `stem-2`, `stem-3`, … that nothing has, also not by now.

    Raises HYWUError where the folder can't be written.
    """
    found, number = path, 1
    while True:
        if not os.path.lexists(found):
            try:
                with atomic_path(found) as part:
                    part.write_bytes(content)
                return found
            except HYWUError:
                if not os.path.lexists(found):
                    raise
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")


async def save_output(
    client: Client, folder: Path, node: str, name: str, number: int, item: Any
) -> Path | None:
    """Fetch and save one output of a history record; None for flags such as `animated`."""
    if isinstance(item, dict) and isinstance(item.get("filename"), str):
        return save_new(folder / safe_name(item["filename"]), await client.fetch(item))
    if not isinstance(item, str):
        return None
    try:
        parse_json(item, "the text")
        suffix = "json"
    except HYWUError:
        suffix = "txt"
    file = folder / safe_name(f"{node}-{name}-{number}.{suffix}")
    return save_new(file, item.encode("utf-8", "backslashreplace"))
