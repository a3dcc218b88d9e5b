"""Conditions for a generator, by the encoder that its checkpoint names: one entry of `ENCODERS` per kind."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ....hywu_core.bases.bundled.vocabulary import unknown_instruction
from ....hywu_core.condition import Condition
from ....hywu_core.encoders import base
from ....hywu_core.encoders.base import Reads
from ....hywu_core.errors import HYWUError, get_logger
from ..bundled_editor import rgb
from ..instructions import for_images, lines_of
from . import conditionings
from .bundled import BundledEncoder
from .graph import GraphEncoder
from .hunyuan_image3 import HunyuanEncoder

log = get_logger(__name__)

#: Type in a checkpoint's encoder -> what makes such conditions here, of (Reads, the node's sockets).
ENCODERS = {
    "bundled_editor": BundledEncoder,
    "comfyui": GraphEncoder,
    "hunyuan_image_3": HunyuanEncoder,
}


class HostEncoder(base.Encoder, Protocol):
    """An encoder that knows what of a condition won't do what the user hopes.

    any_number: of images per item is read, whatever the generator was trained with.
    """

    any_number: bool

    def warnings(self, texts: Sequence[str], condition: Condition) -> list[str]: ...


def encoder(reads: Reads, sockets: Mapping[str, Any]) -> HostEncoder:
    """What makes the conditions that a generator reads. Raises HYWUError on sockets that don't fit."""
    kind = reads.identity.get("type")
    if kind not in ENCODERS:
        raise HYWUError(
            f"This generator's conditions come from the encoder '{kind}', which does not run here (here "
            f"run: {', '.join(ENCODERS)}); make the condition elsewhere and bring it in with Load "
            "Condition."
        )
    return ENCODERS[kind](reads, sockets)


def encode(
    generator: Any, images: Mapping[str, Tensor | None], instruction: str, **sockets: Any
) -> tuple[Condition, str, list[str]]:
    """(condition, report as JSON, warnings).

    images: of each item, by input; ComfyUI's ``[B, H, W, C]`` in 0..1, further ones also ``[1, ...]`` for all
        items.
    Raises HYWUError.
    """
    start = time.perf_counter()
    make = encoder(generator.reads, sockets)
    rows = _rows(images)
    count, given = rows[0].shape[0], sockets.get("conditioning")
    texts = _instructions(instruction, count, needed=given is None)
    condition = make(rows[0], texts, *rows[1:])
    if not bool(condition.is_finite()):
        raise HYWUError("The condition has NaN or infinite values; look at the image for them.")
    text_from = condition.origin.get("text_from", "instruction")
    warnings = [] if make.any_number else base.number_warnings(generator.reads, len(rows))
    warnings += make.warnings(texts if given is None else [], condition)
    if given is None:
        warnings += _untrained(generator.config.provenance.get("phrasings") or {}, texts)
    else:
        warnings += conditionings.warnings(given, sockets.get("clip"), text_from == "conditioning")
    for warning in warnings:
        log.warning("HY-WU: %s", warning)
    report = {
        "images": count,
        "pictures_each": len(rows),
        "instructions": [text[:200] for text in texts],
        "text_from": text_from,
        "tokens": condition.num_tokens,
        "seconds": round(time.perf_counter() - start, 4),
        "warnings": warnings,
    }
    return condition, json.dumps(report, ensure_ascii=False), warnings


def _rows(images: Mapping[str, Tensor | None]) -> list[Tensor]:
    """The images that are connected, in their order: ``[B or 1, 3, H, W]`` in 0..1."""
    found = {name: image for name, image in images.items() if image is not None}
    count = next(iter(found.values())).shape[0]
    for name, image in found.items():
        if 0 in image.shape:
            raise HYWUError(
                f"The {name} is {' x '.join(map(str, image.shape))}: there is nothing in it."
            )
        base.check_number(name, image.shape[0], count)
    return [rgb(image).movedim(-1, 1).float().clamp(0, 1) for image in found.values()]


def _instructions(instruction: str, count: int, needed: bool) -> list[str]:
    """One per image; empty ones where none is needed and none is given."""
    if not needed and not lines_of(instruction):
        return [""] * count
    return for_images(instruction, count)


def _untrained(phrasings: Mapping[str, Sequence[str]], texts: Sequence[str]) -> list[str]:
    """A warning for each instruction that is far from all that the generator was trained on.

    phrasings: task -> sentences, as a checkpoint says them.
    """
    known = [(task, text) for task, sentences in phrasings.items() for text in sentences]
    if not known:
        return []
    found = (unknown_instruction(text[:300], known) for text in dict.fromkeys(texts))
    return [warning for warning in found if warning]
