"""What happens between the generator's matrix products: in plain torch, and fused on CUDA.

Both compute the same function; `Switches` names the fused path's parts, each of which can be switched off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import HYWUError, get_logger
from ..rope import Axes, rotate, rotate_
from .fp8 import Fp8Linear, Fp8Weight, Quantized, has_e4m3
from .memory import MemoryPlan, default_chunk_bytes

if TYPE_CHECKING:
    from ..model import ParameterGenerator

log = get_logger(__name__)

EPS = 1e-6

#: Weight and bias of a product that adds to the hidden states, and none.
Product = tuple[Any, Tensor | None]
NONE: Product = (None, None)

#: Attention kernels take no more sequences at once: a CUDA grid's second and third dimensions end there.
MOST_SEQUENCES = 65535

#: cuDNN's attention, which torch prefers on some devices, builds a plan for each new shape and takes
#: masks of no odd length: it is left what has no mask and at least so many keys.
CUDNN_KEYS = 256

#: Rows and columns of the tiles that matrix products are cut into, to fill whole waves of them.
TILE_ROWS, TILE_COLUMNS = 128, 256


@dataclass(frozen=True)
class Switches:
    """Parts of the fast path on CUDA. None changes what is computed.

    attention_by_shape: short and masked attention keeps away from cuDNN.
    across: RoPE and attention across layers in one kernel.
    wide_rope: RoPE loads whole heads.
    pending_bias: output biases wait in one vector that norms add on their way.
    strided_accumulate: the product of the attention across layers adds to the hidden states as they lie.
    waves: chunks fill whole waves of tiles.
    keep_prefix: the constant prefix is kept where memory is free.
    fp8_norm, fp8_silu, fp8_across: norms, SiLU and the attention across layers write 8 bits themselves.
    fp8_loop: in 8 bits, the sublayers after the attention across layers take turns on each chunk of whole
        layers, so that adding a product and the next norm are one pass.
    norm_rows: a norm's program takes several rows, the next one loaded while one is summed up.
    The last two are off until a device has measured them.
    """

    attention_by_shape: bool = True
    across: bool = True
    wide_rope: bool = True
    pending_bias: bool = True
    strided_accumulate: bool = True
    waves: bool = True
    keep_prefix: bool = True
    fp8_norm: bool = True
    fp8_silu: bool = True
    fp8_across: bool = True
    fp8_loop: bool = False
    norm_rows: bool = False

    def without(self, *names: str) -> Switches:
        """The same with some parts off. Raises HYWUError on a name that isn't one."""
        return self._set(names, False)

    def also(self, *names: str) -> Switches:
        """The same with some parts on. Raises HYWUError on a name that isn't one."""
        return self._set(names, True)

    def _set(self, names: Sequence[str], on: bool) -> Switches:
        known = [field.name for field in dataclasses.fields(self)]
        for name in names:
            if name not in known:
                raise HYWUError(f"'{name}' is no part of the fast path; there are {known}.")
        return dataclasses.replace(self, **dict.fromkeys(names, on))


