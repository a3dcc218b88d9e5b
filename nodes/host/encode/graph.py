"""Conditions by the encoders of a graph: a CLIP or a CONDITIONING for the part `text`, a CLIP_VISION for
`vision`, a MODEL for its own hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from torch import Tensor

from ....hywu_core import fingerprint
from ....hywu_core.condition import Condition
from ....hywu_core.encoders.base import Reads, number_of_images, padded
from ....hywu_core.errors import HYWUError
from . import conditionings, hidden_states
from .conditionings import Entry
from .latents import encode_latent

#: Part of the condition -> inputs of the node that bring its encoder, the encoder itself first.
SOCKETS = {
    "text": ("clip",),
    "vision": ("clip_vision",),
    hidden_states.PART: ("model", "vae", "clip"),
}


class GraphEncoder:
    """(images, instructions, further images) -> Condition, by what is connected to the node.

    sockets: by input; `conditioning` is the text in place of `clip`. Where latents and texts are kept they
        bring `latent` (see `hidden_states`) and `said`, text -> entry of a CONDITIONING.
    Raises HYWUError on an encoder that is missing or too wide.
    """

    any_number = False

    def __init__(self, reads: Reads, sockets: Mapping[str, Any]) -> None:
        self.parts, self.identity, self.sockets = reads.parts, reads.identity, sockets
        for part, width in self.parts.items():
            self._check_sockets(part, width)

    def __call__(self, images: Tensor, instructions: Sequence[str], *further: Tensor) -> Condition:
        """images: ``[B, 3, H, W]`` in 0..1; further ones ``[1, ...]`` for all items, too."""
        rows = (images, *further)
        read = any("clip" in SOCKETS[part] for part in self.parts)
        said = self.entries(instructions) if read else []
        parts, masks = {}, {}
        for part, width in self.parts.items():
            parts[part], mask = self.tokens(part, rows, said)
            if mask is not None:
                masks[part] = mask
            if parts[part].shape[2] != width:
                raise HYWUError(
                    f"The connected {self._source(SOCKETS[part][0])} gives tokens {parts[part].shape[2]} "
                    f"wide, the generator reads '{part}' {width} wide; connect the encoder that it was "
                    "trained with."
                )
        origin = {
            "instruction": list(instructions),
            "encoder": "comfyui",
            **number_of_images(len(rows)),
        }
        if hidden_states.PART in parts:
            connected = hidden_states.identity(self.sockets["model"], self.sockets["vae"])
            origin["model"] = {**self.identity["model"], **connected}
        values = [list(instructions), tuple(images.shape), list(parts), origin.get("model")]
        if read and self.sockets.get("conditioning") is not None:
            origin["text_from"] = "conditioning"
            values.append(conditionings.digest(said))
        return Condition(parts, masks, _fingerprint(values, rows), origin)

    def warnings(self, texts: Sequence[str], condition: Condition) -> list[str]:
        model = condition.origin.get("model")
        return hidden_states.differences(self.identity["model"], model) if model else []

    def tokens(
        self, part: str, rows: Sequence[Tensor], said: Sequence[Entry]
    ) -> tuple[Tensor, Tensor | None]:
        """A part's tokens ``[B, L, C]`` on the CPU and their mask.

        said: each item's text.
        """
        if part == "text":
            texts = [entry[0][:1].float().cpu() for entry in said]
            return padded(texts, [conditionings.mask(entry) for entry in said])
        if part == "vision":
            return _vision(self.sockets["clip_vision"], rows), None
        model, vae = self.sockets["model"], self.sockets["vae"]
        latent = self.sockets.get("latent", partial(encode_latent, model.model, vae))
        return hidden_states.encode(self.identity["model"], model, rows, said, latent), None

    def entries(self, texts: Sequence[str]) -> list[Entry]:
        """Each item's text as an entry of a CONDITIONING: of the one that is connected, or by the CLIP."""
        if (given := self.sockets.get("conditioning")) is not None:
            return conditionings.entries(given, len(texts))
        make = self.sockets.get("said", partial(_said, self.sockets["clip"]))
        known: dict[str, Entry] = {}
        bar = comfy.utils.ProgressBar(len(texts))
        for text in texts:
            mm.throw_exception_if_processing_interrupted()
            if text not in known:
                known[text] = make(text)
            bar.update(1)
        return [known[text] for text in texts]

    def _source(self, name: str) -> str:
        """The input that stands in for a text encoder where it is connected."""
        given = name == "clip" and self.sockets.get("conditioning") is not None
        return "conditioning" if given else name

    def _check_sockets(self, part: str, width: int) -> None:
        """HYWUError names the inputs of a part's encoder that aren't connected."""
        names = SOCKETS.get(part, ())
        if part == hidden_states.PART and not self.identity.get("model"):
            names = ()
        what = f"The generator reads the condition part '{part}' ({width} wide)"
        if not names:
            raise HYWUError(f"{what}, which no encoder of a graph makes.")
        if missing := [n for n in names if self.sockets.get(self._source(n)) is None]:
            ways = ", which its base model makes of image and text" if len(names) > 1 else ""
            listed = ["clip (or conditioning)" if n == "clip" else n for n in missing]
            raise HYWUError(f"{what}{ways}; connect {', '.join(listed)}.")


def _fingerprint(values: list[Any], rows: Sequence[Tensor]) -> str:
    """values: what else is in the condition, the first images' shape among it."""
    shapes = [tuple(row.shape) for row in rows[1:]]
    return fingerprint.digest([repr([*values, *shapes]), *rows])


def _said(clip: Any, text: str) -> Entry:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]


def _vision(clip_vision: Any, rows: Sequence[Tensor]) -> Tensor:
    """Tokens of the last layer ``[B, L, C]`` of each item's images one after another, each by itself."""
    bar = comfy.utils.ProgressBar(sum(map(len, rows)))

    def seen(image: Tensor) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        made = clip_vision.encode_image(image)["last_hidden_state"].float().cpu()
        bar.update(1)
        return made

    made = [torch.cat([seen(one) for one in row.movedim(1, -1).split(1)]) for row in rows]
    return torch.cat([row.expand(rows[0].shape[0], -1, -1) for row in made], dim=1)
