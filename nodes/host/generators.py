"""A generator under ComfyUI's memory manager: loading, memory estimate, progress, interruption."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ...hywu_core import fingerprint
from ...hywu_core.condition import Condition
from ...hywu_core.encoders.base import Reads
from ...hywu_core.errors import HYWUError, get_logger, out_of_memory
from ...hywu_core.files import open_tensors
from ...hywu_core.generator.checkpoints import load_generator, open_checkpoint
from ...hywu_core.generator.config import GeneratorConfig
from ...hywu_core.generator.speed import graphs
from ...hywu_core.generator.speed.memory import Sizes, default_chunk_bytes
from ...hywu_core.generator.speed.prefix import PREFIX_CACHE_BYTES
from ...hywu_core.lora import GeneratedLoRA
from . import operations
from .cache import CACHE
from .paths import FITTING, generator_names, generator_path
from .resident import keep, to_host

log = get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: The precision whose weights are e4m3 with one scale per row; products are in the device's own.
FP8_WEIGHTS = "fp8-weights"
#: Field of a condition's origin -> where the checkpoint says it of its encoder.
ORIGINS = (("encoder", "type"), ("editor", "editor"))


def activation_bytes(config: GeneratorConfig, batch: int, tokens: int, itemsize: int) -> int:
    """The most that a generation holds beside the weights on ComfyUI's device, an upper bound.

    The engine's own bound, the kept prefix, and two sublayers' weights, which are copied where ComfyUI left
    them in host memory (two of 8 bits, and one of them cast, are no more): those of the feed-forward are the
    largest, ``2 · 4d · d``.
    """
    chunk = default_chunk_bytes(mm.get_torch_device())
    sizes = Sizes(config, 0, 0, itemsize, batch, tokens, chunk, PREFIX_CACHE_BYTES)
    prefix = sizes.hidden_bytes if sizes.hidden_bytes <= PREFIX_CACHE_BYTES else 0
    return sizes.working_bytes(chunk) + prefix + 16 * config.d_model**2 * itemsize


class HostGenerator:
    """What the HYWU_GENERATOR socket carries. `patcher` is what ComfyUI loads and evicts.

    dtype: in what it computes.
    fp8: whether its weights are kept in 8 bits.
    """

    def __init__(self, path: Path, dtype: torch.dtype, fp8: bool = False) -> None:
        network = load_generator(path, "cpu", dtype, operations=operations)
        network.prefix_cache_bytes = PREFIX_CACHE_BYTES  # no more than ComfyUI is told
        if fp8:
            operations.round_weights(network.model.blocks)
        self.config: GeneratorConfig = network.config
        self.dtype, self.fp8 = dtype, fp8
        self._weights = weights_digest(network)
        # The plain patcher: a sublayer holds several cast weights at once, and the dynamic one's
        # cast buffers hold one.
        self.patcher = comfy.model_patcher.ModelPatcher(
            network, mm.get_torch_device(), mm.unet_offload_device()
        )
        # of the network alone: a reference back to this object would keep its weights for longer
        self.patcher.add_callback(CallbacksMP.ON_DETACH, partial(_forget_graphs, network))

    @property
    def reads(self) -> Reads:
        return Reads.of(self.config)

    @property
    def identity(self) -> tuple[str, str]:
        """Which weights were loaded, every value of them, and in what they compute.

        The digest in the checkpoint's provenance looks at places of the file only, and at what lies there
        now, which may be another file than the one that was loaded.
        """
        precision = f"{self.dtype}{f', {FP8_WEIGHTS}' if self.fp8 else ''}"
        return (self._weights.result(), precision)

    def get_ram_usage(self) -> int:
        return self.patcher.model_size()

    def memory_required(self, condition: Condition) -> int:
        """Bytes of activations."""
        size = self.dtype.itemsize
        return activation_bytes(self.config, condition.batch_size, condition.num_tokens, size)

    def run(self, condition: Condition) -> GeneratedLoRA:
        """Generate on the device; when memory runs out, once more with no weights resident.

        Raises HYWUError when it runs out again.
        """
        for offloaded in (False, True):
            try:
                if offloaded:
                    self._offload()
                else:
                    need = self.memory_required(condition)
                    mm.load_models_gpu([self.patcher], memory_required=need)
                return self._generate(condition)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            # from here on, without the exception, whose frames hold what the failed call had
            if not offloaded:
                log.warning(
                    "HY-WU: out of memory while generating a LoRA; trying once more with the "
                    "generator's weights offloaded to host memory (the same LoRA, slower)."
                )
        self.patcher.detach()
        mm.soft_empty_cache()
        raise HYWUError(
            f"Generating {condition.batch_size} LoRAs from {condition.num_tokens} condition tokens "
            "runs out of memory even with the generator's weights offloaded to host memory; generate "
            "for fewer images at once, or load the generator with another precision."
        )

    def _offload(self) -> None:
        """Take all models off the device; this one's weights are then copied where they are used."""
        mm.unload_all_models()
        mm.soft_empty_cache()
        # as ComfyUI's --novram does: 0 would mean all
        self.patcher.partially_load(self.patcher.load_device, extra_memory=0.1)

    def _generate(self, condition: Condition) -> GeneratedLoRA:
        """One forward, with progress and interruption after each block."""
        network, device = self.patcher.model, self.patcher.load_device
        for module in network.modules():
            # norms and embeddings are small and can't be cast where they are used
            if not hasattr(module, "comfy_cast_weights"):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(device)
        bar = comfy.utils.ProgressBar(self.config.num_blocks)
        events: list[torch.cuda.Event] = []

        def on_block(done: int, total: int) -> None:
            if device.type == "cuda":
                events.append(torch.cuda.Event())
                events[-1].record()
                if len(events) > 2:
                    events.pop(0).synchronize()
            bar.update_absolute(done, total)
            mm.throw_exception_if_processing_interrupted()

        with operations.copied_ahead(network):
            return graphs.generate(network, condition, on_block)


