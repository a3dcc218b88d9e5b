"""Conditions from the encoders of a graph: a CLIP for the part `text`, a CLIP_VISION for `vision`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...hywu_core.condition import Condition
from ...hywu_core.errors import HYWUError

#: Part of the condition -> input of the node that brings its encoder.
INPUTS = {"text": "clip", "vision": "clip_vision"}


def encode(
    generator: Any, pixels: Tensor, texts: Sequence[str], inputs: dict[str, Any]
) -> Condition:
    """pixels ``[B, 3, H, W]`` in 0..1. Raises HYWUError on an encoder that is missing or too wide."""
    parts, masks = {}, {}
    for part, width in generator.config.condition.items():
        source = INPUTS.get(part)
        if source is None or inputs.get(source) is None:
            raise HYWUError(
                f"The generator reads the condition part '{part}' ({width} wide)"
                + (f"; connect {source}." if source else ", which no encoder of a graph makes.")
            )
        if part == "text":
            parts[part], masks[part] = _texts(inputs[source], texts)
        else:
            parts[part] = _images(inputs[source], pixels)
        if parts[part].shape[2] != width:
            raise HYWUError(
                f"The connected {source} gives tokens {parts[part].shape[2]} wide, the generator reads "
                f"'{part}' {width} wide; connect the encoder that it was trained with."
            )
    sha = hashlib.sha256(repr((list(texts), tuple(pixels.shape), list(parts))).encode())
    sha.update(pixels.contiguous().numpy().tobytes())
    origin = {"instruction": list(texts), "encoder": "comfyui"}
    return Condition(parts, masks, sha.hexdigest()[:32], origin)


def _texts(clip: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, T, C]`` padded to the longest, and their mask ``[B, T]``."""
    known: dict[str, tuple[Tensor, Tensor]] = {}
    bar = comfy.utils.ProgressBar(len(texts))
    for text in texts:
        mm.throw_exception_if_processing_interrupted()
        if text not in known:
            tokens, facts = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
            mask = facts.get("attention_mask")
            kept = torch.ones(tokens.shape[:2]) if mask is None else mask.reshape(tokens.shape[:2])
            known[text] = tokens[:1].float().cpu(), kept[:1].bool().cpu()
        bar.update(1)
    longest = max(tokens.shape[1] for tokens, _ in known.values())
    padded = {t: longest - tokens.shape[1] for t, (tokens, _) in known.items()}
    rows = [F.pad(known[t][0], (0, 0, 0, padded[t])) for t in texts]
    masks = [F.pad(known[t][1], (0, padded[t])) for t in texts]
    return torch.cat(rows), torch.cat(masks)


def _images(clip_vision: Any, pixels: Tensor) -> Tensor:
    """Tokens of the last layer ``[B, L, C]``, one image at a time."""
    rows = []
    bar = comfy.utils.ProgressBar(pixels.shape[0])
    for image in pixels.movedim(1, -1).split(1):
        mm.throw_exception_if_processing_interrupted()
        rows.append(clip_vision.encode_image(image)["last_hidden_state"].float().cpu())
        bar.update(1)
    return torch.cat(rows)
