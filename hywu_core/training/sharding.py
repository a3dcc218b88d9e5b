"""Base, generator, moving average and optimizer in parts over all processes, where none holds them whole: FSDP2.

torch's `fully_shard` (Zhao et al. 2023, "PyTorch FSDP"; its second form, by parameter), asked for by accelerate's
configuration file. Each repeated block is gathered while it runs. Of the base, what lies outside its repeated
blocks stays whole on every process, since a base's `loss` may call it as it likes.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import HYWUError
from ..files import open_tensors, parse_header
from ..lora import GeneratedLoRA

if TYPE_CHECKING:
    from .schedule import Average
    from .strategies import HyperNetwork, Strategy

#: What `accelerate launch` says of a configuration with `distributed_type: FSDP`.
ASKED, VERSION, OFFLOAD = "ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS"


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one process's part of a larger one."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's part; of a tensor that isn't sharded, itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, from all processes: each must call this at the same time."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def put(tensor: Tensor, values: Tensor) -> None:
    """Write values into a tensor in place; of a sharded one, each process its part of them."""
    if is_sharded(tensor):
        tensor.to_local().copy_(part_of(values, tensor))
    else:
        tensor.copy_(values)


def part_of(values: Tensor, like: Tensor) -> Tensor:
    """This process's part of `values`, cut as `like` is; nothing is sent."""
    mesh, (placement,) = like.device_mesh, like.placements
    parts = values.chunk(mesh.size(), dim=placement.dim)
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else values.narrow(placement.dim, 0, 0)


def sharding_asked() -> bool:
    """Whether the launcher's configuration asks for it. Raises HYWUError on what isn't FSDP2 on the device."""
    if os.environ.get(ASKED, "").lower() not in ("1", "true", "yes"):
        return False
    if os.environ.get(VERSION, "1") != "2":
        raise HYWUError(
            "training: accelerate's configuration asks for FSDP of version 1; write `fsdp_version: 2` there, as in "
            "docs/examples/accelerate_fsdp2.yaml."
        )
    if os.environ.get(OFFLOAD, "").lower() in ("1", "true", "yes"):
        raise HYWUError(
            "training: accelerate's configuration asks for fsdp_offload_params, which isn't there; write false."
        )
    return True


class Shards:
    """A strategy's trained module and its base in parts over all processes.

    Raises HYWUError where the strategy or the precision doesn't go with it, or torch is older than 2.6.
    """

    def __init__(self, strategy: Strategy, base: nn.Module, accelerator: Any) -> None:
        try:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        except ImportError as error:
            raise HYWUError(
                f"training: FSDP2 needs torch 2.6 or newer, this is {torch.__version__}."
            ) from error
        if strategy.name != "hywu":
            raise HYWUError(
                f"training: FSDP2 shards a generator and its base, and the strategy is '{strategy.name}'; train "
                "that with docs/examples/accelerate_multi_gpu.yaml."
            )
        if accelerator.mixed_precision == "fp16":
            raise HYWUError("training: FSDP2 goes with --precision bf16 or no, not fp16.")
        _hooks_see_loras()
        self.accelerator, self.generator = accelerator, strategy.trained
        mesh = torch.distributed.init_device_mesh(
            accelerator.device.type, (accelerator.num_processes,)
        )
        self.modules: list[Any] = []

        def shard(module: nn.Module) -> None:
            # not the usual: the last one gathered would keep weights that an average replaces
            self.modules.append(fully_shard(module, mesh=mesh, reshard_after_forward=True))

        for block in repeated(base):
            shard(block)
        for block in self.generator.model.blocks:
            shard(block)
            register_fsdp_forward_method(block, "prefix")
        shard(self.generator)

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, Any]:
        """What accelerate's `prepare` does beside wrapping the module, which is sharded already."""
        objective.forward = self.accelerator.autocast()(objective.forward)
        return objective, self.accelerator.prepare(optimizer)

    @contextlib.contextmanager
    def averaged(self, average: Average) -> Iterator[None]:
        """`Average.swapped`, and nothing is left of what was gathered of other weights, before or after."""
        self._forget()
        with average.swapped():
            try:
                yield
            finally:
                self._forget()

    def _forget(self) -> None:
        for module in self.modules:
            module.reshard()
        self.generator.forget()


def repeated(module: nn.Module) -> list[nn.Module]:
    """The blocks of a network: what lies in its module lists, the outermost that can be called."""
    found: list[nn.Module] = []
    listed = isinstance(module, nn.ModuleList)
    for child in module.children():
        if listed and type(child).forward is not nn.Module.forward:
            found += [child] if any(True for _ in child.parameters()) else []
        elif listed and isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += repeated(nn.ModuleList(child.children()))
        else:
            found += repeated(child)
    return found


def averaged(average: Average, shards: Shards | None) -> contextlib.AbstractContextManager[None]:
    """Inside the block the trained weights are their averages."""
    return average.swapped() if shards is None else shards.averaged(average)


def gathered_strategy(strategy: HyperNetwork, state: Path, step: int) -> HyperNetwork:
    """The strategy with the whole generator, averaged, on the CPU, as the state of a step holds it; for its export.

    One process alone may call it. Raises HYWUError where the state is of another step.
    """
    made = copy.copy(strategy)
    made.trained = type(strategy.trained)(strategy.trained.config)
    with open_tensors(state) as file:
        there = parse_header(state, file.metadata()).get("step")
        if there != step:
            raise HYWUError(f"{state}: is of step {there}, the training at {step}; save it first.")
        with torch.no_grad():
            for name, parameter in made.trained.named_parameters():
                parameter.copy_(file.get_tensor(f"average.{name}"))
    return made


def _hooks_see_loras() -> None:
    """FSDP2 watches the tensors of what a module returns, for their gradients; it must find those of a LoRA."""
    from torch.utils import _pytree as pytree

    if GeneratedLoRA in pytree.SUPPORTED_NODES:
        return

    def flatten(lora: GeneratedLoRA) -> tuple[list[Tensor], Any]:
        return list(lora.factors.values()), lora

    def unflatten(tensors: Any, lora: GeneratedLoRA) -> GeneratedLoRA:
        kept = list(lora.factors.values())
        tensors = list(tensors)
        if all(a is b for a, b in zip(tensors, kept, strict=True)):
            return lora
        factors = dict(zip(lora.factors, tensors, strict=True))
        return GeneratedLoRA(lora.layout, factors, lora.provenance)

    pytree.register_pytree_node(GeneratedLoRA, flatten, unflatten)
