"""The server's answers: POST /embed, GET /health, GET / (what it serves and takes)."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from configs.ranges import check_ranges
from pretrain.data.decode import Damaged, ImageLimits
from pretrain.downstream.embedders.embedder import Embedded, Embedder
from pretrain.downstream.pixels import eval_crop, short_side
from pretrain.downstream.serve.batching import Batcher, Full, Place
from pretrain.downstream.serve.reading import HOW, Body, Limits, Refused

EXTRAS = ("mean", "patches")
NPZ = "application/x-npz"
_STATUS = {"too_many_pixels": 413, "file_too_large": 413, "not_an_image": 415, "unsupported_format": 415}
"""of the decoder's reasons; the others are 422"""
_BYTES_HELD = 8
"""requests of the largest size whose bytes are held at once"""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits and sizes of a server; each 1 or more, but for the wait."""

    px: int
    """side of the centre crop"""
    max_batch: int = 32
    """images embedded together"""
    max_wait_ms: float = 5.0
    """longest wait of an image for others that are on their way; 0 or more"""
    queue: int = 256
    """images of all requests in work; a request beyond is told to come again"""
    max_images: int = 32
    """of a request"""
    max_mb: int = 32
    """of a request's body, millions of bytes; of all bodies in work, eight times that"""
    max_megapixels: int = 50
    """of an image, millions; 3 MB of memory each while it is decoded"""
    timeout_s: float = 30.0
    """for a request's body to come, and for its answer after that"""
    decode_threads: int = 4

    def __post_init__(self) -> None:
        ranges = {field.name: "[1, inf)" for field in fields(self)} | {"max_wait_ms": "[0, inf)"}
        check_ranges("", self, **ranges)


def build_app(embedder: Embedder, name: str, settings: ServeSettings) -> Starlette:
    """
    Args:
        name: of the model, for its clients.
    """
    server = _Server(embedder, name, settings)
    routes = [
        Route("/embed", server.embed, methods=["POST"]),
        Route("/health", server.health),
        Route("/", server.info),
    ]
    handlers = {Refused: _refused, ClientDisconnect: _gone, HTTPException: _http_error, Exception: _error}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=server.lifespan)


