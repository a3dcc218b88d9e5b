"""Hyperparameters of a generator: one dataclass, and its JSON as our files hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from ..errors import HYWUError
from ..layout import LoRALayout
from ..tokens import TokenGrid, token_grid

RoPEPrecision = Literal["float32", "bfloat16"]


#: Size -> (width, transformer blocks).
SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"XS": (256, 2), "S": (512, 4), "M": (1024, 5), "L": (2048, 5)}
)


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything that fixes a generator's parameters and function.

    layout: the LoRAs it writes.
    condition: part name -> width, in the order of the tokens.
    token_dim: columns of a token (a token is ``rank x token_dim`` LoRA values).
    dim_accumulation: rank rows of a token that share one position of the sequence.
    num_blocks: transformer blocks.
    rope_precision: in which the position tables are computed; the official pipeline runs with "bfloat16".
    lora_a_scale, lora_b_scale: factors on every lora_A and lora_B (1 officially); small ones keep early
        training steps small.
    encoder, base, provenance: JSON-safe, what conditions come from, which base model the LoRAs fit, how the
        weights came about.
    """

    layout: LoRALayout
    condition: Mapping[str, int]
    token_dim: int
    dim_accumulation: int
    d_model: int
    head_dim: int
    num_blocks: int
    rope_precision: RoPEPrecision = "float32"
    lora_a_scale: float = 1.0
    lora_b_scale: float = 1.0
    encoder: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("token_dim", "dim_accumulation", "d_model", "head_dim", "num_blocks"):
            if getattr(self, name) < 1:
                raise HYWUError(
                    f"generator config: {name} is {getattr(self, name)}; it must be 1+."
                )
        for whole, part in (
            ("rank", "dim_accumulation"),
            ("d_model", "dim_accumulation"),
            ("d_model", "head_dim"),
        ):
            value = self.layout.rank if whole == "rank" else getattr(self, whole)
            if value % getattr(self, part):
                raise HYWUError(
                    f"generator config: {whole} {value} must be divisible by {part} "
                    f"{getattr(self, part)}."
                )
        if self.head_dim % 4:
            raise HYWUError(
                f"generator config: head_dim {self.head_dim} must be divisible by 4 (two rotary "
                "axes of pairs)."
            )
        if not self.condition or min(self.condition.values()) < 1:
            raise HYWUError("generator config: at least one condition part with a width is needed.")
        if self.rope_precision not in ("float32", "bfloat16"):
            raise HYWUError(
                f"generator config: rope_precision '{self.rope_precision}' is unknown; it is "
                "'float32' or 'bfloat16'."
            )
        for name in ("condition", "encoder", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @classmethod
    def of_size(
        cls, layout: LoRALayout, size: str, condition: Mapping[str, int], **more: Any
    ) -> GeneratorConfig:
        """One of the `SIZES`, whatever the rank, ready to be trained: first steps are small.

        more: other fields.
        Raises HYWUError on another size.
        """
        if size not in SIZES:
            raise HYWUError(f"generator size '{size}': it is one of {', '.join(SIZES)}.")
        width, blocks = SIZES[size]
        usual = {"token_dim": 192, "dim_accumulation": math.gcd(layout.rank, width), "head_dim": 64}
        usual |= {"d_model": width, "num_blocks": blocks, "lora_a_scale": 0.05, "lora_b_scale": 0.6}
        return cls(layout, condition, **usual | more)

    @property
    def grids(self) -> tuple[TokenGrid, ...]:
        """The token grid of each stack."""
        layout = self.layout
        return tuple(token_grid(stack, layout.rank, self.token_dim) for stack in layout.stacks)

    @property
    def rows_per_token(self) -> int:
        """Positions of the sequence that one token takes: rank / dim_accumulation."""
        return self.layout.rank // self.dim_accumulation

    @property
    def values_per_position(self) -> int:
        """LoRA values that one position of the sequence becomes."""
        return self.dim_accumulation * self.token_dim

    @property
    def num_positions(self) -> int:
        """Positions of the whole sequence, all stacks and layers together."""
        return sum(g.num_layers * g.num_tokens * self.rows_per_token for g in self.grids)

    def check_condition(self, widths: Mapping[str, int]) -> None:
        """Raise HYWUError unless a condition whose parts are this wide (name -> width) fits."""
        if dict(widths) != dict(self.condition):
            raise HYWUError(
                f"The condition has the parts {_widths(widths)}; this generator takes "
                f"{_widths(self.condition)}. Encode it with the encoder that the checkpoint names."
            )

    def flops(self, condition_tokens: int, batch_size: int = 1) -> float:
        """Floating-point operations of one forward (a multiplication and an addition count two)."""
        d, total = self.d_model, 0.0
        for grid in self.grids:
            length = grid.num_tokens * self.rows_per_token
            positions = grid.num_layers * length
            linear = 2 * positions * 18 * d * d
            attention = 4 * positions * d * (grid.num_layers + length + condition_tokens)
            total += self.num_blocks * (linear + attention) + 2 * positions * d * self.token_dim
        total += self.num_blocks * 2 * condition_tokens * 2 * d * d
        total += sum(2 * condition_tokens * width * d for width in self.condition.values())
        return batch_size * total

    # -- JSON ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout.to_json(),
            "layout_digest": self.layout.digest,
            "condition": [[name, width] for name, width in self.condition.items()],
            "token_dim": self.token_dim,
            "dim_accumulation": self.dim_accumulation,
            "d_model": self.d_model,
            "head_dim": self.head_dim,
            "num_blocks": self.num_blocks,
            "rope_precision": self.rope_precision,
            "lora_a_scale": self.lora_a_scale,
            "lora_b_scale": self.lora_b_scale,
            "encoder": dict(self.encoder),
            "base": self.base,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GeneratorConfig:
        """Raises HYWUError on missing fields, or when another program reordered the layout."""
        try:
            layout = LoRALayout.from_json(data["layout"])
            if data["layout_digest"] != layout.digest:
                raise HYWUError(
                    "the layout's modules are in another order than when the file was written "
                    f"(hash {layout.digest}, recorded {data['layout_digest']}): order sets the "
                    "meaning of every token, so use the original file."
                )
            names = ("token_dim", "dim_accumulation", "d_model", "head_dim", "num_blocks")
            return cls(
                layout=layout,
                condition={str(name): int(width) for name, width in data["condition"]},
                **{name: int(data[name]) for name in names},
                rope_precision=data["rope_precision"],
                lora_a_scale=float(data.get("lora_a_scale", 1.0)),
                lora_b_scale=float(data["lora_b_scale"]),
                encoder=data["encoder"],
                base=data["base"],
                provenance=data["provenance"],
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, HYWUError):
                raise
            raise HYWUError(f"the generator's description is damaged ({error!r}).") from error

    def with_(self, **changes: Any) -> GeneratorConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def without_identity(self) -> GeneratorConfig:
        """As it is written: a checkpoint's own name and hash are read off the file, not stored in it."""
        provenance = {k: v for k, v in self.provenance.items() if k != "checkpoint"}
        return self.with_(provenance=provenance)


def _widths(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({width} wide)" for name, width in parts.items())
