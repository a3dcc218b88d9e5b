"""Muon: matrices take orthogonalized momentum steps, everything else those of AdamW.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; size of the steps as in Liu
et al. 2025, "Muon is scalable for LLM training". A generator's gradients are dominated by what would
serve all items alike; orthogonalized, the small directions in which items differ count as much.
torch's own Muon came with 2.9, takes no fused projections apart and one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import usual_precision
from .sharding import is_sharded, local, part_of, whole

#: Coefficients of the quintic Newton-Schulz iteration and how often it is done (Jordan et al.).
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
MOMENTUM = 0.95
#: Rows of a symmetric product that are made at once.
BLOCK = 128
#: Root mean square of a step on a matrix, in learning rates: about what AdamW's steps have (Liu et al.).
STEP_RMS = 0.2
#: Numbers that are orthogonalized at once, where one matrix has fewer, and bytes that a step takes for each of
#: them beside weights, gradients and moments: momentum, three matrices in bfloat16, the step in float32.
AT_ONCE, BYTES_AT_ONCE = 1 << 22, 16
#: Learning rate of the matrices in those of the rest.
MATRIX_RATE = 4.0
#: Last parts of names: fused projections -> how many matrices lie one above the other; output heads, a step
#: of which moves every value of every LoRA at once, stay with AdamW.
FUSED = {"qkv": 3, "kv": 2}
HEADS = ("proj_out_A", "proj_out_B", "image_out")


def orthogonalized(matrices: Tensor) -> Tensor:
    """``[N, rows, columns]`` -> the same singular vectors with singular values of about 1, in their dtype."""
    if len(matrices) == 1:
        # a batched product of one is up to twice as slow on a CPU
        return _orthogonalized(matrices[0], torch.addmm)[None]
    return _orthogonalized(matrices, torch.baddbmm)


def _orthogonalized(matrices: Tensor, add_product: Callable[..., Tensor]) -> Tensor:
    """Of ``[..., rows, columns]``.

    add_product: ``addmm`` or ``baddbmm``, as fits.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    size = x.shape[-2]
    # float32 on a CPU has no product to spare: of symmetric ones a good half is enough
    halved = x.dtype == torch.float32 and x.device.type == "cpu" and size > BLOCK
    for _ in range(ITERATIONS):
        if halved:
            gram = _by_blocks(size, lambda i, j, x=x: x[..., i, :] @ x[..., j, :].mT)
            inner = _by_blocks(
                size,
                lambda i, j, g=gram: add_product(
                    g[..., i, j], g[..., i, :], g[..., j], beta=b, alpha=c
                ),
            )
        else:
            gram = x @ x.mT
            inner = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, inner, x, beta=a)
    return x.mT if tall else x


def _by_blocks(size: int, make: Callable[[slice, slice], Tensor]) -> Tensor:
    """A symmetric ``[..., size, size]``: `make` gives rows up to the diagonal's block, the rest is mirrored."""
    whole = None
    for start in range(0, size, BLOCK):
        end = min(size, start + BLOCK)
        rows = make(slice(start, end), slice(0, end))
        if whole is None:
            whole = rows.new_empty(*rows.shape[:-2], size, size)
        whole[..., start:end, :end] = rows
        whole[..., :start, start:end] = rows[..., :start].mT
    return whole


def adamw(
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.99),
    fused: bool = False,
) -> torch.optim.AdamW:
    """AdamW as all trainings here use it: alone, or beside Muon.

    fused: one kernel, for CUDA.
    """
    return torch.optim.AdamW(
        parameters, lr=lr, betas=betas, weight_decay=weight_decay, foreach=not fused, fused=fused
    )


