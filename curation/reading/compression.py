"""Compressed tars, known by their first bytes and not by their names, as files that can be read from any byte."""

import bz2
import contextlib
import lzma
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO

from curation.reading.places import open_file
from curation.reading.tars import BLOCK, parse_header

_MAGIC = {b"\x1f\x8b\x08": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_READABLE = ("gzip", "bz2", "xz")
_XZ_MEMORY_BYTES = 256 << 20  # a hostile file asks for 4 GB; `xz -9` needs 65 MB
_PIECE = 1 << 20  # decompressed bytes at a time, whatever they were packed in
_PACKED_PIECE = 16 << 10  # small, for a file of a million empty streams copies what is left of it for each
_WINDOW = 16 << 20  # more than the members of one sample usually take, so they can be read in any order
_ZEROS = bytes(_PIECE)


def sniff_compression(head: bytes) -> str | None:
    """gzip, bz2, xz or zstd by the first 512 bytes; None for a plain tar and for anything else."""
    if parse_header(head) is not None:  # a member's name may begin with anything
        return None
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


class UnsupportedCompression(ValueError):
    """Compressed, and nothing here can decompress it."""


@contextlib.contextmanager
def open_tar(url: str, opened: IO[bytes] | None = None) -> Iterator["IO[bytes] | Unpacked"]:
    """A tar's bytes, decompressed where its content says so.

    Args:
        opened: the file, where it was opened otherwise than for reading it through.

    Raises:
        UnsupportedCompression: it is compressed in a way that is not read here.
        OSError: it cannot be opened.
    """
    with opened or open_file(url) as file:
        compression = sniff_compression(file.read(BLOCK))
        file.seek(0)
        if compression is None:
            yield file
        elif compression not in _READABLE:
            raise UnsupportedCompression(f"{url} is compressed with {compression}; {', '.join(_READABLE)} can be read.")
        else:
            with contextlib.closing(Unpacked(file, compression)) as unpacked:
                yield unpacked


class Unpacked:
    """The decompressed bytes of a file: forward in one stream, with a window behind it for small steps back.

    The first step back beyond the window begins anew and keeps all it passes in a temporary file, so that any number of
    steps costs two decompressions. Damage ends the bytes early, and `error` says how; nothing is raised for it.
    """

    error = ""
    """why the stream could not be read to its end; empty when it was, or was not yet"""
    unread = 0
    """bytes of the compressed file behind the place where `error` stands, as far as it is known"""

    def __init__(self, file: IO[bytes], compression: str) -> None:
        self.compression = compression
        self._packed = file
        self._spool: IO[bytes] | None = None
        self._position = 0
        self._begin()

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file; from the end (`whence` 2), everything is decompressed to find it."""
        if whence == 2:
            while self._advance():
                pass
        self._position = offset + (self._passed if whence == 2 else self._position if whence == 1 else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        stop = self._position + size
        if self._spool is None and self._position < self._passed - len(self._window):
            self._begin()
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as this reader
        while self._passed < stop and self._advance():
            pass
        if self._spool is not None:
            self._spool.seek(self._position)
            content = self._spool.read(min(size, max(self._passed - self._position, 0)))
        else:
            first = self._position - (self._passed - len(self._window))
            content = bytes(self._window[first : first + size])
        self._position += len(content)
        return content

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()

    def _begin(self) -> None:
        self._packed.seek(0)
        self._pieces = self._decompressed()
        self._passed, self._window = 0, bytearray()

    def _advance(self) -> bool:
        """Decompress the next piece; False at the end."""
        piece = next(self._pieces, b"")
        self._passed += len(piece)
        if self._spool is None:
            self._window += piece
            if len(self._window) > 2 * _WINDOW:
                # What was asked for and has not been given yet stays.
                del self._window[
                    : len(self._window) - max(_WINDOW, min(self._passed - self._position, len(self._window)))
                ]
        elif piece == _ZEROS[: len(piece)]:
            self._spool.truncate(self._passed)  # a hole: endless zeros fill no disk
        else:
            self._spool.seek(self._passed - len(piece))
            self._spool.write(piece)
        return bool(piece)

    def _decompressed(self) -> Iterator[bytes]:
        """Pieces of a bounded size, however much a few bytes expand to; stream behind stream, as `gzip` reads them."""
        rest = b""
        while True:
            while not (rest := rest.lstrip(b"\0")):  # streams may be padded
                if not (rest := self._packed.read(_PACKED_PIECE)):
                    return
            decoder = _decoder(self.compression)
            while not decoder.eof:
                try:
                    piece = decoder.decompress(rest, _PIECE)
                except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                    self.error = f"its {self.compression} stream is damaged: {' '.join(str(error).split())}"
                    at = self._packed.tell() - len(rest)
                    self.unread = self._packed.seek(0, 2) - at
                    return
                rest = b""
                if piece:
                    yield piece
                elif not decoder.eof and decoder.needs_input and not (rest := self._packed.read(_PACKED_PIECE)):
                    self.error = f"its {self.compression} stream is cut off"
                    return
            rest = decoder.unused_data


class _Gzip:
    """zlib with the interface of its two neighbours: the decoder keeps what it has not used yet."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def needs_input(self) -> bool:
        return not self._decoder.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)


def _decoder(compression: str) -> _Gzip | bz2.BZ2Decompressor | lzma.LZMADecompressor:
    if compression == "gzip":
        return _Gzip()
    return bz2.BZ2Decompressor() if compression == "bz2" else lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES)
