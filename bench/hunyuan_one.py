"""One variant of HunyuanImage-3's base on a device: what bench/hunyuan_device.py calls in a process of its own.

    python -m bench.hunyuan_one --variant fp8_streamed --json FILE [--layers 4] [--reference FILE]
    python -m bench.hunyuan_one --variant resident --device cpu --tiny --json FILE

--reference: where `resident` leaves its prediction, and the others find it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hywu_core.bases.hunyuan_image3.attention import KVCache, Rows, Segment
from hywu_core.bases.hunyuan_image3.codecs import Method
from hywu_core.bases.hunyuan_image3.config import HunyuanConfig
from hywu_core.bases.hunyuan_image3.editing import Denoiser
from hywu_core.bases.hunyuan_image3.passes import prefill
from hywu_core.bases.hunyuan_image3.plan import (
    activation_bytes,
    attention_operations,
    kv_bytes,
    layer_operations,
    vae_bytes,
)
from hywu_core.bases.hunyuan_image3.resting import held_bytes as weights_of
from hywu_core.bases.hunyuan_image3.vae import VAE
from hywu_core.injection import inject

from . import hunyuan_base
from .device import held_bytes, peak_bytes, profile, rates, relative_error, seconds_of, timed, use
from .hunyuan_base import PUBLISHED_LAYERS, RANK, TINY_RANK, Base, Sizes, config_of
from .measure import checked, course_options, write_json
from .one import told

#: Layers of the base.
LAYERS = 4
#: Most calls of a kind, and seconds after which none begins.
CALLS, CALLS_S = 20, 1.5


class Variant(NamedTuple):
    """How the experts are stored and where they rest, and what else is on."""

    method: Method | None = None
    streamed: bool = False
    lora: bool = False
    kv_ram: bool = False
    profiled: bool = False


VARIANTS = {
    "resident": Variant(profiled=True),
    "streamed": Variant(streamed=True),
    "fp8": Variant("fp8", profiled=True),
    "nf4": Variant("nf4", profiled=True),
    "nf4_streamed": Variant("nf4", streamed=True),
    "fp8_streamed": Variant("fp8", streamed=True),
    "lora": Variant(lora=True, profiled=True),
    "int8": Variant("int8"),
    "kv_ram": Variant(kv_ram=True),
    "int8_streamed": Variant("int8", streamed=True),
}
#: In this order, the most wanted first.
NAMES = (
    "rates", "resident", "streamed", "fp8", "nf4", "nf4_streamed", "fp8_streamed", "lora", "vae", "kv_ram", "int8",
    "int8_streamed",
)  # fmt: skip


class Run:
    """A base of one variant and an edit's inputs, and what is timed of them."""

    def __init__(self, variant: Variant, layers: int, tiny: bool, device: torch.device) -> None:
        self.variant, self.device = variant, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.config = config_of(layers, tiny)
        self.sizes = Sizes.tiny() if tiny else Sizes()
        self.base: Base = hunyuan_base.build(
            self.config, device, self.dtype, variant.method, variant.streamed
        )
        self.model = self.base.model
        if variant.kv_ram:
            self.model.kv_device = torch.device("cpu")
        self.sequences = hunyuan_base.sequences(self.config, self.sizes)
        self.source = hunyuan_base.source(self.config, self.sizes, device, self.dtype)
        rank = TINY_RANK if tiny else RANK
        self.lora = (
            hunyuan_base.lora(self.config, rank, device, self.dtype) if variant.lora else None
        )
        channels, side = self.config.vae.latent_channels, self.sizes.grid
        noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(4))
        self.latents = noise.repeat(2, 1, 1, 1).to(device)
        self.t = torch.full((2,), 800.0, device=device)

    @property
    def prefix(self) -> int:
        """Tokens before the image."""
        target = self.sequences[0].target
        assert target is not None
        return target.timestep

    @property
    def rows(self) -> int:
        """Tokens of a later step, of one branch."""
        return self.sizes.grid**2 + 1

    @property
    def kv_bytes(self) -> int:
        """Keys and values of both branches."""
        return 2 * (self.prefix + self.rows) * kv_bytes(self.config, self.dtype)

    def denoiser(self) -> Denoiser:
        return Denoiser(self.model, self.sequences, [[self.source], [self.source]])

    def operations(self, tokens: int, seen: float) -> int:
        """Of both branches' products and attention scores; seen: keys of a token, on average."""
        config = self.config
        return int(2 * tokens * (layer_operations(config) + attention_operations(config, seen)))

    def weights(self) -> int:
        """Bytes of weights on the device, the memory of slots and decoding included."""
        offloaded = self.base.offloaded
        return weights_of(self.model) + (0 if offloaded is None else offloaded.nbytes)