class Muon(torch.optim.Optimizer):
    """Trains what requires a gradient in `module`: weights of linear layers by Muon at `MATRIX_RATE`
    times the learning rate; embeddings, norms, biases, convolutions and output heads by AdamW.

    States are called as AdamW's: exp_avg, and exp_avg_sq where AdamW steps.
    """

    def __init__(
        self, module: nn.Module, lr: float, weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99), fused: bool = False,
    ) -> None:  # fmt: skip
        self.parts = matrices(module)
        rest = [p for p in module.parameters() if p.requires_grad and p not in self.parts]
        self._adamw = adamw(rest, lr, weight_decay, betas, fused) if rest else None
        groups = [{"params": parameters} for parameters in (list(self.parts), rest) if parameters]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["params"][0] in self.parts:
                self._step_matrices(group)
            else:
                self._step_rest(group)
        return loss

    def _step_rest(self, group: dict[str, Any]) -> None:
        # whoever loads a state replaces it, so the inner optimizer gets it anew
        self._adamw.state = self.state
        inner = self._adamw.param_groups[0]
        inner.update({key: group[key] for key in ("params", "lr", "weight_decay")})
        inner["capturable"] = isinstance(group["lr"], Tensor) and group["lr"].is_cuda
        self._adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                rows = parameter.shape[0] // self.parts[parameter]
                by_shape.setdefault((rows, *parameter.shape[1:]), []).append(parameter)
        for parameters in by_shape.values():
            for some in _at_once(parameters):
                self._step_alike(some, group["lr"] * MATRIX_RATE, group["weight_decay"])

    def _step_alike(self, parameters: list[nn.Parameter], rate: Any, weight_decay: float) -> None:
        """One step on parameters that consist of matrices of one shape.

        rate: a number, or a tensor ``[]`` on the device for a recorded step.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        sharded = []
        for parameter in parameters:
            if weight_decay:
                parameter.mul_(1 - rate * weight_decay)
            step, parts = whole(self._momentum(parameter)), self.parts[parameter]
            target: Tensor = parameter
            if is_sharded(parameter):  # every process makes whole steps, and takes its part of them
                target = torch.zeros_like(step)
                sharded.append((parameter, target))
            pairs += zip(target.chunk(parts), step.chunk(parts), strict=True)
        targets = [target for target, _ in pairs]
        dtype, stacked = targets[0].dtype, torch.stack([step for _, step in pairs])
        stacked = stacked.to(_dtype(stacked))
        made = orthogonalized(stacked).to(dtype)
        factor = -rate * STEP_RMS * max(targets[0].shape) ** 0.5
        if isinstance(factor, Tensor):
            torch._foreach_add_(targets, made.mul_(factor).unbind())
        else:
            torch._foreach_add_(targets, made.unbind(), alpha=factor)
        for parameter, change in sharded:
            local(parameter.detach()).add_(part_of(change, parameter))

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        """Nesterov's: the gradient mixed with its running mean."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
        mean = state["exp_avg"].lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp(mean, MOMENTUM)


def matrices(module: nn.Module) -> dict[nn.Parameter, int]:
    """What Muon steps: trained weights of linear layers -> number of matrices in each.

    Not the output heads, nor what matches a pattern in the module's `adamw_only`.
    """
    found, left = {}, getattr(module, "adamw_only", ())
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None) if hasattr(layer, "in_features") else None
        last = name.rpartition(".")[2]
        if any(fnmatchcase(f"{name}.weight", pattern) for pattern in left):
            continue
        if isinstance(weight, nn.Parameter) and weight.requires_grad and last not in HEADS:
            found[weight] = FUSED.get(last.rpartition("_")[2], 1)
    return found


def _at_once(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one kind in runs of at most `AT_ONCE` numbers, or of one parameter."""
    parts: list[list[nn.Parameter]] = []
    for parameter in parameters:
        if not parts or sum(p.numel() for p in parts[-1]) + parameter.numel() > AT_ONCE:
            parts.append([])
        parts[-1].append(parameter)
    return parts


def _dtype(like: Tensor) -> torch.dtype:
    fast = usual_precision(like.device.type) == "bf16"
    return torch.bfloat16 if fast else torch.float32
