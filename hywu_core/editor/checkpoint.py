"""Files of the editor: weights, hyperparameters and provenance in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import HYWUError
from ..files import read_tensors, save_tensors
from .model import Editor, EditorConfig

FORMAT = "hywu-editor-1"
BUNDLED = Path(__file__).with_name("weights") / "editor.safetensors"


def save_editor(editor: Editor, path: str | Path, provenance: Mapping[str, Any]) -> Path:
    """Write the editor in half precision, atomically."""
    header = {"format": FORMAT, "editor": editor.config.to_json(), "provenance": dict(provenance)}
    tensors = {name: value.half() for name, value in editor.state_dict().items()}
    return save_tensors(path, tensors, header, overwrite=True)


def load_editor(
    path: str | Path = BUNDLED,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    operations: Any = nn,
) -> Editor:
    """Load an editor, frozen and in eval mode; its `provenance` is the file's.

    Raises HYWUError naming the file when it is missing, not an editor's, or its keys, shapes or
    values are not the model's.
    """
    tensors, header = read_tensors(path)
    if header.get("format") != FORMAT:
        raise HYWUError(f"{path}: not an editor's file; `hywu pretrain` writes them.")
    try:
        config = EditorConfig.from_json(header["editor"])
    except (KeyError, TypeError, ValueError) as error:
        raise HYWUError(f"{path}: {error}") from error
    editor = Editor(config, operations)
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
    editor.provenance = dict(header.get("provenance", {}))
    return editor.to(device, dtype).requires_grad_(False).eval()
