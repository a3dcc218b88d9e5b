"""The scale of each matrix in a LoRA file: alpha / rank, where the programs write it.

Tensors called ``alpha`` (kohya, ComfyUI), PEFT's ``adapter_config.json``, and the file's metadata: diffusers'
``lora_adapter_metadata``, kohya's ``ss_network_alpha``. Without any of them the scale is 1, as in ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import HYWUError
from ..files import parse_json
from .patterns import Pattern

#: diffusers' key: JSON of ``<start of the names>.<field of PEFT's configuration>``.
DIFFUSERS = "lora_adapter_metadata"
#: Keys under which other programs write one alpha for all.
SINGLE = ("ss_network_alpha", "lora_alpha", "network_alpha", "alpha")
#: Where a checked configuration holds alpha_pattern's patterns and values; no field of a file's.
_PATTERNS = ("alpha_pattern", "read")


class Scales:
    """config: PEFT's adapter_config.json or None.

    metadata: the safetensors file's.
    Raises HYWUError.
    """

    def __init__(self, config: Mapping[str, Any] | None, metadata: Mapping[str, str]) -> None:
        #: Start of names -> a configuration in PEFT's words; the longest start counts.
        self._configs: dict[str, Mapping[Any, Any]] = {}
        #: Whether what is told describes this file; else it is a note of the training, and may be of a file
        #: that was made smaller or mixed since, or had another alpha in some blocks.
        self._describes = config is not None or DIFFUSERS in metadata
        self._differ: list[str] = []
        if config is not None:
            self._configs[""] = _checked(config, "adapter_config.json")
        elif DIFFUSERS in metadata:
            self._configs = _diffusers(metadata[DIFFUSERS])
        elif (alpha := next((metadata[k] for k in SINGLE if k in metadata), None)) is not None:
            number = _number(alpha)
            # some write None or a word where there is none
            self._configs = (
                {} if number is None else {"": _checked({"lora_alpha": number}, "its metadata")}
            )

    def of(self, name: str, resolved: str, rank: int, alpha: Tensor | None) -> float:
        """Scale of the module called `name` in the file and `resolved` in the base.

        alpha: the file's tensor, which rules.
        Raises HYWUError where a configuration beside it says another; a training's note that does gets a warning.
        """
        told = self._told(name, resolved, rank)
        if alpha is None:
            return 1.0 if told is None else told
        if alpha.numel() != 1 or not math.isfinite(value := float(alpha)):
            raise HYWUError(f"{name}.alpha is {tuple(alpha.shape)} and no single finite number.")
        if told is not None and not math.isclose(told, value / rank, rel_tol=1e-3):
            differ = f"{name}: its alpha tensor says the scale {value / rank:g}"
            if self._describes:
                raise HYWUError(
                    f"{differ}, the configuration beside it {told:g}; remove the wrong one."
                )
            self._differ.append(f"{differ}, the file's metadata {told:g}")
        return value / rank

    @property
    def warnings(self) -> list[str]:
        """A sentence where alpha tensors and the training's note in the metadata disagree."""
        if not self._differ:
            return []
        more = f" ({len(self._differ)} modules differ)" if len(self._differ) > 1 else ""
        return [f"{self._differ[0]}; the tensors count{more}."]

    def _told(self, name: str, resolved: str, rank: int) -> float | None:
        starts = [s for s in self._configs if name.startswith(f"{s}." if s else "")]
        if not starts:
            return None
        config = self._configs[max(starts, key=len)]
        alpha = config["lora_alpha"]
        for pattern, value in config[_PATTERNS]:
            if pattern.fits(resolved) or pattern.fits(name):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _diffusers(text: str) -> dict[str, Mapping[Any, Any]]:
    configs: dict[str, dict[str, Any]] = {}
    for key, value in parse_json(text, f"its metadata '{DIFFUSERS}'", dict).items():
        start, _, field = key.rpartition(".")
        configs.setdefault(start, {})[field] = value
    return {
        start: _checked(config, f"its metadata '{DIFFUSERS}'")
        for start, config in configs.items()
        if "lora_alpha" in config
    }


def _checked(config: Mapping[str, Any], where: str) -> Mapping[Any, Any]:
    """A configuration whose fields are what they should be. Raises HYWUError naming the field."""
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, Mapping):
        raise HYWUError(f"{where}: alpha_pattern is {alphas!r}; an object is needed.")
    for name, value in {"lora_alpha": config.get("lora_alpha"), **alphas}.items():
        if isinstance(value, str) or _number(value) is None:
            raise HYWUError(
                f"{where}: {name} is {value!r}; a number is needed. Save the adapter again."
            )
    try:
        return {**config, _PATTERNS: [(Pattern(name), value) for name, value in alphas.items()]}
    except HYWUError as error:
        raise HYWUError(
            f"{where}: alpha_pattern has {error}; write the modules' names as plain text."
        ) from error


def _number(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