class _Server:
    def __init__(self, embedder: Embedder, name: str, settings: ServeSettings) -> None:
        self.embedder, self.name, self.settings = embedder, name, settings
        self.limits = Limits(settings.max_images, settings.max_mb * 1_000_000)
        self.image_limits = ImageLimits(max_pixels=settings.max_megapixels * 1_000_000)
        held = _BYTES_HELD * self.limits.max_bytes
        wait_s = settings.max_wait_ms / 1000
        self.batcher = Batcher(embedder, settings.max_batch, wait_s, settings.queue, held)
        self.threads = ThreadPoolExecutor(settings.decode_threads, "decode")

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """By the end of it the requests that were there are answered."""
        embedding = asyncio.create_task(self.batcher.run())
        yield
        embedding.cancel()

    async def embed(self, request: Request) -> Response:
        body = Body(request, self.limits)
        try:
            with self.batcher.place() as place:
                return await self._embedded(request, body, place)
        except (Refused, Full) as error:
            refused = error if isinstance(error, Refused) else Refused(503, "the queue is full; send it again later.")
            if refused.status != 408:  # who is late would be waited for again
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.settings.timeout_s):
                        await body.discard_rest()
            raise refused from None

    async def _embedded(self, request: Request, body: Body, place: Place) -> Response:
        extras = _extras(request)
        loop, timeout_s = asyncio.get_running_loop(), self.settings.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                contents = await body.images(lambda size: place.take(num_bytes=size))
        except TimeoutError:
            raise Refused(408, f"the request's body did not come within {timeout_s:g} s; send it again.") from None
        place.take(images=len(contents) - 1)
        try:
            async with asyncio.timeout(timeout_s):
                crops = await self._decoded(contents)
                found = await place.embed(crops, with_patches=bool(extras))
                return await loop.run_in_executor(self.threads, self._answer, request, found, extras)
        except TimeoutError:
            raise Refused(503, f"there was no answer within {timeout_s:g} s; send it again later.") from None

    async def _decoded(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        """
        Raises:
            Refused: one of them is no image; names all such.
        """
        loop = asyncio.get_running_loop()
        crops = await asyncio.gather(*(loop.run_in_executor(self.threads, self._crop, c) for c in contents))
        damaged = [{"image": n, "reason": crop} for n, crop in enumerate(crops) if isinstance(crop, str)]
        if damaged:
            number, reason = damaged[0].values()
            others = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            status = _STATUS.get(str(reason), 422)
            advice = f"; {HOW}" if status == 415 else ""
            raise Refused(status, f"image {number} (from 0) cannot be read: {reason}{others}{advice}.", damaged=damaged)
        return [crop for crop in crops if not isinstance(crop, str)]

    def _crop(self, content: bytes) -> np.ndarray | str:
        """Pixels, or the decoder's reason why there are none."""
        try:
            return eval_crop(content, self.settings.px, short_side(self.settings.px), self.image_limits)
        except Damaged as damage:
            return damage.reason

    def _answer(self, request: Request, found: Sequence[Embedded], extras: Sequence[str]) -> Response:
        columns = {"cls": np.concatenate([one.cls for one in found])}
        grid = found[0].grid
        if extras:
            patches = np.concatenate([one.patches for one in found if one.patches is not None])
            columns |= {"mean": patches.mean(axis=1)} if "mean" in extras else {}
            columns |= {"patches": patches} if "patches" in extras else {}
        if NPZ in request.headers.get("accept", ""):
            buffer = io.BytesIO()
            np.savez(buffer, grid=np.array(grid), **columns)
            return Response(buffer.getvalue(), media_type=NPZ)
        lists = {name: values.tolist() for name, values in columns.items()}
        images = [{name: values[n] for name, values in lists.items()} for n in range(len(found))]
        return JSONResponse({"model": self.name, "grid": grid, "images": images})

    async def health(self, _: Request) -> Response:
        batcher = self.batcher
        told = {
            "ready": not batcher.error,
            "model": self.name,
            "runs_on": self.embedder.runs_on,
            "queue": batcher.images,
            "queue_limit": batcher.max_images,
            "images": batcher.embedded,
            "batches": batcher.batches,
        }
        return JSONResponse(told | ({"error": batcher.error} if batcher.error else {}), 503 if batcher.error else 200)

    async def info(self, _: Request) -> Response:
        s, embedder = self.settings, self.embedder
        told = {
            "model": self.name,
            "architecture": embedder.architecture,
            "runs_on": embedder.runs_on,
            "embed_dim": embedder.embed_dim,
            "patch_size": embedder.patch_size,
            "px": s.px,
            "crop": f"shorter side to {short_side(s.px)} px, then the centre",
            "limits": {
                "images": s.max_images,
                "body_bytes": self.limits.max_bytes,
                "image_pixels": self.image_limits.max_pixels,
            },
            "use": f"POST /embed: {HOW}; ?with={','.join(EXTRAS)} adds to CLS; Accept: {NPZ} for arrays of NumPy",
        }
        return JSONResponse(told)


def _extras(request: Request) -> list[str]:
    """What is asked beside CLS."""
    for name in request.query_params:
        if name != "with":
            raise Refused(400, f"{name!r} is no parameter; there is with={','.join(EXTRAS)}.")
    asked = [word for text in request.query_params.getlist("with") for word in text.split(",") if word]
    if unknown := [word for word in asked if word not in EXTRAS]:
        raise Refused(400, f"with={unknown[0]!r} is unknown; choose from {', '.join(EXTRAS)}.")
    return asked


def _told(status: int, message: str, headers: dict[str, str] | None = None, **details: object) -> Response:
    return Response(json.dumps({"error": message, **details}), status, headers, "application/json")


async def _refused(_: Request, refused: Exception) -> Response:
    assert isinstance(refused, Refused)
    headers = {"Retry-After": "1"} if refused.status == 503 else None
    return _told(refused.status, refused.message, headers, **refused.details)


async def _gone(_: Request, __: Exception) -> Response:
    return _told(400, "the client went away before its request was there.")  # which nobody reads


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return _told(error.status_code, f"{error.detail}: there are POST /embed, GET /health and GET /.", headers)


async def _error(_: Request, error: Exception) -> Response:
    return _told(500, f"the model failed on this request ({type(error).__name__}); the server's log says more.")
