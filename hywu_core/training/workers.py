"""Threads that read and decode: Pillow does both outside of Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")


def usual_workers() -> int:
    """How many where no number is given: one per core, 8 at most."""
    return min(8, os.cpu_count() or 1)


def in_workers(
    work: Callable[[T], R], todo: Iterable[T], workers: int | None = None
) -> Iterator[R]:
    """`work` of each, in their order; a few per worker are under way at once, however many there are.

    Raises what `work` raises.
    """
    count = usual_workers() if workers is None else workers
    with ThreadPoolExecutor(max(1, count), "hywu-decode") as pool:
        under_way: deque[Future[R]] = deque()
        try:
            for one in todo:
                under_way.append(pool.submit(work, one))
                if len(under_way) >= 4 * count:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
