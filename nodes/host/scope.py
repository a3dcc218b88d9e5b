"""How strongly, where and when a LoRA acts on a MODEL."""

from __future__ import annotations

from dataclasses import dataclass

from ...hywu_core.errors import HYWUError
from ...hywu_core.injection import target_strengths
from ...hywu_core.lora import GeneratedLoRA

#: Larger ones overflow in half precision, merged as a bad image without a word.
MAX_STRENGTH = 10_000.0
#: Lines of strengths that are read: each costs a look at every module.
MAX_LINES = 5_000


def check_strength(strength: float) -> None:
    """HYWUError on a number that no LoRA can be multiplied by."""
    if not abs(strength) <= MAX_STRENGTH:
        raise HYWUError(
            f"The strength is {strength}; it must be a finite number from {-MAX_STRENGTH:g} to "
            f"{MAX_STRENGTH:g}."
        )


@dataclass(frozen=True)
class Scope:
    """Where and when a LoRA acts.

    negative: whether on the negative branch of guidance too.
    start, end: share of the sampling from which on and up to which, 0 to 1.
    modules: lines of ``pattern = strength`` over module paths, as shell patterns; the last match counts, and
        what none matches has 1.
    """

    negative: bool = True
    start: float = 0.0
    end: float = 1.0
    modules: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise HYWUError(
                f"The LoRA would act from {self.start} to {self.end} of the sampling; start_percent must "
                "be below end_percent, both between 0 and 1."
            )

    @property
    def always(self) -> bool:
        return self.start == 0 and self.end == 1

    @property
    def needs_unmerged(self) -> str:
        """What merged weights can't do here, or nothing."""
        if not self.negative:
            return "Merged weights serve both branches; use mode 'unmerged' for positive only."
        if not self.always:
            return "Merged weights serve all steps; use mode 'unmerged' for a part of the sampling."
        return ""

    def strengths(self, lora: GeneratedLoRA) -> dict[str, float]:
        """Strength of every target that isn't off. Raises HYWUError on a line that can't be read."""
        patterns = module_patterns(self.modules)
        found = target_strengths(lora, patterns) if patterns else dict.fromkeys(lora, 1.0)
        return {path: value for path, value in found.items() if value}


def module_patterns(text: str) -> dict[str, float]:
    """Lines of ``pattern = strength`` -> pattern -> strength. Raises HYWUError on any other line."""
    patterns = {}
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if len(lines) > MAX_LINES:
        raise HYWUError(
            f"module_strengths: {len(lines):,} lines, at most {MAX_LINES:,} are read; one pattern such as "
            "'*attn*' takes many modules at once."
        )
    for line in lines:
        pattern, equals, number = line.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            equals = ""
        if not equals or not pattern.strip():
            raise HYWUError(
                f"module_strengths: '{line}' is not 'pattern = number'; write for example "
                "'*attn* = 0.5'."
            )
        if not abs(value) <= MAX_STRENGTH:
            raise HYWUError(
                f"module_strengths: '{line}' is no strength; take a number from {-MAX_STRENGTH:g} to "
                f"{MAX_STRENGTH:g}."
            )
        patterns[pattern.strip()] = value
    return patterns
