"""One matrix a module: how grouped experts and 1x1 convolutions stand in PEFT and ComfyUI files."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..discovery import is_expert_list
from ..errors import HYWUError
from ..lora import GeneratedLoRA


def single_matrices(lora: GeneratedLoRA) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module path, A, B) of item 0: experts one by one, convolutions with kernel dimensions.

    The grouped module ``mlp.experts.w1`` becomes ``mlp.experts.0.w1``, ``mlp.experts.1.w1``, …: the
    names of a base model that keeps its experts in a ModuleList.
    """
    for path, pair in lora.items():
        module = lora.target(path).module
        a, b = pair.A[0], pair.B[0]
        if module.num_experts:
            for e in range(module.num_experts):
                yield expert_path(path, str(e)), a[e], b[e]
        elif module.conv:
            yield path, a[..., None, None], b[..., None, None]
        else:
            yield path, a, b


def expert_path(path: str, expert: str) -> str:
    """``mlp.experts.w1`` -> ``mlp.experts.<expert>.w1``. Raises HYWUError where no list shows."""
    parts = path.split(".")
    for cut in range(1, len(parts)):
        if is_expert_list(parts[cut - 1]):
            return ".".join([*parts[:cut], expert, *parts[cut:]])
    raise HYWUError(
        f"{path} is a grouped module, which this format holds only as single experts of a list, and "
        "no part of its name says where that list is; save as 'native'."
    )
