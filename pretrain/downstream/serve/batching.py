"""Images of concurrent requests, embedded together; never more of them, nor of their bytes, than the queue holds."""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from pretrain.downstream.embedders.embedder import Embedded, Embedder


class Full(Exception):
    """The queue has no room for another image."""


@dataclass(frozen=True, eq=False)
class Waiting:
    """One image in the queue."""

    crop: np.ndarray
    with_patches: bool
    since: float
    embedded: "asyncio.Future[Embedded]"
    """of this image alone, a batch of one"""


class Batcher:
    """Embeds what waits, in the order in which it came, one batch at a time in a thread of its own.

    A batch that is not full waits for images that are on their way, being read or decoded, for `max_wait_s` at most:
    a client that is alone waits for nobody.

    Args:
        max_batch: images embedded together.
        max_wait_s: longest wait of an image for others, in seconds.
        max_images, max_bytes: of all requests that are in work, from their first byte on.
    """

    def __init__(self, embedder: Embedder, max_batch: int, max_wait_s: float, max_images: int, max_bytes: int) -> None:
        self._embedder, self._max_batch, self._max_wait_s = embedder, max_batch, max_wait_s
        self.max_images, self._max_bytes = max_images, max_bytes
        self.images = self._bytes = self._coming = 0
        self.batches = self.embedded = 0
        self.error = ""
        """of the last batch, if it failed"""
        self._waiting: deque[Waiting] = deque()
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "embed")

    @contextmanager
    def place(self) -> Iterator["Place"]:
        """Room for a request of one image, until the request is answered.

        Raises:
            Full: there is none.
        """
        place = Place(self)
        try:
            place.take(images=1)
            yield place
        finally:
            place.leave()

    async def run(self) -> None:
        """Embed until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            while not self._is_ready(loop.time()):
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._seconds_left(loop.time())):
                        await self._changed.wait()
            batch = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
            batch = [one for one in batch if not one.embedded.done()]  # nobody waits for the others any more
            if not batch:
                continue
            try:
                found = await loop.run_in_executor(self._thread, self._embed, batch)
            except Exception as error:  # whatever a model or its device raises: the next batch may fare better
                self.error = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                for one in batch:
                    _settle(one.embedded, error)
            else:
                self.error = ""
                self.batches, self.embedded = self.batches + 1, self.embedded + len(batch)
                for one, embedded in zip(batch, found, strict=True):
                    _settle(one.embedded, embedded)

    def _is_ready(self, now: float) -> bool:
        if not self._waiting:
            return False
        return len(self._waiting) >= self._max_batch or not self._coming or self._seconds_left(now) == 0.0

    def _seconds_left(self, now: float) -> float | None:
        """Until the first that waits has waited long enough; None where nothing waits."""
        return max(self._waiting[0].since + self._max_wait_s - now, 0.0) if self._waiting else None

    def _embed(self, batch: Sequence[Waiting]) -> list[Embedded]:
        found = self._embedder(np.stack([one.crop for one in batch]), any(one.with_patches for one in batch))
        return [
            Embedded(
                found.cls[n : n + 1],
                found.patches[n : n + 1] if found.patches is not None and one.with_patches else None,
                found.grid,
            )
            for n, one in enumerate(batch)
        ]


class Place:
    """What one request takes of the queue."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._images = self._bytes = self._coming = 0

    def take(self, images: int = 0, num_bytes: int = 0) -> None:
        """More room.

        Raises:
            Full: there is none.
        """
        batcher = self._batcher
        if batcher.images + images > batcher.max_images or batcher._bytes + num_bytes > batcher._max_bytes:
            raise Full
        self._images, self._bytes, self._coming = self._images + images, self._bytes + num_bytes, self._coming + images
        batcher.images += images
        batcher._bytes += num_bytes
        batcher._coming += images

    async def embed(self, crops: Sequence[np.ndarray], with_patches: bool) -> list[Embedded]:
        """What the model says of each, in their order; raises what the model raised."""
        loop, batcher = asyncio.get_running_loop(), self._batcher
        mine = [Waiting(crop, with_patches, loop.time(), loop.create_future()) for crop in crops]
        batcher._waiting += mine
        self._arrive()
        try:
            return list(await asyncio.gather(*(one.embedded for one in mine)))
        finally:
            for one in mine:
                one.embedded.cancel()  # of a request that is given up

    def _arrive(self) -> None:
        self._batcher._coming -= self._coming
        self._coming = 0
        self._batcher._changed.set()

    def leave(self) -> None:
        self._arrive()
        self._batcher.images -= self._images
        self._batcher._bytes -= self._bytes


def _settle(future: "asyncio.Future[Embedded]", result: Embedded | Exception) -> None:
    if future.done():  # given up meanwhile
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
