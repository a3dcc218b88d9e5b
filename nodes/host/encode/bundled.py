"""Conditions from the bundled editor's own hidden states, under ComfyUI's memory manager."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
from torch import Tensor

from ....hywu_core.bases.bundled.checkpoint import check_made_for
from ....hywu_core.bases.bundled.text import split_words
from ....hywu_core.condition import Condition
from ....hywu_core.encoders.base import Reads
from ....hywu_core.encoders.bundled import ONE_IMAGE, EditorEncoder
from ....hywu_core.errors import HYWUError
from ..bundled_editor import load_host_editor
from ..paths import bundled_stamp

#: Images that go through the editor at once.
ROWS = 16

_kept: dict[str, comfy.model_patcher.ModelPatcher] = {}


def own_editor() -> comfy.model_patcher.ModelPatcher:
    """The bundled editor, without any LoRA on it, under the memory manager; loaded once."""
    stamp = bundled_stamp("editor")
    if stamp not in _kept:
        editor = load_host_editor()
        _kept.clear()
        _kept[stamp] = comfy.model_patcher.ModelPatcher(
            editor, mm.get_torch_device(), mm.unet_offload_device()
        )
    return _kept[stamp]


class BundledEncoder:
    """(images, instructions) -> Condition, by a copy of the editor of its own.

    sockets: `model`, where it is connected, must be the same editor.
    Raises HYWUError on another one, or on an editor that the generator wasn't trained for.
    """

    any_number = False

    def __init__(self, reads: Reads, sockets: Mapping[str, Any]) -> None:
        self.patcher = own_editor()
        editor, wanted = self.patcher.model, reads.identity.get("editor")
        self.identity = {"type": reads.identity["type"], "editor": editor.identity}
        self.parts = dict(editor.config.condition_parts)
        check_made_for(wanted, editor.identity, "The bundled editor")
        if sockets.get("model") is not None:
            connected = getattr(sockets["model"].model, "diffusion_model", None)
            identity = getattr(connected, "identity", "another model")
            check_made_for(wanted, identity, "The connected MODEL")
        if sockets.get("conditioning") is not None:
            raise HYWUError(
                "The bundled editor reads the words of the instruction itself; leave conditioning "
                "unconnected and write the instruction."
            )

    def __call__(self, images: Tensor, instructions: Sequence[str], *further: Tensor) -> Condition:
        if further:
            raise HYWUError(ONE_IMAGE.format(count=1 + len(further)))
        editor = self.patcher.model
        # whole: the text must be encoded on the device that the images are on
        need = _memory(editor.config, images)
        mm.load_models_gpu([self.patcher], memory_required=need, force_full_load=True)
        bar: list[comfy.utils.ProgressBar] = []

        def on_window(done: int, total: int) -> None:
            mm.throw_exception_if_processing_interrupted()
            bar or bar.append(comfy.utils.ProgressBar(total))
            bar[0].update_absolute(done, total)

        encoder = EditorEncoder(editor, editor.identity, ROWS, on_window)
        condition = encoder(images.to(self.patcher.load_device), instructions).to("cpu")
        return replace(condition, origin={**condition.origin, "editor": editor.identity})

    def warnings(self, texts: Sequence[str], condition: Condition) -> list[str]:
        limit = self.patcher.model.config.text_words
        return [
            f"Only the first {limit} words of '{text[:40]}…' are read."
            for text in dict.fromkeys(texts)
            if len(split_words(text)) > limit
        ]


def _memory(config: Any, images: Tensor) -> int:
    """Bytes of activations of the images that run at once, and of the pixels."""
    items = min(ROWS, images.shape[0])
    window = config.tile(*images.shape[2:])
    return 4 * (int(config.activations(items, *window)) + 2 * images.numel())
