"""Files and folders that are whole or not there, and one run at a time in a folder.

What is written lies in a temporary file or folder beside its place until it is whole and on the disk.
Temporary ones that a killed process left are swept by the next process that writes beside them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import HYWUError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: The lock's file in a folder, see `folder_lock`.
LOCK = ".hywu.lock"
#: How names of temporary files and folders end.
PART = ".hywu.part"

#: Folders that this process has swept.
_swept: set[Path] = set()


def reason(error: BaseException) -> str:
    """What an error of the system says, without the file's name."""
    return str(getattr(error, "strerror", None) or error)


def real_path(path: str | Path) -> Path:
    """The absolute path with links followed; unlike `Path.resolve`, also of links that lead in a circle."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        return Path(os.path.abspath(path))


@contextlib.contextmanager
def atomic_path(path: str | Path, overwrite: bool = False, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well, else removed.

    durable: wait until the disk has it, so that a loss of power leaves the old file or the new one; off for
        what can be made again.
    Raises HYWUError when the file exists and `overwrite` is False, also when it came meanwhile, or when the
    folder can't be written.
    """
    path = Path(path)
    _refuse_existing(path, overwrite)
    # the file lies in a folder of its own: some writers make a file anew, which would lose a lock on it
    with _work_folder(path) as work:
        part = work / "file.part"  # no model's suffix: ComfyUI lists what it finds
        try:
            part.touch()
            yield part
            if durable:
                _sync(part)
            os.chmod(part, 0o666 & ~_umask())
            _place(part, path, overwrite)
            if durable:
                _sync_folder(path.parent)
        # a SafetensorError is what a full disk is to safetensors
        except (OSError, SafetensorError) as error:
            raise HYWUError(f"{path}: can't be written ({reason(error)}).") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def append_line(path: str | Path, line: bytes, durable: bool = True) -> None:
    """Add a line to a file, whole or not at all: on a disk that gets full the file is as it was.

    Half a line that a killed process left is ended first.
    durable: wait until the disk has it.
    Raises HYWUError naming the file when it can't be written.
    """
    line = line.removesuffix(b"\n") + b"\n"
    try:
        with open(path, "ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[file.write(rest) :]
                if durable:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise HYWUError(f"{path}: can't be written ({reason(error)}).") from error


@contextlib.contextmanager
def atomic_folder(
    path: str | Path,
    overwrite: bool = False,
    drop: Callable[[str], object] = lambda name: False,
) -> Iterator[Path]:
    """A temporary folder beside `path`, moved onto it when the block ends well, else removed.

    Where `path` is a folder already and may be overwritten, the files in it that the new one lacks
    are kept, but for those whose names `drop` says yes to. The old folder steps aside for the new one and comes back if that can't take its
    place; it is removed last. Raises HYWUError when `path` exists and `overwrite` is False, when it
    is a file, or when it can't be written.
    """
    path = Path(path)
    if path.is_symlink():
        path = real_path(path)  # the folder it leads to is replaced, the link stays
    _refuse_existing(path, overwrite)
    if path.exists() and not path.is_dir():
        raise HYWUError(f"{path}: is a file and a folder goes there; choose another name.")
    with _work_folder(path) as work:
        new, aside = work / "new", work / "old" / path.name
        try:
            new.mkdir()
            aside.parent.mkdir()
            yield new
            if overwrite and path.exists():
                _keep_others(path, new, drop)
            for file in new.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    _sync(file)
            if overwrite:
                _swap(path, new, aside)
            else:
                _place_folder(new, path)
            _sync_folder(path.parent)
        except HYWUError as error:
            # a writer in the block knows its files by names that are gone when this is read
            raise HYWUError(str(error).replace(str(new), str(path))) from error
        except (OSError, SafetensorError) as error:
            raise HYWUError(f"{path}: can't be written ({reason(error)}).") from error
        finally:
            if path.exists() or not aside.exists():
                shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, locked as long as it is written to; whoever uses it removes it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, once=True)
        work = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=PART, dir=path.parent))
    except (OSError, ValueError) as error:
        raise HYWUError(f"{path.parent}: can't be written ({reason(error)}).") from error
    handle = None
    try:
        # a process holds a lock on what it writes, which the system takes from it however it ends
        with contextlib.suppress(OSError):  # Windows, a file system without locks
            handle = os.open(work, os.O_RDONLY)
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield work
    finally:
        if handle is not None:
            os.close(handle)


