"""Conditions for a generator, by the encoder that its checkpoint names."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ...hywu_core.condition import Condition
from ...hywu_core.conditioning.editor import EditorEncoder
from ...hywu_core.editor.text import split_words
from ...hywu_core.editor.vocabulary import unknown_instruction
from ...hywu_core.errors import HYWUError
from ..instructions import for_images
from . import graph_encoders, hidden_states
from .bundled_editor import HostEditor, load_host_editor, rgb
from .generators import HostGenerator
from .paths import bundled_stamp

log = logging.getLogger(__name__)

#: Images that go through the editor at once.
ROWS = 16


def encode(
    generator: HostGenerator, image: Tensor, instruction: str, **inputs: Any
) -> tuple[Condition, str]:
    """(condition, report as JSON). image: ComfyUI's ``[B, H, W, C]`` in 0..1. Raises HYWUError."""
    start = time.perf_counter()
    kind = generator.config.encoder.get("type")
    encoder = ENCODERS.get(kind)
    if encoder is None:
        raise HYWUError(
            f"This generator's conditions come from the encoder '{kind}', which does not run here (here "
            f"run: {', '.join(ENCODERS)}); make the condition elsewhere and bring it in with Load "
            "Condition."
        )
    if 0 in image.shape:
        raise HYWUError(
            f"The image is {' x '.join(map(str, image.shape))}: there is nothing in it."
        )
    texts = for_images(instruction, image.shape[0])
    pixels = rgb(image).movedim(-1, 1).float().clamp(0, 1)
    condition = encoder(generator, pixels, texts, inputs)
    if not bool(condition.is_finite()):
        raise HYWUError("The condition has NaN or infinite values; look at the image for them.")
    warnings = _warnings(generator, texts, condition)
    for warning in warnings:
        log.warning("HY-WU: %s", warning)
    report = {
        "images": image.shape[0],
        "instructions": [text[:200] for text in texts],
        "tokens": condition.num_tokens,
        "seconds": round(time.perf_counter() - start, 4),
        "warnings": warnings,
    }
    return condition, json.dumps(report, ensure_ascii=False)


def _warnings(generator: HostGenerator, texts: Sequence[str], condition: Condition) -> list[str]:
    """What is not an error but will not do what the user hopes."""
    found = []
    if model := condition.origin.get("model"):
        found += hidden_states.differences(generator.config.encoder["model"], model)
    limit = _bundled().model.config.text_words if _is_bundled(generator) else None
    phrasings = generator.config.provenance.get("phrasings") or {}
    known = [(task, text) for task, texts in phrasings.items() for text in texts]
    for text in dict.fromkeys(texts):
        if limit and len(split_words(text)) > limit:
            found.append(f"Only the first {limit} words of '{text[:40]}…' are read.")
        if known and (warning := unknown_instruction(text[:300], known)):
            found.append(warning)
    return found


def _is_bundled(generator: HostGenerator) -> bool:
    return generator.config.encoder.get("type") == "bundled_editor"


# -- the bundled editor's hidden states --------------------------------------------------------------

_kept: dict[str, comfy.model_patcher.ModelPatcher] = {}


def _bundled() -> comfy.model_patcher.ModelPatcher:
    """The bundled editor, without any LoRA on it, under the memory manager; loaded once."""
    stamp = bundled_stamp("editor")
    if stamp not in _kept:
        editor = load_host_editor()
        _kept.clear()
        _kept[stamp] = comfy.model_patcher.ModelPatcher(
            editor, mm.get_torch_device(), mm.unet_offload_device()
        )
    return _kept[stamp]


class _Interruptible:
    """The editor for EditorEncoder: a few images at once, with progress and interruption."""

    def __init__(self, editor: HostEditor, steps: int) -> None:
        self.editor, self.config = editor, editor.config
        self.encode_text, self.embed_words = editor.encode_text, editor.embed_words
        self.bar = comfy.utils.ProgressBar(steps)

    def hidden_states(self, source: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        parts = []
        for rows in zip(source.split(ROWS), text.split(ROWS), mask.split(ROWS), strict=True):
            mm.throw_exception_if_processing_interrupted()
            parts.append(self.editor.hidden_states(*rows))
        self.bar.update(1)
        return torch.cat(parts)


def _by_bundled_editor(
    generator: HostGenerator, pixels: Tensor, texts: Sequence[str], inputs: dict[str, Any]
) -> Condition:
    patcher = _bundled()
    identity, wanted = patcher.model.identity, generator.config.encoder.get("editor")
    _check_editor("The bundled editor", identity, wanted)
    if inputs.get("model") is not None:
        connected = getattr(inputs["model"].model, "diffusion_model", None)
        _check_editor(
            "The connected MODEL", getattr(connected, "identity", "another model"), wanted
        )
    # whole: the text must be encoded on the device that the images are on
    need = _memory(patcher.model, pixels)
    mm.load_models_gpu([patcher], memory_required=need, force_full_load=True)
    probe = EditorEncoder(patcher.model, identity)
    windows = len(probe._starts(pixels.shape[2])) * len(probe._starts(pixels.shape[3]))
    encoder = EditorEncoder(_Interruptible(patcher.model, windows), identity)
    condition = encoder(pixels.to(patcher.load_device), texts).to("cpu")
    return replace(condition, origin={**condition.origin, "editor": identity})


def _check_editor(what: str, identity: str, wanted: str | None) -> None:
    if wanted not in (None, identity):
        raise HYWUError(
            f"{what} is {identity}, the generator was trained for the editor {wanted}; use a generator "
            "and an editor that belong together (with the bundled generator, leave MODEL unconnected)."
        )


def _memory(editor: HostEditor, pixels: Tensor) -> int:
    """Bytes of activations for the images that run at once, and of the pixels."""
    config = editor.config
    tokens = (config.train_size // config.patch) ** 2 + config.text_words + 1
    return 4 * (min(ROWS, pixels.shape[0]) * tokens * config.width * 24 + 2 * pixels.numel())


ENCODERS = {"bundled_editor": _by_bundled_editor, "comfyui": graph_encoders.encode}
