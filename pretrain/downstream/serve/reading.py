"""A request's body -> its images, within the limits; or why not, as a status and a sentence."""

from collections.abc import Callable
from dataclasses import dataclass

import python_multipart  # noqa: F401  starlette reads forms with it, and misses it only when one comes
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

MULTIPART = "multipart/form-data"
HOW = f"send one image as the body, or several as the files of a {MULTIPART} body"


@dataclass(frozen=True)
class Limits:
    """What one request may hold."""

    max_images: int
    max_bytes: int
    """of the body"""


class Refused(Exception):
    """A request that is not answered as asked: an HTTP status, a sentence, and what else a program may want."""

    def __init__(self, status: int, message: str, **details: object) -> None:
        super().__init__(message)
        self.status, self.message, self.details = status, message, details


class Body:
    """What comes of a request, within the limits."""

    def __init__(self, request: Request, limits: Limits) -> None:
        self._request, self._limits = request, limits
        self._total, self._is_whole = 0, False

    async def images(self, take: Callable[[int], None]) -> list[bytes]:
        """The encoded images in their order: the files of a form, or else the body, whatever its Content-Type says, for
        the decoder goes by content.

        Args:
            take: called with every so many bytes before they are kept; may raise.

        Raises:
            Refused: too many bytes or images (413), or a form without images (400).
        """
        headers = self._request.headers
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limits.max_bytes:
            raise _too_large(self._limits)

        async def counted() -> Message:
            message = await self._next()
            if self._total > self._limits.max_bytes:
                raise _too_large(self._limits)
            take(len(message.get("body", b"")))
            return message

        body = Request(self._request.scope, counted)
        is_form = headers.get("content-type", "").partition(";")[0].strip().lower() == MULTIPART
        return await _files(body, self._limits) if is_form else [await body.body()]

    async def discard_rest(self) -> None:
        """Read on and keep nothing, as much as a request may have: who is still sending would miss the answer."""
        if not self._total and "expect" in self._request.headers:  # it asks first, and sends nothing after a refusal
            return
        most = self._total + self._limits.max_bytes
        while not self._is_whole and self._total < most:
            await self._next()

    async def _next(self) -> Message:
        message = await self._request.receive()
        self._total += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)  # nor is there more when the client has gone
        return message


async def _files(request: Request, limits: Limits) -> list[bytes]:
    try:
        async with request.form(max_files=limits.max_images, max_fields=limits.max_images) as form:
            files = []
            for name, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    raise Refused(400, f"{name!r} is a text, not a file: {HOW} (curl: -F image=@FILE).")
                files.append(await value.read())
    except HTTPException as error:
        if "Too many" in error.detail:
            raise Refused(413, f"a request takes {limits.max_images} images at most; send several requests.") from None
        raise Refused(400, f"the {MULTIPART} body cannot be read: {error.detail}") from None
    if not files:
        raise Refused(400, f"the request holds no image: {HOW}.")
    return files


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"a request takes {limits.max_bytes:,} bytes at most; send smaller or fewer images.")