def sweep(folder: Path, once: bool = False, alone: bool = False) -> None:
    """Remove what killed processes left half written in a folder; a folder that had stepped aside returns.

    once: only at this process' first call for the folder.
    alone: nobody else writes into the folder (its lock is held); else what was made a moment ago is left.
    """
    folder = Path(os.path.abspath(folder))
    if once and folder in _swept:
        return
    _swept.add(folder)
    with contextlib.suppress(OSError):
        for part in list(folder.glob(f".*{PART}")):
            if alone or _abandoned(part):
                _remove(part)


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):
        if not part.is_dir():
            part.unlink(missing_ok=True)
            return
        for old in part.glob("old/*"):
            # killed between the two renames: the only whole folder is the old one
            if not (part.parent / old.name).exists():
                os.replace(old, part.parent / old.name)
        shutil.rmtree(part, ignore_errors=True)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(path):
        raise HYWUError(f"{path}: exists already; choose another name or allow overwriting.")


def _place(part: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.link(part, path)  # unlike a rename, it never takes the place of a file
            return
        except FileExistsError:
            _refuse_existing(path, overwrite)
        except OSError:  # a file system without hard links
            _refuse_existing(path, overwrite)
    os.replace(part, path)


def _place_folder(new: Path, path: Path) -> None:
    """Rename a folder to where nothing is; of several at once one wins."""
    try:
        os.rename(new, path)
    except OSError:
        # no rename takes the place of a folder that holds something, nor on Windows of an empty one
        _refuse_existing(path, overwrite=False)
        raise


def _prefix(path: Path) -> str:
    # a name may be as long as names can be: what is added must still fit
    return f".{path.name.encode('utf-8', 'replace')[:80].decode('utf-8', 'ignore')}."


def _abandoned(part: Path) -> bool:
    """Whether no process is writing it: its lock is free, and where locks can't tell, it is a day old."""
    try:
        age = time.time() - part.stat().st_mtime
        if age < 60 and part.is_dir() and not any(part.iterdir()):
            return False  # just made, and not yet locked
    except OSError:
        return False
    if fcntl is not None:
        try:
            handle = os.open(part, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass
        finally:
            os.close(handle)
    return age > 86_400


def _sync(file: Path) -> None:
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    # Windows opens no folders, some file systems sync none: the rename is in order there
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _keep_others(old: Path, new: Path, drop: Callable[[str], object]) -> None:
    """Bring what only the old folder has into the new one."""
    for item in old.iterdir():
        if os.path.lexists(new / item.name) or drop(item.name):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, new / item.name, symlinks=True, copy_function=_link)
        else:
            _link(item, new / item.name)


def _link(source: str | Path, target: str | Path) -> None:
    """The same file at another place; a copy where the file system has no second names."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


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


# -- one process at a time ---------------------------------------------------------------------------


@contextlib.contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold a folder's lock; the system releases it when the process ends, however it ends.

    Raises HYWUError when another run holds it. Inside, temporary files of killed runs are gone.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise HYWUError(
            f"{folder}: another run is working on this folder; wait for it, or choose another."
        ) from error
    except OSError as error:
        raise HYWUError(f"{folder}: can't be written ({reason(error)}).") from error
    try:
        # of former versions too, which ended in another way
        for part in list(folder.rglob(".*.part")):
            if _abandoned(part):
                _remove(part)
        yield
    finally:
        lock.release()


def _umask() -> int:
    # mkstemp makes files private; what a user saves gets his usual permissions
    mask = os.umask(0)
    os.umask(mask)
    return mask
