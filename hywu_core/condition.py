"""Condition: the value that goes into a generator. Named parts of tokens, masks, a fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import fingerprint
from .batch import Items, batch_index
from .errors import HYWUError
from .precision import FLOATS, widened

#: The single part of an official condition: hidden states of the base model's last layer.
OFFICIAL_PART = "hidden_states"

FORMAT = "hywu-condition-1"


@dataclass(frozen=True, eq=False)
class Condition:
    """Tokens with their sources.

    parts: name -> float tensor ``[B, L, C]``; order counts (it is the order of the tokens).
    masks: name -> bool tensor ``[B, L]``, True where a token counts; a part without an entry counts
        whole. Masked tokens change nothing: neither their values nor their number.
    fingerprint: hash of what the condition was made from (pixels, text, encoder), or "".
    origin: JSON-safe, for the provenance: instruction, encoder, base.
    Raises HYWUError on an empty, misshapen or integer part, and on unequal batch sizes.
    """

    parts: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    fingerprint: str = ""
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.parts:
            raise HYWUError("The condition has no parts.")
        batches = set()
        for name, tokens in self.parts.items():
            if tokens.ndim != 3 or 0 in tokens.shape or tokens.dtype not in FLOATS:
                raise HYWUError(
                    f"Condition part '{name}' is {tokens.dtype} {tuple(tokens.shape)}; it must be "
                    "floating point, [batch, length, width], with no zero among them."
                )
            batches.add(tokens.shape[0])
            mask = self.masks.get(name)
            if mask is not None and (mask.shape != tokens.shape[:2] or mask.dtype != torch.bool):
                raise HYWUError(
                    f"The mask of condition part '{name}' is {mask.dtype} {tuple(mask.shape)}; it "
                    f"must be bool {tuple(tokens.shape[:2])}."
                )
        if len(batches) != 1:
            raise HYWUError(f"The condition's parts differ in batch size: {sorted(batches)}.")
        if unknown := set(self.masks) - set(self.parts):
            raise HYWUError(f"The condition has masks for unknown parts: {sorted(unknown)}.")
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))
        object.__setattr__(self, "masks", MappingProxyType(dict(self.masks)))
        object.__setattr__(self, "origin", MappingProxyType(dict(self.origin)))

    @classmethod
    def of(cls, value: Condition | Tensor, part: str = OFFICIAL_PART) -> Condition:
        """A Condition as it is, or a tensor ``[B, L, C]`` as the single part named `part`."""
        return value if isinstance(value, Condition) else cls({part: value})

    @property
    def batch_size(self) -> int:
        return next(iter(self.parts.values())).shape[0]

    @property
    def widths(self) -> dict[str, int]:
        """Width of every part, in their order."""
        return {name: tokens.shape[-1] for name, tokens in self.parts.items()}

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts together, masked ones included."""
        return sum(tokens.shape[1] for tokens in self.parts.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        """The same condition elsewhere, or in another floating-point dtype."""
        parts = {name: tokens.to(device=device, dtype=dtype) for name, tokens in self.parts.items()}
        masks = {name: mask.to(device=device) for name, mask in self.masks.items()}
        return replace(self, parts=parts, masks=masks)

    def select(self, items: Items) -> Condition:
        """One item (the batch dimension stays), or several. The fingerprint gets the selection.

        Raises HYWUError on items that aren't there.
        """
        index, chosen = batch_index(items, self.batch_size, "the condition")
        return replace(
            self,
            parts={name: tokens[index] for name, tokens in self.parts.items()},
            masks={name: mask[index] for name, mask in self.masks.items()},
            fingerprint=self.fingerprint and f"{self.fingerprint}:{chosen}",
        )

    def is_finite(self) -> Tensor:
        """Scalar bool tensor on the condition's device: no token that counts is NaN or infinite."""
        return torch.stack(
            [
                torch.isfinite(clear_masked(t, self.masks.get(n))).all()
                for n, t in self.parts.items()
            ]
        ).all()

    def _check_counts(self) -> None:
        """Raise HYWUError for an item all of whose tokens are masked. Waits for the device."""
        if any(name not in self.masks for name in self.parts):
            return
        counts = torch.stack([mask.any(dim=1) for mask in self.masks.values()]).any(dim=0)
        if empty := [i for i, any_ in enumerate(counts.tolist()) if not any_]:
            raise HYWUError(
                f"The masks leave no token of item {empty[0]}; encode that item again, or leave it out."
            )

    def digest(self) -> str:
        """Hash of the values themselves; waits for the device."""
        pieces: list[str | Tensor] = []
        for name, tokens in self.parts.items():
            pieces += [f"{name}{tuple(tokens.shape)}{tokens.dtype}", tokens]
            pieces += [self.masks[name]] if name in self.masks else []
        return fingerprint.digest(pieces)

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write one safetensors file; another process or machine can generate from it."""
        from .files import save_tensors

        tensors = {f"parts.{name}": tokens for name, tokens in self.parts.items()}
        tensors |= {f"masks.{name}": mask for name, mask in self.masks.items()}
        header = {
            "format": FORMAT,
            "parts": list(self.parts),
            "fingerprint": self.fingerprint,
            "origin": dict(self.origin),
        }
        return save_tensors(path, tensors, header, overwrite)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Condition:
        """Read a file of `save`, or any safetensors file with one ``[B, L, C]`` or ``[L, C]`` tensor.

        Raises HYWUError naming the file, also when the masks leave an item without any token.
        """
        from .files import check_fields, read_tensors

        tensors, header = read_tensors(path, device)
        tensors = {name: widened(value) for name, value in tensors.items()}
        try:
            if header.get("format") != FORMAT:
                return cls.of(_only_tensor(tensors))
            kinds = {"parts": list, "fingerprint": str, "origin": dict}
            check_fields(header, kinds, "the header")
            parts = {str(name): tensors[f"parts.{name}"] for name in header["parts"] or ()}
            masks = {n: tensors[f"masks.{n}"] for n in parts if f"masks.{n}" in tensors}
            condition = cls(parts, masks, header["fingerprint"] or "", header["origin"] or {})
            condition._check_counts()
            return condition
        except KeyError as error:
            raise HYWUError(f"{path}: the condition file lacks {error}; save it again.") from error
        except HYWUError as error:
            raise HYWUError(f"{path}: {error}") from error


def clear_masked(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens with masked ones set to zero, so that a NaN in the padding cannot spread."""
    return tokens if mask is None else tokens.masked_fill(~mask[..., None], 0)


def _only_tensor(tensors: Mapping[str, Tensor]) -> Tensor:
    named = tensors.get("condition", next(iter(tensors.values())) if len(tensors) == 1 else None)
    if named is None:
        raise HYWUError(
            f"holds {len(tensors)} tensors and none is called 'condition'; save a single "
            "[batch, length, width] tensor under that name."
        )
    return named[None] if named.ndim == 2 else named
