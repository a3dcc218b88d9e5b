"""How much memory of its own a process takes while it does something; for scripts that run as a process (Linux)."""

from __future__ import annotations

import threading
import time


def anonymous() -> int:
    """Bytes of anonymous resident memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


class Watch:
    """`with Watch() as watch:`; then `watch.peak`, the most bytes beyond those of the beginning."""

    def __enter__(self) -> Watch:
        self.before, self.peak, self._done = anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, anonymous() - self.before)
            time.sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous() - self.before)
