"""Decoded images of a training's data: in worker threads, in memory, on request in a folder; and batches made ahead.

Nothing here decides what a batch holds: with any cache, any number of workers and any number of steps ahead
the same step gives the same batch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .. import fingerprint
from ..errors import HYWUError, get_logger
from ..files import read_tensors, save_tensors
from ..images import MAX_SIDE
from .base import Batch, BatchSource
from .pairs import Source, read_source
from .workers import usual_workers

logger = get_logger(__name__)

#: Bytes of decoded images that stay in memory.
IN_MEMORY = 1 << 30
#: Version of what a cache's files hold: the pixels that `read_source` gives.
CACHED = "decoded-2"


class Images:
    """Decoded images, uint8 ``[3, H, W]``; the last ones used stay in memory, up to `most` bytes.

    max_side: pixels per side that an image is scaled down to.
    folder: where decoded images are kept, 3 bytes per pixel, across runs and for all processes; None for nowhere.
        They are found by the hash of the image's own file, so a folder may serve any data.
    workers: threads that decode; None for `usual_workers`.
    """

    def __init__(
        self,
        most: int = IN_MEMORY,
        max_side: int = MAX_SIDE,
        folder: Path | None = None,
        workers: int | None = None,
    ) -> None:
        self.most, self.max_side, self.bytes = most, max_side, 0
        self.folder = None if folder is None else Path(folder)
        self.workers = usual_workers() if workers is None else max(1, workers)
        self._kept: OrderedDict[Source, Tensor] = OrderedDict()
        self._under_way: dict[Source, Future[Tensor]] = {}
        self._hashes: dict[Source, str] = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, source: Source) -> Tensor:
        """Raises HYWUError naming an image that can't be read."""
        return self.future(source).result()

    def all(self, sources: Sequence[Source]) -> list[Tensor]:
        """Several at once, in their order."""
        return [future.result() for future in [self.future(source) for source in sources]]

    def future(self, source: Source) -> Future[Tensor]:
        """An image that may still be under way; nobody decodes what another is decoding."""
        with self._lock:
            if source in self._kept:
                self._kept.move_to_end(source)
                ready: Future[Tensor] = Future()
                ready.set_result(self._kept[source])
                return ready
            if source not in self._under_way:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(self.workers, "hywu-decode")
                self._under_way[source] = self._pool.submit(self._make, source)
            return self._under_way[source]

    def _make(self, source: Source) -> Tensor:
        try:
            image = self._read(source)
        except BaseException:
            with self._lock:
                del self._under_way[source]  # another time it may be there
            raise
        with self._lock:
            del self._under_way[source]
            self._kept[source] = image
            self.bytes += image.nbytes
            while self.bytes > self.most:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes
        return image

    def _read(self, source: Source) -> Tensor:
        folder = self.folder  # another thread may give it up meanwhile
        if folder is None:
            return read_source(source, self.max_side)
        path = self._place(folder, source)
        if path.exists():
            try:
                image = read_tensors(path)[0].get("image")
                if (
                    image is not None
                    and image.dtype == torch.uint8
                    and image.ndim == len(image) == 3
                ):
                    return image
            except HYWUError as error:
                logger.warning("%s: decoded again", error)
        image = read_source(source, self.max_side)
        try:
            save_tensors(
                path, {"image": image}, {"from": str(source)}, overwrite=True, durable=False
            )
        except (HYWUError, OSError) as error:
            logger.warning("%s; images are decoded again each time from here on", error)
            self.folder = None
        return image

    def _place(self, folder: Path, source: Source) -> Path:
        if source not in self._hashes:
            try:
                found = (
                    fingerprint.of_file(source)
                    if isinstance(source, Path)
                    else fingerprint.digest([source.read()])
                )
            except OSError as error:
                raise HYWUError(f"{source}: can't be read ({error}).") from error
            self._hashes[source] = fingerprint.digest([f"{CACHED} {self.max_side} {found}"])
        name = self._hashes[source]
        return folder / name[:2] / f"{name}.safetensors"


class Ahead:
    """A source of batches that makes the next steps' batches while this one's is trained on.

    batches: step -> batch, called from another thread.
    depth: steps that are made ahead; several even out steps that take longer than others.
    Which steps are made ahead changes no batch.
    """

    def __init__(self, batches: BatchSource, depth: int = 1) -> None:
        self.batches, self.depth = batches, depth
        self._pool = ThreadPoolExecutor(1, "hywu-batches")
        self._made: OrderedDict[int, Future[Batch]] = OrderedDict()

    def __call__(self, step: int) -> Batch:
        made = self._made.pop(step, None)
        wanted = range(step + 1, step + 1 + self.depth)
        for other in [s for s in self._made if s not in wanted]:
            self._made.pop(other).cancel()
        batch = made.result() if made else self.batches(step)
        for following in wanted:
            if following not in self._made:
                self._made[following] = self._pool.submit(self.batches, following)
        return batch
