"""The device and the processes of a training: as they were asked for, or an error."""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..devices import chosen_device
from ..errors import HYWUError, need
from .sharding import ASKED

#: Variables by which launchers say how many processes they have started (torchrun, MPI's).
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def started_processes() -> int:
    """How many processes a launcher says it has started; 1 without a launcher.

    Raises HYWUError under `accelerate launch --num_processes N` where that starts one process all the same
    (without --multi_gpu it does).
    """
    counts = [int(os.environ[name]) for name in COUNTS if os.environ.get(name, "").isdigit()]
    count = max(counts, default=1)
    asked_for_more = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if count == 1 and asked_for_more and "LOCAL_RANK" not in os.environ:
        raise HYWUError(
            "training: `accelerate launch` was asked for several processes and has started one; start them "
            "with `torchrun --nproc_per_node N -m hywu_core.cli …`, or on GPUs with `accelerate launch "
            "--multi_gpu`. (For one process take MASTER_ADDR out of the environment.)"
        )
    return count


def make_accelerator(device: str | None, precision: str) -> Any:
    """accelerate's `Accelerator` on the device named (see `chosen_device`), in a group of all started processes.

    precision: "no", "bf16" or "fp16".
    Raises HYWUError where device or processes are not as asked.
    """
    accelerate = need("accelerate", "to train")
    chosen, count = chosen_device(device), started_processes()
    if count > 1 and chosen.index is not None:
        raise HYWUError(
            f"training: {count} processes can't share the device '{device}'; name {chosen.type} alone, and "
            "each takes its own."
        )
    if count > 1 and chosen.type != "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        there = getattr(torch, chosen.type).device_count()
        if local > there:
            raise HYWUError(
                f"training: {local} processes on this machine and {there} {chosen.type} device(s); start as "
                "many as there are, or name --device cpu."
            )
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    # a second trainer in one process may have another precision or device, which the shared state forbids
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=count == 1)
    # Else gradients change places in their buffers after the first step of a process, and from three processes on
    # a sum's order is of its place: a run that goes on would not be the uninterrupted one to the bit
    parallel = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    with _sharding_is_ours():
        made = accelerate.Accelerator(
            mixed_precision=precision, cpu=chosen.type == "cpu", kwargs_handlers=[parallel]
        )
    if made.num_processes != count:
        raise HYWUError(
            f"training: {count} processes were started and {made.num_processes} found each other; they would "
            "all write the same folder. Start them with `torchrun --nproc_per_node N -m hywu_core.cli …`."
        )
    if made.device.type != chosen.type:
        raise HYWUError(
            f"training: asked for the device {chosen} and accelerate took {made.device}; look at its "
            "environment variables (ACCELERATE_USE_CPU, CUDA_VISIBLE_DEVICES)."
        )
    if count > 1:
        atexit.unregister(_leave)
        atexit.register(_leave)
    return made


@contextlib.contextmanager
def _sharding_is_ours() -> Iterator[None]:
    """Inside the block accelerate doesn't see that its configuration asks for FSDP, and wants to wrap nothing: see
    `sharding`.
    """
    before = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[ASKED] = before


def _leave() -> None:
    """End the group of processes before the interpreter does, and let its threads come to rest.

    They outlive the group, which a wrapped module holds for good, and drop the tensors of a collective some time
    after it; once the interpreter ends, that aborts the process.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    tasks = Path("/proc/self/task")
    calm = 0
    for _ in range(300):
        time.sleep(0.02)  # which lets them have the interpreter
        calm = 0 if any(map(_busy, tasks.glob("*"))) else calm + 1
        if calm == (3 if tasks.is_dir() else 25):
            return


def _busy(task: Path) -> bool:
    """Whether a thread (Linux) is one of gloo's and runs, or waits to."""
    try:
        name, _, rest = (task / "stat").read_text().rpartition(")")
    except OSError:
        return False
    return "gloo" in name and rest.split()[0] == "R"


@contextlib.contextmanager
def steady_attention(device: torch.device) -> Iterator[None]:
    """Inside the block cuDNN's attention is off: its backward pass with a mask gives NaN at some lengths.

    (Keys of 64 beyond a multiple of 128 on Hopper, from torch 2.11 on; and it builds a plan for each length.)
    """
    if device.type != "cuda" or not hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
        yield
        return
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
