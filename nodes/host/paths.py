"""ComfyUI's folders: where generators and conditions lie, their names, stamps and paths."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...hywu_core.bases.bundled.checkpoint import bundled, bundled_loras, weights_folder
from ...hywu_core.errors import HYWUError

#: The first entry of the list of generators: the one that comes with the extension.
BUNDLED = "bundled"
#: Before the names of bundled LoRAs, as in "bundled: single blur".
BUNDLED_LORA = "bundled: "
#: A PEFT adapter is a folder with this file in it.
PEFT_FILE = "adapter_model.safetensors"
NOTHING = "(none found)"


def _register(name: str, folders: list[str]) -> None:
    """Own model folder with its extensions, merged with what extra_model_paths.yaml put there."""
    known = folder_paths.folder_names_and_paths.get(name, ([], set()))[0]
    folder_paths.folder_names_and_paths[name] = (
        list(dict.fromkeys([*folders, *known])),
        {".safetensors"},
    )


_register("hywu", [os.path.join(folder_paths.models_dir, "hywu")])
_register(
    "hywu_conditions",
    [
        os.path.join(folder_paths.models_dir, "hywu_conditions"),
        os.path.join(folder_paths.get_output_directory(), "conditions"),
        folder_paths.get_input_directory(),
    ],
)


_register(
    "hywu_loras",
    [
        *folder_paths.get_folder_paths("loras"),
        os.path.join(folder_paths.get_output_directory(), "loras"),
    ],
)


def generator_names() -> list[str]:
    """ "bundled", single files, and official folders (those with a config.json) once each."""
    names = []
    for name in folder_paths.get_filename_list("hywu"):
        folder = os.path.dirname(name)
        official = folder and _find("hywu", os.path.join(folder, "config.json"))
        names.append(folder if official else name)
    return list(dict.fromkeys([BUNDLED, *names]))


def condition_names() -> list[str]:
    return folder_paths.get_filename_list("hywu_conditions") or [NOTHING]


def lora_names() -> list[str]:
    """The bundled LoRAs, then files, and PEFT folders once each."""
    names = [BUNDLED_LORA + name.replace("_", " ") for name in bundled_loras()]
    for name in folder_paths.get_filename_list("hywu_loras"):
        folder, file = os.path.split(name)
        names.append(folder if folder and file == PEFT_FILE else name)
    return list(dict.fromkeys(names)) or [NOTHING]


def lora_path(name: str) -> Path:
    if name.startswith(BUNDLED_LORA):
        return bundled(_bundled_file(name))
    return _existing("hywu_loras", name, "models/loras or output/loras")


def lora_stamp(name: str) -> str:
    if name.startswith(BUNDLED_LORA):
        return bundled_stamp(_bundled_file(name))
    return stamp("hywu_loras", name)


def _bundled_file(name: str) -> str:
    return name.removeprefix(BUNDLED_LORA).replace(" ", "_")


def generator_path(name: str) -> Path:
    """Raises HYWUError when the checkpoint is gone or the name leads out of the folders."""
    return bundled("generator") if name == BUNDLED else _existing("hywu", name, "models/hywu")


def condition_path(name: str) -> Path:
    return _existing("hywu_conditions", name, "models/hywu_conditions, output/conditions or input")


def generator_stamp(name: str) -> str:
    return bundled_stamp("generator") if name == BUNDLED else stamp("hywu", name)


def bundled_stamp(name: str) -> str:
    return _stamp(weights_folder() / f"{name}.safetensors")


def stamp(folder: str, name: str) -> str:
    """Changes when the file does, so that ComfyUI loads it again."""
    return _stamp(_find(folder, name))


def _stamp(found: Path | None) -> str:
    if found is None or not found.exists():
        return "missing"
    files = sorted(found.glob("*")) if found.is_dir() else [found]
    return ";".join(f"{f.name}:{f.stat().st_mtime_ns}:{f.stat().st_size}" for f in files)


def save_path(prefix: str, suffix: str) -> tuple[Path, str]:
    """The next free path below the output folder, and its name there. Raises HYWUError on a way out."""
    output = os.path.realpath(folder_paths.get_output_directory())
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
    except Exception as error:
        raise HYWUError(_outside(prefix)) from error
    inside = os.path.commonpath([output, os.path.realpath(folder)]) == output
    if not inside or name in ("", ".", ".."):
        raise HYWUError(_outside(prefix))
    while True:
        path = Path(folder) / f"{name}_{counter:05}_{suffix}"
        if not path.exists():
            return path, os.path.join(subfolder, path.name)
        counter += 1


def _outside(prefix: str) -> str:
    return (
        f"filename_prefix '{prefix}' leads out of ComfyUI's output folder or names no file; use a "
        "name below it, such as 'loras/hywu'."
    )


def _find(folder: str, name: str) -> Path | None:
    for root in folder_paths.get_folder_paths(folder):
        path = os.path.join(root, name)
        inside = os.path.commonpath([os.path.abspath(root), os.path.abspath(path)])
        if inside == os.path.abspath(root) and os.path.exists(path):
            return Path(path)
    return None


def _existing(folder: str, name: str, where: str) -> Path:
    found = None if name == NOTHING else _find(folder, name)
    if found is None:
        raise HYWUError(f"'{name}': there is no such file in {where}; put it there and press R.")
    return found
