"""Conditions from a graph: a CLIP or a CONDITIONING for the part `text`, a CLIP_VISION for `vision`, a MODEL
for its own hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...hywu_core import fingerprint
from ...hywu_core.condition import Condition
from ...hywu_core.conditioning import pictures as several
from ...hywu_core.errors import HYWUError
from . import conditionings, hidden_states
from .conditionings import Entry
from .latents import encode_latent

#: Part of the condition -> inputs of the node that bring its encoder, the encoder itself first.
INPUTS = {
    "text": ("clip",),
    "vision": ("clip_vision",),
    hidden_states.PART: ("model", "vae", "clip"),
}


def encode(
    generator: Any, pictures: Sequence[Tensor], texts: Sequence[str], inputs: Mapping[str, Any]
) -> Condition:
    """pictures: an item's first ones, second ones and so on, ``[B, 3, H, W]`` in 0..1, or ``[1, ...]`` for
    all items. inputs: the node's sockets; `conditioning` is the text in place of `clip`.

    Raises HYWUError on an encoder that is missing or too wide.
    """
    parts, masks = {}, {}
    for part, width in generator.config.condition.items():
        _check_sources(generator, part, width, inputs)
    read = any("clip" in INPUTS[part] for part in generator.config.condition)
    said = entries(texts, inputs) if read else []
    for part, width in generator.config.condition.items():
        parts[part], mask = tokens(part, generator.config.encoder, pictures, said, inputs)
        if mask is not None:
            masks[part] = mask
        if parts[part].shape[2] != width:
            raise HYWUError(
                f"The connected {_source(INPUTS[part][0], inputs)} gives tokens {parts[part].shape[2]} "
                f"wide, the generator reads '{part}' {width} wide; connect the encoder that it was trained "
                "with."
            )
    origin = {"instruction": list(texts), "encoder": "comfyui", **several.facts(len(pictures))}
    if hidden_states.PART in parts:
        connected = hidden_states.identity(inputs["model"], inputs["vae"])
        origin["model"] = {**generator.config.encoder["model"], **connected}
    facts = [list(texts), tuple(pictures[0].shape), list(parts), origin.get("model")]
    if read and inputs.get("conditioning") is not None:
        origin["text_from"] = "conditioning"
        facts.append(conditionings.digest(said))
    return Condition(parts, masks, _fingerprint(facts, pictures), origin)


def _fingerprint(facts: list[Any], pictures: Sequence[Tensor]) -> str:
    """facts: what else is in the condition, the first pictures' shape among it."""
    shapes = [tuple(picture.shape) for picture in pictures[1:]]
    return fingerprint.digest([repr([*facts, *shapes]), *pictures])


def tokens(
    part: str, encoder: Mapping[str, Any], pictures: Sequence[Tensor], said: Sequence[Entry],
    inputs: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A part's tokens ``[B, L, C]`` and their mask. encoder: what the checkpoint says about it.

    said: each item's text. inputs may bring `latent` (see `hidden_states`), where latents are kept.
    """
    if part == "text":
        return _texts(said)
    if part == "vision":
        return _images(inputs["clip_vision"], pictures), None
    model, vae = inputs["model"], inputs["vae"]
    latent = inputs.get("latent", partial(encode_latent, model.model, vae))
    return hidden_states.encode(encoder["model"], model, pictures, said, latent), None


def entries(texts: Sequence[str], inputs: Mapping[str, Any]) -> list[Entry]:
    """Each item's text as an entry of a CONDITIONING: of the one that is connected, or by the CLIP.

    inputs may bring `said`, text -> entry, where they are kept.
    """
    if (given := inputs.get("conditioning")) is not None:
        return conditionings.entries(given, len(texts))
    make = inputs.get("said", partial(_said, inputs["clip"]))
    known: dict[str, Entry] = {}
    bar = comfy.utils.ProgressBar(len(texts))
    for text in texts:
        mm.throw_exception_if_processing_interrupted()
        if text not in known:
            known[text] = make(text)
        bar.update(1)
    return [known[text] for text in texts]


def _said(clip: Any, text: str) -> Entry:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]


def _source(name: str, inputs: Mapping[str, Any]) -> str:
    """The input that stands in for a text encoder where it is connected."""
    given = name == "clip" and inputs.get("conditioning") is not None
    return "conditioning" if given else name


def _check_sources(generator: Any, part: str, width: int, inputs: Mapping[str, Any]) -> None:
    """HYWUError names the inputs of a part's encoder that aren't connected."""
    sources = INPUTS.get(part, ())
    if part == hidden_states.PART and not generator.config.encoder.get("model"):
        sources = ()
    what = f"The generator reads the condition part '{part}' ({width} wide)"
    if not sources:
        raise HYWUError(f"{what}, which no encoder of a graph makes.")
    if missing := [name for name in sources if inputs.get(_source(name, inputs)) is None]:
        ways = ", which its base model makes of picture and text" if len(sources) > 1 else ""
        names = ["clip (or conditioning)" if name == "clip" else name for name in missing]
        raise HYWUError(f"{what}{ways}; connect {', '.join(names)}.")


def _texts(said: Sequence[Entry]) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, T, C]`` padded to the longest, and their mask ``[B, T]``."""
    longest = max(entry[0].shape[1] for entry in said)
    rows, masks = [], []
    for entry in said:
        missing = longest - entry[0].shape[1]
        rows.append(F.pad(entry[0][:1].float().cpu(), (0, 0, 0, missing)))
        masks.append(F.pad(conditionings.mask(entry), (0, missing)))
    return torch.cat(rows), torch.cat(masks)


def _images(clip_vision: Any, pictures: Sequence[Tensor]) -> Tensor:
    """Tokens of the last layer ``[B, L, C]`` of each item's pictures one after another, each by itself."""
    bar = comfy.utils.ProgressBar(sum(map(len, pictures)))

    def seen(image: Tensor) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        made = clip_vision.encode_image(image)["last_hidden_state"].float().cpu()
        bar.update(1)
        return made

    rows = [torch.cat([seen(i) for i in p.movedim(1, -1).split(1)]) for p in pictures]
    return torch.cat([row.expand(pictures[0].shape[0], -1, -1) for row in rows], dim=1)