def _forget_graphs(network: nn.Module, *_: Any) -> None:
    """When ComfyUI takes the weights off the device: graphs hold memory there, too."""
    network.graphs = None


def weights_digest(network: nn.Module) -> Future[str]:
    """Hash of every value of a network as it is now, made beside whatever goes on: 16 GB take seconds."""
    pieces = [
        piece
        for name, value in sorted(network.state_dict().items())
        for piece in (f"{name} {value.dtype} {tuple(value.shape)}", value)
    ]
    digest: Future[str] = Future()

    def run() -> None:
        try:
            digest.set_result(fingerprint.digest(pieces))
        except BaseException as error:
            digest.set_exception(error)
        pieces.clear()  # the weights may have left host memory meanwhile

    threading.Thread(target=run, name="hywu-digest", daemon=True).start()
    return digest


def fitting(model: Any) -> str:
    """Name of the one checkpoint that was made for a MODEL's layers. Raises HYWUError on none, and on several."""
    if model is None:
        raise HYWUError(
            f"checkpoint is '{FITTING}', which takes the generator that fits a model; connect the MODEL, or "
            "choose a checkpoint."
        )
    return fitting_network(model.model.diffusion_model)


def fitting_network(network: nn.Module) -> str:
    """As `fitting`, of a network."""
    fits, others = [], []
    for name in generator_names():
        if name == FITTING:
            continue
        try:
            layout = open_checkpoint(generator_path(name)).config.layout
        except HYWUError as error:
            log.warning("HY-WU: '%s' is no generator that can be read: %s", name, error)
            continue
        try:
            layout.check(network)
            fits.append(name)
        except HYWUError:
            others.append(name)
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise HYWUError(
            f"{len(fits)} generators fit the connected MODEL: {', '.join(fits)}; choose one of them in "
            f"checkpoint instead of '{FITTING}'."
        )
    raise HYWUError(
        f"No generator fits the connected MODEL ({type(network).__name__}); there are "
        f"{', '.join(others) or 'none'}. Put the one that was trained for it into models/hywu and press R."
    )


def check_fit(name: str, model: Any) -> None:
    """Raises HYWUError where a checkpoint's LoRAs are for other layers than a MODEL's; reads no weights."""
    try:
        open_checkpoint(generator_path(name)).config.layout.check(model.model.diffusion_model)
    except HYWUError as error:
        raise HYWUError(
            f"The generator '{name}' doesn't fit the connected MODEL: {error}"
        ) from error


def load(name: str, precision: str) -> HostGenerator:
    """precision: one of DTYPES, FP8_WEIGHTS, or "auto"."""
    path = generator_path(name)
    if precision == FP8_WEIGHTS:
        half = mm.should_use_bf16(mm.get_torch_device())
        return HostGenerator(path, torch.bfloat16 if half else torch.float32, fp8=True)
    return HostGenerator(path, DTYPES.get(precision) or _auto_dtype(path))


def _auto_dtype(path: Path) -> torch.dtype:
    """The checkpoint's precision, or float32 where the device is slow at a half one."""
    source = open_checkpoint(path)
    with open_tensors(source.files[0]) as file:
        stored = file.get_slice(next(iter(file.keys()))).get_dtype()
    half = stored in ("BF16", "F16") and mm.should_use_bf16(mm.get_torch_device())
    return torch.bfloat16 if half else torch.float32


@torch.inference_mode(False)
@torch.no_grad()
def generate(generator: HostGenerator, condition: Condition) -> tuple[GeneratedLoRA, float, bool]:
    """(LoRA in host memory, seconds, whether it was kept from before). Raises HYWUError."""
    start = time.perf_counter()
    if not bool(condition.is_finite()):
        raise HYWUError("The condition has NaN or infinite values; encode it again.")
    _check_origin(generator, condition)
    key = (*generator.identity, condition.digest())
    lora = CACHE.get(key)
    cached = lora is not None
    if lora is None:
        placed = generator.run(condition)
        lora = to_host(placed)
        CACHE.put(key, lora)
        keep(lora, placed)
    return lora, time.perf_counter() - start, cached


def _check_origin(generator: HostGenerator, condition: Condition) -> None:
    """Two encoders can have tokens of one width and yet mean different things."""
    origin, encoder = condition.origin, generator.config.encoder
    pairs = [(name, origin.get(name), encoder.get(key)) for name, key in ORIGINS]
    own = [each.get("model") or {} for each in (origin, encoder)]
    pairs += [
        (f"model's {key}", *(model.get(key) for model in own)) for key in ("network", "layer")
    ]
    for name, made, wanted in pairs:
        if None not in (made, wanted) and made != wanted:
            raise HYWUError(
                f"The condition was made by the {name} '{made}', this generator was trained on those "
                f"of '{wanted}'; encode it with this generator."
            )
