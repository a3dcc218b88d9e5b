"""Generated LoRAs by content, in host memory, up to a number of bytes."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from threading import Lock

from ...hywu_core.lora import GeneratedLoRA

log = logging.getLogger(__name__)

#: Environment variable with the limit in MiB.
VARIABLE = "HYWU_LORA_CACHE_MB"
DEFAULT_MB = 2048


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
