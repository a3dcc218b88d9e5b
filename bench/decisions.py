"""What follows from the figures of a first contact: one line per question, with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: A choice is changed for at least so much.
WORTH = 1.03

#: So often an attention is called before the next shape comes: what a backend's first call costs is shared.
CALLS = 1000

#: Below this relative error a bf16 kernel computes what torch computes.
ROUNDING = 0.02


def decisions(figures: dict[str, Any]) -> list[dict[str, str]]:
    """``[{question, answer, because}]``; the answer is "not measured" where figures are missing."""
    checks = figures.get("probe", {})
    made = [
        *_attention(checks.get("attention", {})),
        *_kernels(checks.get("kernels", {}), checks.get("attention", {})),
        *_products(checks),
        *_whole(figures),
    ]
    return [dict(zip(("question", "answer", "because"), row, strict=True)) for row in made]


Row = tuple[str, str, str]


def _attention(found: dict[str, Any]) -> Iterator[Row]:
    """The fastest backend that is right, for each attention; a new shape's first call counts."""
    names = sorted({key.partition("/")[0] for key in found if "/" in key})
    if not names:
        yield "attention: backend by shape", "not measured", ""
    for name in names:
        ways = {k.partition("/")[2]: v for k, v in found.items() if k.startswith(f"{name}/")}
        right = {k: v for k, v in ways.items() if v.get("error", 1) <= ROUNDING}
        wrong = [k for k, v in ways.items() if k not in right]
        if not right:
            yield f"attention {name}", "no backend is right", ", ".join(wrong)
            continue
        # torch's default may have built cuDNN's plan already: whichever paid, the plan is the same
        plan = max((right[k]["first_s"] for k in ("default", "cudnn") if k in right), default=0)
        first = {k: plan if k in ("default", "cudnn") else v["first_s"] for k, v in right.items()}
        best = min(right, key=lambda k: right[k]["ms"] + 1e3 * first[k] / CALLS)
        because = ", ".join(
            f"{k} {v['ms']:.3g} ms (first {1e3 * v['first_s']:.3g})" for k, v in right.items()
        )
        yield f"attention {name}", best, because + (f"; failed: {wrong}" if wrong else "")


def _kernels(found: dict[str, Any], attention: dict[str, Any]) -> Iterator[Row]:
    if "rotate" in found and "rotate_wide" in found:
        narrow, wide = found["rotate"]["gbs"], found["rotate_wide"]["gbs"]
        answer = "wide" if wide > narrow * WORTH else "narrow: switch wide_rope off"
        yield "RoPE: wide or narrow", answer, f"{wide:.4g} against {narrow:.4g} GB/s"
    else:
        yield "RoPE: wide or narrow", "not measured", found.get("skipped", "")
    plain = attention.get("layers/default", {}).get("ms")
    if "across" in found and plain:
        fused = found["across"]["ms"]
        answer = "one kernel" if fused * WORTH < plain else "look: it is no faster"
        because = f"{fused:.3g} ms with RoPE against {plain:.3g} without"
        yield "attention across layers", answer, because
    else:
        yield "attention across layers", "not measured", ""
    wrong = [
        f"{name} {value['error']:.1e}"
        for name, value in found.items()
        if isinstance(value, dict) and value.get("error", 0) > (0.05 if "quant" in name else 0.01)
    ]
    if any(isinstance(v, dict) for v in found.values()):
        yield "kernels compute what torch computes", "no" if wrong else "yes", ", ".join(wrong)


def _products(checks: dict[str, Any]) -> Iterator[Row]:
    found = checks.get("products", {})
    by_rows: dict[str, list[float]] = {}
    for key, one in found.items():
        if isinstance(one, dict) and isinstance(one.get("addmm_"), float):
            by_rows.setdefault(key.split("x")[0], []).append(one["addmm_"])
    if by_rows:
        mean = {rows: sum(v) / len(v) for rows, v in by_rows.items()}
        best = max(mean, key=lambda rows: mean[rows])
        because = ", ".join(f"{rows}: {v:.0f} TFLOP/s" for rows, v in mean.items())
        yield "rows per chunk", best, because
    else:
        yield "rows per chunk", "not measured", ""
    if found.get("fp8_works"):
        bias = [one.get("fp8_bias") for one in found.values() if isinstance(one, dict)]
        fails = [b for b in bias if isinstance(b, str)]
        yield "fp8 products with bias", "no" if fails else "yes", fails[0] if fails else ""
    elif "fp8_works" in found:
        yield "fp8 products with bias", "no fp8 products here", ""
    strided = checks.get("strided_accumulate", {})
    if "baddbmm_ms" in strided:
        one, other = strided["baddbmm_ms"], strided["linear_then_add_ms"]
        right = strided["error"] <= ROUNDING
        answer = "in place" if right and one * WORTH < other else "switch strided_accumulate off"
        yield "across layers: add in the product", answer, f"{one:.3g} ms against {other:.3g}"
    vectors = [v for v in checks.get("golden", {}).values() if isinstance(v, dict)]
    if vectors:
        beyond = [k for k, v in checks["golden"].items() if isinstance(v, dict) and not v["within"]]
        answer = "no" if beyond else "yes"
        yield "official vectors are met", answer, ", ".join(beyond)


def _whole(figures: dict[str, Any]) -> Iterator[Row]:
    measured, rates = figures.get("measured", {}), figures.get("probe", {}).get("rates", {})
    burst, sustained = rates.get("matmul_tflops"), rates.get("sustained_tflops")
    if burst and sustained:
        yield "judged by", "the sustained rate", f"{sustained:.0f} of {burst:.0f} TFLOP/s in bursts"
    waits = figures.get("waits", {})
    if "passed" in waits:
        yield "nothing waits for the device", "yes" if waits["passed"] else "no", waits["summary"]
    ours = measured.get("official/ours", {})
    if ours.get("tflops") and sustained:
        part = ours["tflops"] / sustained
        yield "official, bf16: 85 % of sustained", "yes" if part >= 0.85 else "no", f"{part:.1%}"
    for name, least in (("ours", 1.15), ("fp8", 2.0)):
        one, eager = (measured.get(f"official/{n}", {}).get("median_s") for n in (name, "eager"))
        if one and eager:
            answer = "yes" if eager / one >= least else "no"
            yield f"official, {name}: {least}x eager", answer, f"{eager / one:.2f}x"
    over = ours.get("peak_over_weights_bytes")
    if over is not None:
        yield "official: 4 GB over weights", "yes" if over <= 4e9 else "no", f"{over / 1e9:.2f} GB"
    off = {
        name: value["difference_from_eager"]
        for name, value in measured.items()
        if value.get("difference_from_eager", 0) > (0.15 if "fp8" in name else 0.05)
    }
    if any("difference_from_eager" in v for v in measured.values()):
        because = ", ".join(f"{name} {value:.1e}" for name, value in off.items())
        yield "results agree with eager", "no" if off else "yes", because