def measure(
    run: Run, before: int, reference: Path | None, show: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Figures of one variant. before: bytes held on the device before it was built."""
    figures: dict[str, Any] = {"weights_bytes": run.weights(), "layers": run.config.num_layers}
    figures["planned_kv_bytes"] = run.kv_bytes
    if run.base.offloaded is not None:
        figures["placed_bytes"] = run.base.offloaded.placement.total_bytes
    on = nullcontext() if run.lora is None else inject(run.model, run.lora)
    with on:
        with run.denoiser() as denoiser:

            def step() -> Tensor:
                return denoiser(run.latents, run.t)

            predicted = step()
            figures["kv_bytes"] = KVCache.live()
            figures["step"] = _passed(run, step, run.rows, run.prefix + run.rows, before)
            figures |= _compared(predicted, reference, first=run.variant == VARIANTS["resident"])
            show(figures)
            if run.variant.profiled:
                figures["profile"] = profile(step, run.device)
        show(figures)

        def prefix() -> None:
            run.denoiser()._prefix().close()

        seen = _prefix_keys(run)
        figures["prefix"] = _passed(run, prefix, run.prefix, seen, before)
        show(figures)
        figures["token"] = _token(run)
    return figures


def _passed(
    run: Run, function: Callable[[], Any], tokens: int, seen: float, before: int
) -> dict[str, Any]:
    """Time, arithmetic, traffic and memory of a pass."""
    found: dict[str, Any] = timed(function, run.device, CALLS_S, CALLS)
    found["operations"] = run.operations(tokens, seen)
    found["tflops"] = found["operations"] / found["median_s"] / 1e12
    inside = found["share_in_layers"] = _within_layers(run, function)
    times = 1 - inside + inside * PUBLISHED_LAYERS / run.config.num_layers
    found["published_s"] = found["median_s"] * times
    if run.base.offloaded is not None:
        traffic = run.base.offloaded.traffic
        start = (traffic.nbytes, traffic.chunks, traffic.matrices)
        function()
        done = (traffic.nbytes, traffic.chunks, traffic.matrices)
        moved = zip(("moved_bytes", "chunks", "matrices"), start, done, strict=True)
        found |= {name: b - a for name, a, b in moved}
    cuda, live = run.device.type == "cuda", KVCache.live()
    # on a CPU what came newly is counted; keys and values come with the prefix
    peak = peak_bytes(function, run.device) - (before + run.weights() if cuda else 0)
    if not (cuda and run.variant.kv_ram) and (cuda or not live):
        peak -= live or run.kv_bytes
    found["peak_over_weights_and_kv_bytes"] = peak
    found["planned_activation_bytes"] = activation_bytes(run.config, 2 * tokens, run.dtype)
    return found


def _within_layers(run: Run, function: Callable[[], Any]) -> float:
    """The share of one call's time that passes in the layers."""
    model, decode = run.model, run.model.decode
    spans: list[float] = []

    def watched(*args: Any) -> Tensor:
        made: list[Tensor] = []
        spans.append(seconds_of(lambda: made.append(decode(*args)), run.device))
        return made[0]

    model.decode = watched  # type: ignore[method-assign]
    try:
        whole = seconds_of(function, run.device)
    finally:
        model.decode = decode  # type: ignore[method-assign]
    return sum(spans) / whole


def _prefix_keys(run: Run) -> float:
    """Keys that a token of the prefix sees, on average."""
    segments = run.sequences[0].rows(0, run.prefix).segments
    seen = sum(
        (s.stop - s.start) * (s.stop if s.full else (s.start + s.stop + 1) / 2) for s in segments
    )
    return seen / run.prefix


def _token(run: Run) -> dict[str, Any]:
    """One more token of text behind the prefix, of one branch: as a chain of thought is written."""
    model, stop = run.model, run.prefix
    cache = KVCache(run.config, 1, stop + 1, model.kv_device)
    try:
        with torch.no_grad():
            prefill(model, run.sequences[:1], [[run.source]], [stop], cache)
            x = model.model.wte(torch.tensor([[7]], device=model.device))
            yx = torch.full((1, 1, 2), stop)
            rows = [Rows((Segment(stop, stop + 1, True),))]

            def one() -> Tensor:
                return model.decode(x, yx, rows, cache)

            found: dict[str, Any] = timed(one, run.device, CALLS_S, CALLS)
            found["published_s"] = found["median_s"] / run.config.num_layers * PUBLISHED_LAYERS
            if run.base.offloaded is not None:
                start = run.base.offloaded.traffic.nbytes
                one()
                found["moved_bytes"] = run.base.offloaded.traffic.nbytes - start
    finally:
        cache.close()
    return found


def _compared(predicted: Tensor, path: Path | None, first: bool) -> dict[str, Any]:
    """The prediction against the resident one's, which writes it."""
    if path is None:
        return {}
    if first:
        save_file({"prediction": predicted.cpu().contiguous()}, str(path))
        return {"finite": bool(predicted.isfinite().all())}
    if not path.is_file():
        return {}
    wanted = load_file(str(path))["prediction"]
    here = predicted.cpu()
    apart = (here - wanted).abs()
    return {
        "equal": torch.equal(here, wanted),
        "difference": relative_error(here, wanted),
        "median_difference": (apart.median() / wanted.abs().median()).item(),
    }


def vae(config: HunyuanConfig, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Decoding an image, in float32 and bfloat16: time, and memory beside the weights."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            network = VAE(config.vae)
        del network.encoder
        before = held_bytes(device)
        network = hunyuan_base.drawn_module(network, config, device, dtype)
        weights = weights_of(network)
        shape = (1, config.vae.latent_channels, sizes.grid, sizes.grid)
        latents = torch.randn(shape, device=device)

        def decode(network: Any = network, latents: Tensor = latents) -> Tensor:
            return network.decode(latents)

        each: dict[str, Any] = timed(decode, device, CALLS_S, CALLS)
        peak = peak_bytes(decode, device)
        each["weights_bytes"] = weights
        each["peak_over_weights_bytes"] = peak - (before + weights if device.type == "cuda" else 0)
        pixels = (sizes.grid * config.factor) ** 2
        each["planned_bytes"] = vae_bytes(config.vae, pixels, dtype)
        found[str(dtype).removeprefix("torch.")] = each
        del network, decode, latents
    return found


def one(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of --variant; "failed" has the error where there is one."""
    device = use(args.device)
    figures: dict[str, Any] = {}

    def show(found: dict[str, Any]) -> None:
        figures.update(found)
        write_json(args.json, figures)

    try:
        if args.variant == "rates":
            edge, span = (128, 0.02) if args.tiny else (8192, 2.0)
            show(rates(device, edge, torch.bfloat16, span))
        elif args.variant == "vae":
            show(vae(config_of(1, args.tiny), Sizes.tiny() if args.tiny else Sizes(), device))
        else:
            before, start = held_bytes(device), time.perf_counter()
            run = Run(VARIANTS[args.variant], args.layers, args.tiny, device)
            held_bytes(device)  # waits for it
            show({"build_s": time.perf_counter() - start})
            show(measure(run, before, args.reference, show))
    except torch.cuda.OutOfMemoryError as error:
        show({"failed": f"out of memory: {str(error).splitlines()[0]}"})
    except Exception as error:  # what was measured before it stays
        show({"failed": told(error)})
    return figures


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    course_options(parser)
    parser.add_argument("--variant", choices=NAMES, required=True)
    parser.add_argument("--layers", type=int, default=LAYERS, help="default: %(default)s")
    parser.add_argument("--reference", type=Path, help="where `resident` leaves its prediction")
    one(checked(parser, arguments))


if __name__ == "__main__":
    main()
