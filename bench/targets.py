"""The targets on one H100-class device, and which of them the figures of bench/cuda.py meet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """target, measured: in words. met: "yes", "no", or "not measured"."""

    target: str
    measured: str
    met: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def verdicts(figures: dict[str, Any]) -> Iterator[Verdict]:
    """Every target, in the order of the sizes' importance."""

    def of(size: str, variant: str, key: str) -> float | None:
        entry = figures["sizes"].get(size, {}).get("variants", {}).get(variant, {})
        return entry.get(key)

    def faster(variant: str, than: str) -> float | None:
        return _ratio(of("official", than, "median_s"), of("official", variant, "median_s"))

    def milliseconds(size: str, *variants: str) -> float | None:
        times = [s for s in (of(size, v, "median_s") for v in variants) if s is not None]
        return 1000 * min(times) if times else None

    rate = _ratio(of("official", "ours", "tflops"), figures["rates"].get("sustained_tflops"))
    yield _at_least("official, bf16: of the sustained matrix rate", rate, 0.85)
    yield _at_least("official, bf16: times faster than eager", faster("ours", "eager"), 1.15)
    yield _at_least("official, fp8: times faster than eager", faster("fp8", "eager"), 2)
    errors = figures["relative_error_at_reduced_size"]
    fp8, own = (_number(errors.get(name)) for name in ("fp8", "ours"))
    yield _at_most("fp8: relative error of the LoRA", fp8, 0.08)
    yield _at_most("fp8: error, as a multiple of bf16's", _ratio(fp8, own), 4)
    over = of("official", "ours", "peak_over_weights_bytes")
    yield _at_most("official: peak GB over the weights", _ratio(over, 1e9), 4)
    total = of("official", "offloaded", "peak_bytes")
    yield _at_most("official, offloaded: peak GB in all", _ratio(total, 1e9), 12)
    slower = _ratio(of("official", "offloaded", "median_s"), of("official", "ours", "median_s"))
    yield _at_most("official, offloaded: of the resident time", slower, 1.2)
    yield _at_most(
        "official dense-only: ms", milliseconds("official_dense", "ours", "compiled"), 200
    )
    yield _at_most("Flux-size layout: ms", milliseconds("flux", "ours", "compiled", "graph"), 25)
    yield _at_most("bundled generator, graph: ms", milliseconds("bundled", "graph"), 3)


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _at_least(words: str, value: float | None, limit: float) -> Verdict:
    return _verdict(f"{words} >= {limit:g}", value, value is not None and value >= limit)


def _at_most(words: str, value: float | None, limit: float) -> Verdict:
    return _verdict(f"{words} <= {limit:g}", value, value is not None and value <= limit)


def _verdict(words: str, value: float | None, met: bool) -> Verdict:
    if value is None:
        return Verdict(words, "", "not measured")
    return Verdict(words, f"{value:.3g}", "yes" if met else "no")
