"""Conditions and text conditioning of a training, by the encoders of the graph, cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....hywu_core.condition import Condition
from ....hywu_core.encoders.base import Reads, number_of_images, padded
from ....hywu_core.encoders.bundled import ONE_IMAGE
from ....hywu_core.errors import HYWUError
from ....hywu_core.fingerprint import of_module
from .. import encode
from ..bundled_editor import HostEditor
from ..cache import TensorCache, digest
from ..encode import hidden_states
from ..encode.graph import GraphEncoder
from ..encode.latents import CachedLatents

#: Key of a conditioning's main tensor among its cached ones.
TOKENS = "cross_attn"
#: What the generator may read of a MODEL that isn't the bundled editor.
READS = ("encoders", "model", "model and encoders")
#: An image by which widths are found.
PROBE = torch.zeros(1, 3, 64, 64)


class CachedEncoder:
    """What the generator reads: the bundled editor's hidden states, or what `reads` says.

    reads: one of `READS`. For the MODEL's own hidden states it takes the VAE and the side of the images that
        are trained on.
    images: images per item, its references among them. identity and parts go into the checkpoint, by which
        Condition Encode makes the same conditions.
    Raises HYWUError where nothing would look at the references.
    """

    def __init__(
        self, model: Any, clip: Any, clip_vision: Any, cache: TensorCache, reads: str = READS[0],
        vae: Any = None, side: int = 0, images: int = 1,
    ) -> None:  # fmt: skip
        self.cache, self.clip = cache, clip
        self.text_weights = of_module(clip.cond_stage_model)
        diffusion = model.model.diffusion_model
        if isinstance(diffusion, HostEditor):
            if images > 1:
                raise HYWUError(ONE_IMAGE.format(count=images))
            self.identity: dict[str, Any] = {
                "type": "bundled_editor",
                "editor": diffusion.identity,
            }
            parts, sockets = dict(diffusion.config.condition_parts), {"model": model}
        else:
            self.identity = {"type": "comfyui", "clip": self.text_weights}
            self.identity |= number_of_images(images)
            parts, sockets = self._of_graph(model, clip_vision, reads, vae, side, images)
        self.encoder = encode.encoder(Reads(parts, self.identity), sockets)
        self.parts = parts

    def _of_graph(
        self, model: Any, clip_vision: Any, reads: str, vae: Any, side: int, images: int
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """(parts, sockets) of a MODEL of the user's; completes the identity."""
        names, sockets = [], {"clip": self.clip, "said": self._said}
        if "model" in reads:
            latent = CachedLatents(model.model, vae, self.cache)
            sockets |= {"model": model, "vae": vae, "latent": latent}
            self.identity["model"] = hidden_states.describe(model, vae, side, self._said, latent)
            names.append(hidden_states.PART)
        if "encoders" in reads:
            if clip_vision is not None:
                sockets["clip_vision"] = clip_vision
                self.identity["clip_vision"] = of_module(clip_vision.model)
                names.append("vision")
            names.append("text")
        if images > 1 and names == ["text"]:
            raise HYWUError(
                "The rows have references, which a generator that reads the instruction only doesn't see; "
                "connect clip_vision, let it read the model's hidden states, or take them out of the rows."
            )
        return self._widths(names, sockets), sockets

    @torch.inference_mode()
    def _widths(self, names: Sequence[str], sockets: Mapping[str, Any]) -> dict[str, int]:
        """Part -> width, found by encoding something small."""
        probe = GraphEncoder(Reads(dict.fromkeys(names, 0), self.identity), sockets)
        said = probe.entries(["a"])
        return {name: probe.tokens(name, [PROBE], said)[0].shape[2] for name in names}

    def _said(self, text: str) -> list[Any]:
        """An entry of a CONDITIONING."""
        options = self.conditioning(text)
        return [options.pop(TOKENS), options]

    def condition(self, pixels: Tensor, text: str, references: Sequence[Tensor] = ()) -> Condition:
        """pixels ``[1, 3, H, W]`` in 0..1, references ``[3, h, w]`` -> the condition of one item, on the CPU."""
        rows = [pixels, *(one[None] for one in references)]
        key = digest("condition", sorted(self.identity.items()), pixels, text, *rows[1:])
        tensors, metadata = self.cache.get(key, lambda: self._make(rows, text))
        parts = {name: tensors[f"parts.{name}"] for name in self.parts}
        masks = {n: tensors[f"masks.{n}"] for n in self.parts if f"masks.{n}" in tensors}
        return Condition(parts, masks, metadata["fingerprint"], metadata["origin"])

    @torch.inference_mode()
    def _make(self, rows: Sequence[Tensor], text: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        rows = [row.cpu().float() for row in rows]
        made = self.encoder(rows[0], [text], *rows[1:])
        if not bool(made.is_finite()):
            raise HYWUError(f"The condition of '{text[:60]}' has NaN or infinite values.")
        tensors = {f"parts.{name}": value for name, value in made.parts.items()}
        tensors |= {f"masks.{name}": value for name, value in made.masks.items()}
        return tensors, {"fingerprint": made.fingerprint, "origin": dict(made.origin)}

    def conditioning(self, text: str) -> dict[str, Any]:
        """What CLIP Text Encode gives for a text, as the dict that a MODEL's `extra_conds` takes."""
        key = digest("text", self.text_weights, text)
        tensors, metadata = self.cache.get(key, lambda: self._text(text))
        return {**metadata, **tensors}

    @torch.inference_mode()
    def _text(self, text: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tokens, more = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0]
        tensors = {TOKENS: tokens}
        tensors |= {name: value for name, value in more.items() if isinstance(value, Tensor)}
        plain = (str, int, float, bool, type(None))
        metadata = {name: value for name, value in more.items() if isinstance(value, plain)}
        if unexpected := more.keys() - tensors.keys() - metadata.keys():
            raise HYWUError(
                f"The text conditioning has {', '.join(sorted(unexpected))}, which can't be cached; use the "
                "CLIP as it comes from its loader."
            )
        return tensors, metadata


def stack(conditions: Sequence[Condition]) -> Condition:
    """Items in one batch; shorter ones are padded, and masked there."""
    parts, masks = {}, {}
    for name in conditions[0].parts:
        rows = [condition.parts[name] for condition in conditions]
        kept = [
            c.masks.get(name, torch.ones(r.shape[:2], dtype=torch.bool, device=r.device))
            for c, r in zip(conditions, rows, strict=True)
        ]
        parts[name], mask = padded(rows, kept)
        if not bool(mask.all()):
            masks[name] = mask
    return Condition(parts, masks)


def pad_texts(conditionings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As many tokens in each text as in the longest, where every text has a mask of those that count."""
    longest = max(entry[TOKENS].shape[1] for entry in conditionings)
    masked = all(
        isinstance(mask := entry.get("attention_mask"), Tensor)
        and mask.shape == entry[TOKENS].shape[:2]
        for entry in conditionings
    )
    if not masked:
        return [dict(entry) for entry in conditionings]
    padded: list[dict[str, Any]] = []
    for entry in conditionings:
        missing = longest - entry[TOKENS].shape[1]
        padded.append(
            {
                **entry,
                TOKENS: F.pad(entry[TOKENS], (0, 0, 0, missing)),
                "attention_mask": F.pad(entry["attention_mask"], (0, missing)),
            }
        )
    return padded
