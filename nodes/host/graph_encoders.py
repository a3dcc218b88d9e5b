"""Conditions from a graph: a CLIP for the part `text`, a CLIP_VISION for `vision`, a MODEL for its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...hywu_core.condition import Condition
from ...hywu_core.errors import HYWUError
from . import hidden_states
from .latents import encode_latent

#: Part of the condition -> inputs of the node that bring its encoder, the encoder itself first.
INPUTS = {
    "text": ("clip",),
    "vision": ("clip_vision",),
    hidden_states.PART: ("model", "vae", "clip"),
}


def encode(
    generator: Any, pixels: Tensor, texts: Sequence[str], inputs: Mapping[str, Any]
) -> Condition:
    """pixels ``[B, 3, H, W]`` in 0..1. Raises HYWUError on an encoder that is missing or too wide."""
    parts, masks = {}, {}
    for part, width in generator.config.condition.items():
        _check_sources(generator, part, width, inputs)
    for part, width in generator.config.condition.items():
        parts[part], mask = tokens(part, generator.config.encoder, pixels, texts, inputs)
        if mask is not None:
            masks[part] = mask
        if parts[part].shape[2] != width:
            raise HYWUError(
                f"The connected {INPUTS[part][0]} gives tokens {parts[part].shape[2]} wide, the generator "
                f"reads '{part}' {width} wide; connect the encoder that it was trained with."
            )
    origin: dict[str, Any] = {"instruction": list(texts), "encoder": "comfyui"}
    if hidden_states.PART in parts:
        connected = hidden_states.identity(inputs["model"], inputs["vae"])
        origin["model"] = {**generator.config.encoder["model"], **connected}
    facts = [list(texts), tuple(pixels.shape), list(parts), origin.get("model")]
    sha = hashlib.sha256(repr(facts).encode())
    sha.update(pixels.contiguous().numpy().tobytes())
    return Condition(parts, masks, sha.hexdigest()[:32], origin)


def tokens(
    part: str, encoder: Mapping[str, Any], pixels: Tensor, texts: Sequence[str],
    inputs: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A part's tokens ``[B, L, C]`` and their mask. encoder: what the checkpoint says about it.

    inputs may bring `said` and `latent` (see `hidden_states`), where texts and latents are kept.
    """
    if part == "text":
        return _texts(inputs["clip"], texts)
    if part == "vision":
        return _images(inputs["clip_vision"], pixels), None
    model, vae, clip = (inputs[name] for name in INPUTS[part])

    @lru_cache(None)
    def said(text: str) -> Any:
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]

    said = inputs.get("said", said)
    latent = inputs.get("latent", partial(encode_latent, model.model, vae))
    return hidden_states.encode(encoder["model"], model, pixels, texts, said, latent), None


def _check_sources(generator: Any, part: str, width: int, inputs: Mapping[str, Any]) -> None:
    """HYWUError names the inputs of a part's encoder that aren't connected."""
    sources = INPUTS.get(part, ())
    if part == hidden_states.PART and not generator.config.encoder.get("model"):
        sources = ()
    what = f"The generator reads the condition part '{part}' ({width} wide)"
    if not sources:
        raise HYWUError(f"{what}, which no encoder of a graph makes.")
    if missing := [source for source in sources if inputs.get(source) is None]:
        ways = ", which its base model makes of picture and text" if len(sources) > 1 else ""
        raise HYWUError(f"{what}{ways}; connect {', '.join(missing)}.")


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
