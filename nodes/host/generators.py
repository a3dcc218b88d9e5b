"""A generator under ComfyUI's memory manager: loading, memory estimate, progress, interruption."""

from __future__ import annotations

import time
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import torch

from ...hywu_core.condition import Condition
from ...hywu_core.errors import HYWUError
from ...hywu_core.files import open_tensors
from ...hywu_core.generator.checkpoints import load_generator, open_checkpoint
from ...hywu_core.generator.config import GeneratorConfig
from ...hywu_core.lora import GeneratedLoRA
from . import operations
from .cache import CACHE
from .paths import generator_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def activation_bytes(config: GeneratorConfig, batch: int, tokens: int, itemsize: int) -> int:
    """The stream and its copy, the projected condition, the LoRAs, and two chunks."""
    stream = batch * config.num_positions * config.d_model
    condition = batch * tokens * config.d_model * 4
    return (2 * stream + condition + batch * config.layout.num_values) * itemsize + (1 << 30)


class HostGenerator:
    """What the HYWU_GENERATOR socket carries. `patcher` is what ComfyUI loads and evicts."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        network = load_generator(path, "cpu", dtype, operations=operations)
        self.config: GeneratorConfig = network.config
        self.dtype = dtype
        # The plain patcher: a sublayer holds several cast weights at once, and the dynamic one's
        # cast buffers hold one.
        self.patcher = comfy.model_patcher.ModelPatcher(
            network, mm.get_torch_device(), mm.unet_offload_device()
        )

    @property
    def identity(self) -> tuple[str, str]:
        return (self.config.provenance["checkpoint"]["digest"], str(self.dtype))

    def get_ram_usage(self) -> int:
        return self.patcher.model_size()

    def memory_required(self, condition: Condition) -> int:
        """Bytes of activations."""
        size = self.dtype.itemsize
        return activation_bytes(self.config, condition.batch_size, condition.num_tokens, size)

    def run(self, condition: Condition) -> GeneratedLoRA:
        """Generate, on the device, with progress and interruption after each block."""
        network, device = self.patcher.model, self.patcher.load_device
        mm.load_models_gpu([self.patcher], memory_required=self.memory_required(condition))
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

        return network(condition, on_block)


def load(name: str, precision: str) -> HostGenerator:
    path = generator_path(name)
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
        lora = generator.run(condition).to("cpu")
        lora.check_finite()
        CACHE.put(key, lora)
    return lora, time.perf_counter() - start, cached


def _check_origin(generator: HostGenerator, condition: Condition) -> None:
    """Two encoders can have tokens of one width and yet mean different things."""
    for name, key in (("encoder", "type"), ("editor", "editor")):
        made, wanted = condition.origin.get(name), generator.config.encoder.get(key)
        if None not in (made, wanted) and made != wanted:
            raise HYWUError(
                f"The condition was made by the {name} '{made}', this generator was trained on those "
                f"of '{wanted}'; encode it with this generator."
            )
