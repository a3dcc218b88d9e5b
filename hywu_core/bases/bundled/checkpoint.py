"""Files of the editor: weights, hyperparameters and provenance in one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import HYWUError
from ...files import check_fields, read_header, read_weights, save_tensors
from ...fingerprint import of_weights
from .model import Editor, EditorConfig

#: The architecture, as files name it, and what earlier releases' files name.
FORMAT, FORMER_FORMAT = "hywu-editor-2", "hywu-editor-1"
#: Identities of the editors of earlier releases.
FORMER = frozenset({"aef80654f908cd8d"})
BUNDLED = Path(__file__).with_name("weights") / "editor.safetensors"
#: Environment variable for developers: another folder of bundled weights.
VARIABLE = "HYWU_WEIGHTS"


def weights_folder() -> Path:
    """Where the bundled weights lie: `HYWU_WEIGHTS`, else beside this file."""
    return Path(os.environ.get(VARIABLE) or BUNDLED.parent)


def bundled(name: str) -> Path:
    """Path of the bundled ``<name>.safetensors``: editor, generator, shared, single_<task>.

    Raises HYWUError when this copy lacks it.
    """
    path = weights_folder() / f"{name}.safetensors"
    if not path.is_file():
        raise HYWUError(
            f"{path}: this copy lacks the bundled weights; install the extension again, or name a "
            f"folder that has them in the environment variable {VARIABLE}."
        )
    return path


def bundled_loras() -> list[str]:
    """Names of the bundled static LoRAs that are there: shared first, then single_<task>."""
    found = [p.stem for p in sorted(weights_folder().glob("single_*.safetensors"))]
    return ["shared", *found] if (weights_folder() / "shared.safetensors").is_file() else found


def editor_identity(editor: nn.Module) -> str:
    """16 hex digits of all weights in half precision, as they are stored: what a generator was made for."""
    return of_weights(editor, torch.float16, 16)


def check_made_for(wanted: str | None, identity: str, what: str = "This editor") -> None:
    """Raise HYWUError, with the way out, when a generator was trained for another editor.

    wanted: the editor that the generator names, None where it names none.
    identity: the one at hand.
    what: how that one is called.
    """
    if wanted in (None, identity):
        return
    if wanted in FORMER:
        raise HYWUError(
            f"The generator was made for the bundled editor of an earlier release ({wanted}), whose network "
            f"is another one than this editor's ({identity}); use the bundled generator, or train yours anew."
        )
    raise HYWUError(
        f"{what} is {identity}, the generator was trained for the editor {wanted}; use a generator and an "
        "editor that were made together (with the bundled generator, leave MODEL unconnected)."
    )


def save_editor(editor: nn.Module, path: str | Path, provenance: Mapping[str, Any]) -> Path:
    """Write the editor in half precision, atomically."""
    header = {
        "format": FORMAT,
        "editor": editor.config.to_json(),
        "provenance": dict(provenance),
    }
    tensors = {name: value.half() for name, value in editor.state_dict().items()}
    return save_tensors(path, tensors, header, overwrite=True)


def _check_numbers(path: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises HYWUError where a hyperparameter is far beyond the file's tensors, before a layer is built."""
    largest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    most, counts = max(4 * largest, 4096), ("depth", "blocks", "encode", "decode")
    for name, value in config.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        limit = len(tensors) if any(word in name for word in counts) else most
        if not name.startswith("max_") and any(
            isinstance(number, (int, float)) and number > limit for number in numbers
        ):
            raise HYWUError(
                f"{path}: its hyperparameters say {name} {value}, and it holds {len(tensors)} tensors with "
                f"no side longer than {largest}. Get the file anew."
            )


def load_editor(
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    operations: Any = nn,
    kind: type[Editor] = Editor,
) -> Any:
    """Load an editor, frozen and in eval mode; its `provenance` is the file's.

    path: None is the bundled one.
    operations, kind: layers of a host, and its subclass.
    Raises HYWUError naming the file when it is missing, not an editor's, or its keys, shapes or values are not
    the model's.
    """
    path = bundled("editor") if path is None else path
    header = read_header(path)
    if header.get("format") == FORMER_FORMAT:
        raise HYWUError(
            f"{path}: an editor of an earlier release, whose network is another one; use the bundled editor, or "
            "train yours anew (`hywu pretrain`)."
        )
    if header.get("format") != FORMAT:
        raise HYWUError(f"{path}: not an editor's file; `hywu pretrain` writes them.")
    tensors, _ = read_weights(path, finite=False)
    try:
        config = EditorConfig.from_json(header["editor"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise HYWUError(f"{path}: {error}") from error
    _check_numbers(path, config.to_json(), tensors)
    editor = kind(config, operations)
    check_fields(header, {"provenance": dict}, f"{path}: the header")
    wanted = editor.state_dict()
    wrong = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    wrong += [f"{name} is unknown" for name in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        if wanted[name].shape != tensors[name].shape:
            shapes = tuple(tensors[name].shape), tuple(wanted[name].shape)
            wrong.append(f"{name} is {shapes[0]}, its own hyperparameters say {shapes[1]}")
        elif not torch.isfinite(tensors[name]).all():
            wrong.append(f"{name} holds values that are not finite")
    if wrong:
        raise HYWUError(f"{path}: {'; '.join(sorted(wrong)[:8])}. Get the file anew.")
    editor.load_state_dict(tensors)
    editor.provenance = dict(header.get("provenance") or {})
    return editor.to(device, dtype).requires_grad_(False).eval()
