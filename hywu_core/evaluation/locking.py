"""One run at a time on a results folder, and a folder cleared of what a killed run left half done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import HYWUError

LOCK = ".hywu.lock"


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when the process ends, however it ends.

    Raises HYWUError when another process holds it. Inside, temporary files of killed runs are gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+b") as file:
        try:
            _lock(file)
        except OSError as error:
            raise HYWUError(
                f"{folder}: another run is working on this folder; wait for it, or choose another."
            ) from error
        # Safe only under the lock: nobody else can be writing them
        for part in folder.rglob(".*.part"):
            part.unlink(missing_ok=True)
        yield


def _lock(file) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
