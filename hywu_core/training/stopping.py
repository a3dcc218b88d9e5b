"""Ctrl-C and SIGTERM in a training."""

from __future__ import annotations

import signal
import threading
from typing import Any

from ..errors import get_logger

logger = get_logger(__name__)


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a flag; the second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        # signals can only be handled in the main thread; elsewhere the host has its own way to stop
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("stopping after this step; once more to stop at once")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
