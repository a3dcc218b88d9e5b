"""The text of a CONDITIONING: what a condition's part `text` takes of it, and what a MODEL runs under."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....hywu_core.errors import HYWUError
from ....hywu_core.fingerprint import of_values
from ..identity import unfold

#: A CONDITIONING, and one of its entries: tokens ``[B, T, C]`` and metadata.
Entry = Sequence[Any]
Conditioning = Sequence[Entry]

#: Metadata that aren't the text's: where, when and how strongly an entry acts, and images beside it.
BESIDE = frozenset(
    (
        "area", "strength", "mask", "mask_strength", "set_area_to_bounds", "start_percent",
        "end_percent", "clip_start_percent", "clip_end_percent", "timestep_start", "timestep_end",
        "default", "hooks", "control", "control_apply_to_uncond", "gligen", "reference_latents",
        "concat_latent_image", "concat_mask",
    )
)  # fmt: skip


def entries(conditioning: Conditioning, count: int) -> list[Entry]:
    """The first entry's text for each of `count` items: [tokens ``[1, T, C]``, options].

    Raises HYWUError when there is none, or it holds neither one text nor as many as items.
    """
    if not conditioning or getattr(conditioning[0][0], "ndim", 0) != 3:
        found = tuple(getattr(conditioning[0][0], "shape", ())) if conditioning else "empty"
        raise HYWUError(
            f"The conditioning is {found}; connect one with tokens of a text [batch, length, width]."
        )
    tokens, options = conditioning[0][:2]
    options = {name: value for name, value in options.items() if name not in BESIDE}
    batch = tokens.shape[0]
    if batch not in (1, count):
        raise HYWUError(
            f"The conditioning holds {batch} texts for {count} image{'' if count == 1 else 's'}; connect "
            "one that holds a single text for all images, or one for each."
        )
    if batch == 1:
        return [[tokens, options]] * count
    return [
        [tokens[i : i + 1], {name: _item(value, i, batch) for name, value in options.items()}]
        for i in range(batch)
    ]


def _item(value: Any, i: int, batch: int) -> Any:
    rows = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
    return value[i : i + 1] if rows else value


def mask(entry: Entry) -> Tensor:
    """Which tokens of an entry count: bool ``[1, T]`` on the CPU. Raises HYWUError on an unexpected mask."""
    tokens, options = entry
    kept = options.get("attention_mask")
    if kept is None:
        return torch.ones(1, tokens.shape[1], dtype=torch.bool)
    if kept.numel() % tokens.shape[1]:
        raise HYWUError(
            f"The text has {tokens.shape[1]} tokens and an attention mask {tuple(kept.shape)}; connect the "
            "output of its text encoder as it is."
        )
    return kept.reshape(-1, tokens.shape[1])[:1].bool().cpu()


def digest(made: Sequence[Entry]) -> str:
    """Hash of all values of some entries."""
    return of_values(list(made), unfold=unfold)


def warnings(conditioning: Conditioning, clip: Any, read: bool) -> list[str]:
    """What of the inputs is not looked at.

    read: whether the generator reads a text.
    """
    if not read:
        return ["The generator reads no text; the conditioning is not looked at."]
    found = []
    if clip is not None:
        found.append("The conditioning is read as the text; clip and the instruction are not.")
    if len(conditioning) > 1:
        found.append(f"Of the conditioning's {len(conditioning)} entries the first is read.")
    if beside := sorted(BESIDE & conditioning[0][1].keys()):
        found.append(f"Of the conditioning only the text is read, not {', '.join(beside)}.")
    return found
