"""What is kept: generated LoRAs by content in host memory, and what a training encodes in files."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from ...hywu_core import fingerprint
from ...hywu_core.errors import get_logger
from ...hywu_core.files import open_tensors, parse_header, save_tensors
from ...hywu_core.lora import GeneratedLoRA

log = get_logger(__name__)

#: Environment variable with the limit in MiB.
VARIABLE = "HYWU_LORA_CACHE_MB"
DEFAULT_MB = 2048
#: Bytes of a training's tensors that stay in memory besides.
IN_MEMORY = 1 << 30


class LoRACache:
    """Least recently used goes first. A LoRA larger than the limit is not kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[tuple, GeneratedLoRA] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple) -> GeneratedLoRA | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: tuple, lora: GeneratedLoRA) -> None:
        with self._lock:
            if key in self._kept or lora.nbytes > self.limit:
                return
            self._kept[key] = lora
            self.nbytes += lora.nbytes
            while self.nbytes > self.limit:
                _, old = self._kept.popitem(last=False)
                self.nbytes -= old.nbytes


def limit_from_environment() -> int:
    """Bytes; a value that is no number of MiB is said in the log, and the default holds."""
    text = os.environ.get(VARIABLE, "")
    if text and not text.isdecimal():
        log.warning(
            "HY-WU: %s is '%s', not a number of MiB; %d is used.", VARIABLE, text, DEFAULT_MB
        )
    return (int(text) if text.isdecimal() else DEFAULT_MB) << 20


CACHE = LoRACache(limit_from_environment())


class TensorCache:
    """Tensors and JSON-safe metadata by key: files in `folder`, the latest ones in memory besides."""

    def __init__(self, folder: Path, limit: int = IN_MEMORY) -> None:
        self.folder, self.limit, self.nbytes = folder, limit, 0
        self._kept: OrderedDict[str, tuple[dict[str, Tensor], dict[str, Any]]] = OrderedDict()

    def get(
        self, key: str, make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `make` gave for this key, now or in an earlier run; on the CPU."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            tensors, metadata = make()
            save_tensors(path, tensors, metadata, overwrite=True, durable=False)
        with open_tensors(path) as file:
            metadata = parse_header(path, file.metadata())
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        self._keep(key, tensors, metadata)
        return tensors, metadata

    def _keep(self, key: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self._kept[key] = tensors, metadata
        self.nbytes += _nbytes(tensors)
        while self.nbytes > self.limit and len(self._kept) > 1:
            _, (old, _) = self._kept.popitem(last=False)
            self.nbytes -= _nbytes(old)


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def digest(*parts: Any) -> str:
    """Hash of tensors (their bytes) and of anything else (its repr)."""
    pieces: list[Any] = []
    for part in parts:
        if isinstance(part, Tensor):
            pieces += [f"{part.dtype}{tuple(part.shape)}", part]
        else:
            pieces.append(part if isinstance(part, bytes) else repr(part))
    return fingerprint.digest(pieces)
