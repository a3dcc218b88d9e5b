"""ComfyUI's folders: where generators, conditions and LoRAs lie, their names, stamps and paths."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...hywu_core.atomic import reason
from ...hywu_core.bases.bundled.checkpoint import bundled, bundled_loras, weights_folder
from ...hywu_core.errors import HYWUError, get_logger

log = get_logger(__name__)

#: The first entry of the list of generators: the one that comes with the extension.
BUNDLED = "bundled"
#: The second: the one that fits the MODEL that is connected.
FITTING = "auto"
#: Before the names of bundled LoRAs, as in "bundled: single blur".
BUNDLED_LORA = "bundled: "
#: A PEFT adapter is a folder with this file in it.
PEFT_FILE = "adapter_model.safetensors"
#: ComfyUI's name of the folder with HunyuanImage-3's own folders.
HUNYUAN = "hunyuan_image_3"
NOTHING = "(none found)"
SUFFIX = ".safetensors"
#: Bytes of a name on most disks, less what the number and the suffix take.
NAME_BYTES = 200
#: Names of a list that an error quotes.
SHOWN = 8


def register() -> None:
    """Our model folders, merged with what extra_model_paths.yaml put there; models/hywu is made.

    Folders that are ComfyUI's own (input, output, models/loras) are no model folders of ours: what
    lists models would show a user's images there, and every LoRA twice.
    """
    for name in ("hywu", "hywu_conditions", HUNYUAN):
        own = os.path.join(folder_paths.models_dir, name)
        known = folder_paths.folder_names_and_paths.get(name, ([], set()))[0]
        folder_paths.folder_names_and_paths[name] = (list(dict.fromkeys([own, *known])), {SUFFIX})
    folder = Path(folder_paths.models_dir) / "hywu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("HY-WU: the folder for generators, %s, was not made: %s", folder, error)


register()


# -- lists -------------------------------------------------------------------------------------------


def generator_names() -> list[str]:
    """ "bundled", "auto", single files, and official folders (those with a config.json) once each."""
    names = []
    for name in folder_paths.get_filename_list("hywu"):
        folder = os.path.dirname(name)
        official = folder and _find(_generator_folders(), os.path.join(folder, "config.json"))
        names.append(folder if official else name)
    return list(dict.fromkeys([BUNDLED, FITTING, *names]))


def condition_names() -> list[str]:
    return _files_in(_condition_folders()) or [NOTHING]


def hunyuan_names() -> list[str]:
    """Folders with a config.json, once each."""
    found = {os.path.dirname(name) for name in folder_paths.get_filename_list(HUNYUAN)}
    roots = folder_paths.get_folder_paths(HUNYUAN)
    names = [n for n in sorted(found) if n and _find(roots, os.path.join(n, "config.json"))]
    return names or [NOTHING]


def lora_names() -> list[str]:
    """The bundled LoRAs, then files, and PEFT folders once each."""
    names = [BUNDLED_LORA + name.replace("_", " ") for name in bundled_loras()]
    for name in _files_in(_lora_folders()):
        folder, file = os.path.split(name)
        names.append(folder if folder and file == PEFT_FILE else name)
    return list(dict.fromkeys(names)) or [NOTHING]


def _generator_folders() -> list[str]:
    return folder_paths.get_folder_paths("hywu")


def _condition_folders() -> list[str]:
    saved = os.path.join(folder_paths.get_output_directory(), "conditions")
    known = folder_paths.get_folder_paths("hywu_conditions")
    own = os.path.join(folder_paths.models_dir, "hywu_conditions")
    further = [folder for folder in known if folder != own]
    return [own, saved, folder_paths.get_input_directory(), *further]


def _lora_folders() -> list[str]:
    saved = os.path.join(folder_paths.get_output_directory(), "loras")
    further = folder_paths.folder_names_and_paths.get("hywu_loras", ([], set()))[0]
    return [*folder_paths.get_folder_paths("loras"), saved, *further]


def _files_in(folders: list[str]) -> list[str]:
    """Names of safetensors files below the folders, relative to them, as ComfyUI lists its own."""
    names: set[str] = set()
    for folder in folders:
        found, _ = folder_paths.recursive_search(folder, excluded_dir_names=[".git"])
        names.update(folder_paths.filter_files_extensions(found, {SUFFIX}))
    return sorted(names)


# -- names to files ----------------------------------------------------------------------------------


_GENERATORS = "models/hywu"
_CONDITIONS = "models/hywu_conditions, output/conditions or input"
_HUNYUAN = f"models/{HUNYUAN}"
_LORAS = "models/loras or output/loras"


def generator_path(name: str) -> Path:
    """Raises HYWUError when the checkpoint is gone or the name leads out of the folders."""
    if name == BUNDLED:
        return bundled("generator")
    return _existing(_generator_folders(), name, _GENERATORS)


def condition_path(name: str) -> Path:
    return _existing(_condition_folders(), name, _CONDITIONS)


def hunyuan_path(name: str) -> Path:
    return _existing(folder_paths.get_folder_paths(HUNYUAN), name, _HUNYUAN)


def lora_path(name: str) -> Path:
    if name.startswith(BUNDLED_LORA):
        return bundled(_bundled_file(name))
    return _existing(_lora_folders(), name, _LORAS)


def check_generator(name: str | None) -> None:
    """HYWUError on a name that the list of generators hasn't; None is not known yet. So do the others.

    ComfyUI's own refusal quotes the name as it came into a log that can't take every text.
    """
    _check_listed(name, generator_names(), _GENERATORS)


def check_condition(name: str | None) -> None:
    _check_listed(name, condition_names(), _CONDITIONS)


def check_hunyuan(name: str | None) -> None:
    _check_listed(name, hunyuan_names(), _HUNYUAN)


def check_lora(name: str | None) -> None:
    _check_listed(name, lora_names(), _LORAS)


def generator_stamp(name: str) -> str:
    """Changes when the file does, so that ComfyUI loads it again; so do the others."""
    if name == FITTING:
        return "|".join(generator_stamp(other) for other in generator_names() if other != FITTING)
    return bundled_stamp("generator") if name == BUNDLED else _stamp(_generator_folders(), name)


def condition_stamp(name: str) -> str:
    return _stamp(_condition_folders(), name)


def hunyuan_stamp(name: str) -> str:
    return _stamp(folder_paths.get_folder_paths(HUNYUAN), name)


def lora_stamp(name: str) -> str:
    if name.startswith(BUNDLED_LORA):
        return bundled_stamp(_bundled_file(name))
    return _stamp(_lora_folders(), name)


def bundled_stamp(name: str) -> str:
    return file_stamp(weights_folder() / f"{name}{SUFFIX}")


def file_stamp(found: Path | None) -> str:
    """Of a file, or of the files in a folder: names, sizes, times and places on the disk.

    A file that is put in another's place with the other's times (``cp -p``) has another place, or was
    changed (ctime) later.
    """
    if found is None:
        return "missing"
    parts = []
    with contextlib.suppress(OSError):
        for file in sorted(found.glob("*")) if found.is_dir() else [found]:
            at = file.stat()
            parts.append(f"{file.name}:{at.st_mtime_ns}:{at.st_size}:{at.st_ctime_ns}:{at.st_ino}")
    return ";".join(parts) or "missing"


def _stamp(folders: list[str], name: str) -> str:
    return file_stamp(_find(folders, name))


def _bundled_file(name: str) -> str:
    return name.removeprefix(BUNDLED_LORA).replace(" ", "_")


def _find(folders: list[str], name: str) -> Path | None:
    for root in folders:
        path = os.path.join(root, name)
        if inside(root, path) and os.path.exists(path):
            return Path(path)
    return None


def inside(root: str, path: str | Path) -> bool:
    """Whether a path leads no way out of a folder, links not followed."""
    root = os.path.abspath(root)
    with contextlib.suppress(ValueError):  # of another drive
        return os.path.commonpath([root, os.path.abspath(path)]) == root
    return False


def below(root: str, name: str) -> Path | None:
    """The real path of a name in a folder, links followed; None where it leads out, or is no path."""
    try:
        names = name.encode().replace(b"\\", b"/").split(b"/")
    except UnicodeEncodeError:  # half a surrogate pair
        return None
    if b"\0" in name.encode() or max(map(len, names)) > 255:
        return None
    whole = os.path.realpath(root)
    found = os.path.realpath(os.path.join(whole, name))
    return Path(found) if inside(whole, found) else None


def _existing(folders: list[str], name: str, where: str) -> Path:
    found = None if name == NOTHING else _find(folders, name)
    if found is None:
        raise HYWUError(_missing(name, where))
    return found


def _check_listed(name: str | None, names: list[str], where: str) -> None:
    if name is None or (name in names and name != NOTHING):
        return
    shown = ", ".join(f"'{known}'" for known in names[:SHOWN] if known != NOTHING) or "nothing"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise HYWUError(f"{_missing(str(name)[:NAME_BYTES], where)} Listed: {shown}{more}.")


def _missing(name: str, where: str) -> str:
    return f"'{name}': there is no such file in {where}; put it there and press R."


# -- files to save -----------------------------------------------------------------------------------


def save_path(prefix: str, suffix: str) -> tuple[Path, str]:
    """The next free path below the output folder, and its name there. Raises HYWUError on a way out."""
    folder, name, counter, subfolder = _place(prefix)
    while True:
        path = Path(folder) / f"{name}_{counter:05}_{suffix}"
        if not os.path.lexists(path):
            return path, os.path.join(subfolder, path.name)
        counter += 1


def save_new(prefix: str, suffix: str, write: Callable[[Path], object]) -> str:
    """`write` to the next free path, which must take the place of nothing; returns the name below the output folder.

    Another server on the same folder may take a number first: then the next one is ours.
    """
    while True:
        path, name = save_path(prefix, suffix)
        try:
            write(path)
            return name
        except HYWUError:
            if not os.path.lexists(path):
                raise


def check_prefix(prefix: str | None) -> None:
    """HYWUError on a prefix that leads out of the output folder or names no file; None is not known yet."""
    if prefix is not None:
        _checked(prefix)


def _place(prefix: str) -> tuple[str, str, int, str]:
    """(folder, start of the name, next number, folder below the output folder)."""
    output = _checked(prefix)
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
    except OSError as error:
        where = os.path.join(output, prefix)
        raise HYWUError(f"{where}: can't be written ({reason(error)}).") from error
    except Exception as error:
        raise HYWUError(_outside(prefix)) from error
    if not inside(output, os.path.realpath(folder)) or name in ("", ".", ".."):
        raise HYWUError(_outside(prefix))
    return folder, name, counter, subfolder


def _checked(prefix: str) -> str:
    """The output folder. Raises HYWUError on a prefix that leads out of it; makes nothing."""
    output = os.path.realpath(folder_paths.get_output_directory())
    folder, name = os.path.split(os.path.normpath(prefix))
    try:
        target = os.path.realpath(os.path.join(output, folder))
        fits = inside(output, target) and 0 < len(name.encode()) <= NAME_BYTES
        fits = fits and "\0" not in prefix
    except (ValueError, OSError):  # half a surrogate pair, too long
        fits = False
    if not fits or name in ("", ".", ".."):
        raise HYWUError(_outside(prefix))
    return output


def _outside(prefix: str) -> str:
    return (
        f"filename_prefix '{prefix}' leads out of ComfyUI's output folder or names no file; use a "
        "name below it, such as 'loras/hywu'."
    )
