"""Expert banks whose memory is ComfyUI's to place, and this project's streaming of those left in host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import comfy.ops
import torch
from torch import Tensor, nn

from ....hywu_core.bases.hunyuan_image3.banks import CodedBank
from ....hywu_core.bases.hunyuan_image3.chunks import in_chunks
from ....hywu_core.bases.hunyuan_image3.codecs import Codec, Plain
from ....hywu_core.bases.hunyuan_image3.matrices import Source
from ....hywu_core.bases.hunyuan_image3.placement import CHUNK, SLOTS
from ....hywu_core.bases.hunyuan_image3.staging import Slots, Traffic, Workspace, staged_product
from ....hywu_core.grouped import GroupedLinear, grouped_linear


class Held(Source):
    """A bank's matrices in a parameter ``[experts, ...]`` in host memory, which the host may have page-locked."""

    def __init__(self, held: Tensor, shape: tuple[int, int], codec: Codec) -> None:
        super().__init__(shape, codec)
        self._flat = held.detach().flatten(1).view(torch.uint8)

    def read(self, experts: Sequence[int], into: Tensor) -> None:
        first, last = experts[0], experts[-1]
        if last - first + 1 == len(experts):
            into.copy_(self._flat[first : last + 1], non_blocking=True)
            return
        for view, expert in zip(into, experts, strict=True):
            view.copy_(self._flat[expert], non_blocking=True)


class Staging:
    """Two slots of device memory that a network's banks share for the length of a pass, if any needs them."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._banks: list[Banks | CodedBanks] = []
        self._slots: Slots | None = None

    def share(self, network: nn.Module) -> None:
        """Let all banks of a network use these slots."""
        self._banks = [m for m in network.modules() if isinstance(m, (Banks, CodedBanks))]
        for bank in self._banks:
            bank.staging = self

    @property
    def nbytes(self) -> int:
        """What the slots take while a pass streams."""
        return SLOTS * CHUNK * max((bank.matrix_bytes for bank in self._banks), default=0)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Around a pass: slots that it took are given back at its end, however it ends."""
        try:
            yield
        finally:
            if self._slots is not None:
                self._slots.allocate(free=True)
                self._slots = None

    def slots(self, device: torch.device) -> Slots:
        if self._slots is None:
            self._slots = Slots(self.nbytes // SLOTS, device)
            self._slots.traffic = self.traffic
        return self._slots


class Banks(GroupedLinear, comfy.ops.CastWeightBiasOp):
    """Banks that may rest in host memory; then only experts with rows are copied, in chunks."""

    comfy_cast_weights = True
    bias = None
    staging: Staging

    @property
    def matrix_bytes(self) -> int:
        return self.weight[0].nbytes

    def forward(self, x: Tensor, ends: Tensor, items: Tensor | None = None) -> Tensor:
        weight = self.weight
        if self.weight_function:
            weight, _ = comfy.ops.cast_bias_weight(self, x)
        if weight.device == x.device and weight.dtype == x.dtype:
            return grouped_linear(x, weight, ends)
        if weight.device == x.device:

            def cast(experts: Sequence[int]) -> Tensor:
                return weight[list(experts)].to(x.dtype)

            return in_chunks(x, ends, self.out_features, CHUNK, cast)
        held = Held(weight, (self.out_features, self.in_features), Plain("stored", weight.dtype))
        slots = self.staging.slots(x.device)
        return staged_product(
            x, ends, self.out_features, held, slots, CHUNK, Workspace(0, x.device)
        )


class CodedBanks(CodedBank, comfy.ops.CastWeightBiasOp):
    """Quantized banks: ComfyUI counts their bytes as they are, and may leave them in host memory."""

    comfy_cast_weights = True
    weight = bias = None  # ComfyUI looks for both in every layer that it casts
    staging: Staging

    @property
    def matrix_bytes(self) -> int:
        return self.source.matrix_bytes

    def forward(self, x: Tensor, ends: Tensor, items: Tensor | None = None) -> Tensor:
        if self.coded.device == x.device:
            return super().forward(x, ends, items)
        held = Held(self.coded, self.source.shape, self.source.codec)
        slots = self.staging.slots(x.device)
        return staged_product(x, ends, self.out_features, held, slots, self.chunk, self.workspace)
