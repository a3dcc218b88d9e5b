"""Conditions for a generator, by the encoder that its checkpoint names."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ...hywu_core.bases.bundled.model import split_words
from ...hywu_core.bases.bundled.vocabulary import unknown_instruction
from ...hywu_core.condition import Condition
from ...hywu_core.conditioning import pictures as several
from ...hywu_core.conditioning.editor import EditorEncoder
from ...hywu_core.errors import HYWUError
from ..instructions import for_images, lines_of
from . import conditionings, graph_encoders, hidden_states
from .bundled_editor import HostEditor, load_host_editor, rgb
from .generators import HostGenerator
from .paths import bundled_stamp

log = logging.getLogger(__name__)

#: Images that go through the editor at once.
ROWS = 16


def encode(
    generator: HostGenerator, images: Mapping[str, Tensor | None], instruction: str, **inputs: Any
) -> tuple[Condition, str]:
    """(condition, report as JSON). images: of each item, by input; ComfyUI's ``[B, H, W, C]`` in 0..1,
    further ones also ``[1, ...]`` for all items. Raises HYWUError.
    """
    start = time.perf_counter()
    kind = generator.config.encoder.get("type")
    encoder = ENCODERS.get(kind)
    if encoder is None:
        raise HYWUError(
            f"This generator's conditions come from the encoder '{kind}', which does not run here (here "
            f"run: {', '.join(ENCODERS)}); make the condition elsewhere and bring it in with Load "
            "Condition."
        )
    pictures = _pictures(images)
    count, given = pictures[0].shape[0], inputs.get("conditioning")
    texts = _instructions(instruction, count, needed=given is None)
    condition = encoder(generator, pictures, texts, inputs)
    if not bool(condition.is_finite()):
        raise HYWUError("The condition has NaN or infinite values; look at the image for them.")
    warnings = several.number_warnings(generator.config.encoder, len(pictures))
    warnings += _warnings(generator, texts if given is None else [], condition)
    text_from = condition.origin.get("text_from", "instruction")
    if given is not None:
        warnings += conditionings.warnings(given, inputs.get("clip"), text_from == "conditioning")
    for warning in warnings:
        log.warning("HY-WU: %s", warning)
    report = {
        "images": count,
        "pictures_each": len(pictures),
        "instructions": [text[:200] for text in texts],
        "text_from": text_from,
        "tokens": condition.num_tokens,
        "seconds": round(time.perf_counter() - start, 4),
        "warnings": warnings,
    }
    return condition, json.dumps(report, ensure_ascii=False)


def _pictures(images: Mapping[str, Tensor | None]) -> list[Tensor]:
    """Those that are connected, in their order: ``[B or 1, 3, H, W]`` in 0..1."""
    found = {name: image for name, image in images.items() if image is not None}
    count = next(iter(found.values())).shape[0]
    for name, image in found.items():
        if 0 in image.shape:
            raise HYWUError(
                f"The {name} is {' x '.join(map(str, image.shape))}: there is nothing in it."
            )
        several.check_number(name, image.shape[0], count)
    return [rgb(image).movedim(-1, 1).float().clamp(0, 1) for image in found.values()]


def _instructions(instruction: str, count: int, needed: bool) -> list[str]:
    """One for each image; empty ones where none is needed and none is given."""
    if not needed and not lines_of(instruction):
        return [""] * count
    return for_images(instruction, count)


def _warnings(generator: HostGenerator, texts: Sequence[str], condition: Condition) -> list[str]:
    """What is not an error but will not do what the user hopes. texts: those that are read."""
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
    generator: HostGenerator, pictures: Sequence[Tensor], texts: Sequence[str],
    inputs: dict[str, Any],
) -> Condition:  # fmt: skip
    _check_bundled_inputs(len(pictures), inputs)
    pixels, patcher = pictures[0], _bundled()
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


def _check_bundled_inputs(pictures: int, inputs: Mapping[str, Any]) -> None:
    if pictures > 1:
        raise HYWUError(
            f"The bundled editor reads one picture, here are {pictures}; leave image2 and image3 unconnected, "
            "or train a generator for another model on pairs with references (HY-WU Train Generator)."
        )
    if inputs.get("conditioning") is not None:
        raise HYWUError(
            "The bundled editor reads the words of the instruction itself; leave conditioning unconnected "
            "and write the instruction."
        )


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