def linear(x: Any, weight: Any, bias: Tensor | None) -> Tensor:
    """``F.linear`` with either kind of weight: a tensor, or an object that multiplies in its own way."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight.linear(x, bias)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, by_shape: bool) -> Tensor:
    """Scaled dot-product attention of ``[B, L, H, hd]`` tensors; returns ``[B, L, H * hd]``."""
    short = q.is_cuda and (mask is not None or k.shape[1] < CUDNN_KEYS)
    with _without_cudnn() if short and by_shape else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
    return out.transpose(1, 2).flatten(2)


def _without_cudnn() -> Any:
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def even_step(length: int, most: int) -> int:
    """The step that cuts `length` into as few chunks of `most` as there must be, all alike."""
    chunks = -(-length // max(1, most))
    return -(-length // chunks)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


def wave_rows(multiprocessors: int, columns: int) -> int:
    """The least rows whose product with so many columns has as many tiles as fill whole waves."""
    across = max(1, columns // TILE_COLUMNS)
    return TILE_ROWS * multiprocessors // math.gcd(multiprocessors, across)


class Passes:
    """Plain torch.

    in_place: hidden states are added to where they lie, chunk by chunk (inference).

    chunk_rows: rows of ``d_model`` values that one chunk holds at most, about.
    """

    def __init__(self, in_place: bool, chunk_rows: int, switches: Switches) -> None:
        self.in_place, self.chunk_rows, self.switches = in_place, chunk_rows, switches

    def chunks(self, length: int, rows_each: int, most: int | None = None) -> Iterator[slice]:
        """Slices of a dimension of `length`, of whose indices each holds `rows_each` rows."""
        fitting = self.chunk_rows // rows_each
        most = fitting if most is None else min(fitting, most)
        return _slices(length, self.step(length, rows_each, most))

    def step(self, length: int, rows_each: int, most: int) -> int:
        return even_step(length, most)

    def head_chunks(self, layers: int, rows_each: int) -> Iterator[slice]:
        """As `chunks`, for the output projections, whose intermediates are a quarter as wide."""
        return _slices(layers, even_step(layers, 4 * self.chunk_rows // rows_each))

    def norm(self, norm: nn.Module, x: Tensor, out: Product = NONE, to: Any = None) -> Any:
        """``norm(x)``.

        out: weight and bias of the product that will add to x.
        to: what multiplies it.
        """
        return norm(x)

    def rotate(self, x: Tensor, axes: Axes) -> Tensor:
        """``x [M, L, H, hd]`` turned; over itself in inference."""
        table = axes.whole()[:, :, None]
        return rotate_(x, table) if self.in_place else rotate(x, table)

    def self_attention(self, qkv: Tensor, axes: Axes, heads: int, to: Any) -> Any:
        """``qkv [M, L, 3 * d]`` -> attention within each of M sequences ``[M, L, d]``."""
        qkv = qkv.unflatten(-1, (3 * heads, -1))
        turned = self.rotate(qkv[:, :, : 2 * heads], axes)  # q and k in one go
        return self.attention(turned[:, :, :heads], turned[:, :, heads:], qkv[:, :, 2 * heads :])

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of ``[B, L, H, hd]``, q and k turned already: ``[B, L, H * hd]``."""
        return attention(q, k, v, mask, self.switches.attention_by_shape)

    def silu(self, x: Tensor, to: Any) -> Any:
        return F.silu(x, inplace=self.in_place)

    def accumulate(self, states: Tensor, x: Any, out: Product) -> None:
        """Add ``linear(x, *out)`` to a chunk of the hidden states, in place."""
        weight, bias = out
        if states.is_contiguous() and _multiplies(states, x, weight):
            rows = states.view(-1, states.shape[-1])
            if bias is not None:
                rows.add_(bias)
            rows.addmm_(x.view(-1, x.shape[-1]), weight.t())
        else:
            states.add_(linear(x, weight, bias))

    def takes_turns(self, first: Iterable[nn.Module], hidden: list[Tensor]) -> bool:
        """Whether sublayers take turns on each chunk of whole layers of ``hidden [B, N, S, d]``.

        first: the layer that each one's norm goes into.
        """
        return False

    def product(self, x: Any, out: Product) -> Tensor:
        """What `accumulate` adds, for `add_norm`."""
        return linear(x, *out)

    def add_norm(self, norm: nn.Module, states: Tensor, added: Tensor, to: Any) -> Any:
        """Add a product to a chunk of the hidden states, in place; returns their `norm`."""
        return self.norm(norm, states.add_(added), to=to)

    def settle(self, bias: Tensor | None) -> None:
        """A sublayer with this output bias is over, for all hidden states."""

    @property
    def pending(self) -> Tensor | None:
        """What norms add to hidden states that were not written yet: ``[d]`` float32, or None."""
        return None

    def resume(self, pending: Tensor | None) -> None:
        """Take over hidden states for which so much is pending."""


class FusedPasses(Passes):
    """With Triton kernels, in inference.

    kernels: the module, or one that stands in for it.
    """

    def __init__(
        self, chunk_rows: int, switches: Switches, kernels: ModuleType, wave: int | None = None
    ) -> None:
        super().__init__(True, chunk_rows, switches)
        self._kernels, self._wave = kernels, wave if switches.waves else None
        self._pending: Tensor | None = None

    def step(self, length: int, rows_each: int, most: int) -> int:
        unit = 0 if self._wave is None else self._wave // rows_each
        return most - most % unit if 0 < unit <= most < length else even_step(length, most)

    def norm(self, norm: nn.Module, x: Tensor, out: Product = NONE, to: Any = None) -> Any:
        weight, bias = out
        if self.switches.pending_bias or not self._accumulates(x, weight):
            bias = None
        return self._normed(norm, x, to, bias=bias)

    def _normed(
        self, norm: nn.Module, x: Tensor, to: Any, bias: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Any:  # fmt: skip
        options = {"bias": bias, "pending": self._pending, "added": added}
        options["several"] = self.switches.norm_rows
        if self.switches.fp8_norm and _quantizes(to, x):
            made = self._kernels.rms_norm_quantized(x, norm.weight, EPS, **options)
            return Quantized(*made, x.shape, x.dtype)
        return self._kernels.rms_norm(x, norm.weight, EPS, **options)

    def rotate(self, x: Tensor, axes: Axes) -> Tensor:
        return self._kernels.rotate_(x, axes.first, axes.second, self.switches.wide_rope)

    def self_attention(self, qkv: Tensor, axes: Axes, heads: int, to: Any) -> Any:
        _, length, width = qkv.shape
        shared = axes.first.shape[0] == axes.second.shape[0] == 1
        fits = self._kernels.takes_across(length, width // (3 * heads))
        if not (self.switches.across and shared and fits):
            return super().self_attention(qkv, axes, heads, to)
        if self.switches.fp8_across and _quantizes(to, qkv):
            values, scale = self._kernels.across_quantized(qkv, *axes, heads)
            return Quantized(values, scale, (*qkv.shape[:2], width // 3), qkv.dtype)
        return self._kernels.across(qkv, *axes, heads)

    def silu(self, x: Tensor, to: Any) -> Any:
        if self.switches.fp8_silu and _quantizes(to, x):
            rows = x.view(-1, x.shape[-1])
            return Quantized(*self._kernels.quantize_rows(rows, silu=True), x.shape, x.dtype)
        return super().silu(x, to)

    def accumulate(self, states: Tensor, x: Any, out: Product) -> None:
        weight, bias = out
        if not (self._accumulates(states, weight) and _multiplies(states, x, weight)):
            # a bias that waits is settled, one that doesn't was left for here (see `norm`)
            waits = self.switches.pending_bias or self._accumulates(states, weight)
            states.add_(linear(x, weight, None if waits else bias))
        elif states.is_contiguous():
            rows = states.view(-1, states.shape[-1])
            rows.addmm_(x.view(-1, x.shape[-1]), weight.t())
        else:
            # sequences across layers: every layer's rows are dense, so each is one product of a batch
            many = weight.t().expand(states.shape[2], *weight.t().shape)
            for item, rows in zip(states, x, strict=True):
                item.transpose(0, 1).baddbmm_(rows.transpose(0, 1), many)

    def _accumulates(self, states: Tensor, weight: Any) -> bool:
        """Whether the product adds to the hidden states itself."""
        lies = states.is_contiguous() or self.switches.strided_accumulate
        return isinstance(weight, Tensor) and lies

    def takes_turns(self, first: Iterable[nn.Module], hidden: list[Tensor]) -> bool:
        if not self.switches.fp8_loop:
            return False
        x = hidden[0]
        fits = all(s.shape[0] * s.shape[2] <= self.chunk_rows for s in hidden)
        return fits and all(
            isinstance(layer, Fp8Linear) and _quantizes(layer.resolve(x)[0], x) for layer in first
        )

    def product(self, x: Any, out: Product) -> Tensor:
        weight, bias = out
        return linear(x, weight, None if self.switches.pending_bias else bias)

    def add_norm(self, norm: nn.Module, states: Tensor, added: Tensor, to: Any) -> Any:
        return self._normed(norm, states, to, added=added)

    def settle(self, bias: Tensor | None) -> None:
        if self.switches.pending_bias and bias is not None:
            # float32 plus a narrower dtype is float32
            self._pending = bias.float() if self._pending is None else self._pending + bias

    @property
    def pending(self) -> Tensor | None:
        return self._pending

    def resume(self, pending: Tensor | None) -> None:
        self._pending = pending


def _multiplies(states: Tensor, x: Any, weight: Any) -> bool:
    """Whether torch adds the product in place: of one dtype, which autocast may have changed."""
    return (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and states.dtype == x.dtype == weight.dtype
    )


def _quantizes(to: Any, x: Tensor) -> bool:
    """Whether what multiplies x wants it in 8 bits."""
    return isinstance(to, Fp8Weight) and to.fast(x.device, x.dtype)


def passes_for(
    generator: ParameterGenerator, tokens: Tensor, in_place: bool, plan: MemoryPlan | None
) -> Passes:
    """How a call runs whose projected condition is `tokens`."""
    chunk_bytes = generator.chunk_bytes or default_chunk_bytes(tokens.device)
    if plan is not None:
        chunk_bytes = plan.chunk_bytes
    width, switches = generator.config.d_model, generator.switches
    rows = max(1, chunk_bytes // (4 * width * tokens.element_size()))
    kernels = _kernels_for(generator, tokens) if in_place else None
    if kernels is None:
        return Passes(in_place, rows, switches)
    wave = wave_rows(multiprocessors(tokens.device), width) if tokens.is_cuda else None
    return FusedPasses(rows, switches, kernels, wave)


def _kernels_for(generator: ParameterGenerator, tokens: Tensor) -> ModuleType | None:
    if torch.compiler.is_compiling() or tokens.dtype == torch.float64:
        return None
    chosen = generator.kernels
    return fused_kernels(tokens.device) if chosen == "auto" else chosen


# -- Triton where there is Triton ------------------------------------------------------------------


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def fused_kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels for a device, or None: no CUDA, no Triton, or none that can be built.

    Triton builds a kernel at its first call; that is tried once, on a few values, so that a machine
    without a C compiler falls back to torch with one line in the log.
    """
    if device.type != "cuda":
        return None
    try:
        from . import kernels

        x = torch.ones(1, 1, 16, 48, device=device, dtype=torch.bfloat16)
        weight = torch.ones(48, device=device, dtype=torch.bfloat16)
        table = torch.ones(1, 16, 4, 2, device=device)
        kernels.rms_norm(x, weight, EPS, pending=weight.float())
        kernels.rotate_(x.view(1, 16, 3, 16), table, table)
        kernels.across(x[0], table, table, 1)
        if has_e4m3(device):
            kernels.quantize_rows(x.view(16, 48))
    except ImportError:
        return None
    except (
        Exception
    ) as error:  # Triton, its compiler and the driver each raise classes of their own
        log.warning("Triton kernels can't be built here, torch is used: %s", error)
        return None
    return kernels
