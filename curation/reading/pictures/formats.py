"""Which kind of file this is, by its first bytes: those read, those an extra reads, those only named."""

import importlib.util
import re
from functools import cache

# Suffixes of image members. Names choose a sample's image; what is in the file decides how it is read.
SUFFIXES = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "j2k", "ico"]
).union(["ppm", "pgm", "pbm", "pnm"])
EXTRA_SUFFIXES = frozenset(["heic", "heif", "hif", "jxl"])
"""images too, where the decoders of `seedbed[formats]` are installed"""
FOREIGN_SUFFIXES = frozenset(
    ["psd", "svg", "pdf", "eps", "exr", "hdr", "dcm", "jxr", "wdp", "tga", "dds", "qoi", "xcf", "fits", "djvu", "bpg"]
).union(["cr2", "cr3", "nef", "dng", "arw", "rw2", "orf", "raf"])
"""pictures that nothing here reads: such a member is a row that says so, where a sample holds no other"""

# Those that Pillow reads for us. Kinds that run other programs (EPS, PDF) or exist for one vendor are left out.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO")
_EXTRA = {"HEIF": "pillow_heif", "JXL": "pylibjxl"}

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff\xf7", "JPEG-LS"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\xff\x0a", "JXL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
    (b"\0\0\1\0", "ICO"),
    (b"BM", "BMP"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"8BPS", "PSD"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"v/1\x01", "EXR"),
    (b"#?RADIANCE", "HDR"),
    (b"#?RGBE", "HDR"),
    (b"SIMPLE  =", "FITS"),
    (b"gimp xcf", "XCF"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"BPG\xfb", "BPG"),
    (b"FLIF", "FLIF"),
    (b"AT&TFORM", "DjVu"),
    (b"farbfeld", "farbfeld"),
    (b"icns", "ICNS"),
    (b"IIU\0", "RAW"),  # Panasonic
    (b"IIRO", "RAW"),  # Olympus
    (b"IIRS", "RAW"),
    (b"MMOR", "RAW"),
    (b"FUJIFILMCCD-RAW", "RAW"),
    (b"FOVb", "RAW"),  # Sigma
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"crx ": "RAW"} | dict.fromkeys(
    [b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"], "HEIF"
)
_GENERIC_BRANDS = (b"mif1", b"msf1", b"mif2", b"miaf")  # the compatible brands say which codec
_SVG = re.compile(
    rb"\A(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*(?:<!DOCTYPE[^>]*>\s*)?<svg[\s>]", re.S
)
_DICOM_AT = 128
HEAD_BYTES = 256
"""first bytes that tell every kind but text with a long preamble"""


def recognise(head: bytes) -> str:
    """The kind of file whose first bytes (4 KB tell most) these are; empty for what is no known picture."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _brand(head)
    if head[:4] in (b"II*\0", b"MM\0*") and head[8:10] == b"CR":
        return "RAW"  # Canon's, in the clothes of a TIFF
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:1] == b"P" and head[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6") and head[2:3].isspace():
        return "PPM"
    if head[_DICOM_AT : _DICOM_AT + 4] == b"DICM":
        return "DICOM"
    return "SVG" if b"<svg" in head[:4096] and _SVG.match(head[:4096]) else ""


def sniff(head: bytes) -> bool:
    """Whether these first bytes look like an image, whatever the name says. Text that is a picture does not."""
    if head[:2] == b"BM" and head[6:10] != bytes(4):  # words that begin so
        return False
    return recognise(head) not in ("", "SVG", "PDF", "EPS", "PPM")


@cache
def is_read(kind: str) -> bool:
    """Whether a decoder for it is here."""
    return kind in FORMATS or (kind in _EXTRA and importlib.util.find_spec(_EXTRA[kind]) is not None)


def _brand(head: bytes) -> str:
    major, size = head[8:12], int.from_bytes(head[:4], "big")
    if major in _BRANDS:
        return _BRANDS[major]
    brands = head[16 : min(size, 256)]
    found = [_BRANDS[b] for i in range(0, len(brands), 4) if (b := brands[i : i + 4]) in _BRANDS]
    if found:
        return found[0]
    return "HEIF" if major in _GENERIC_BRANDS else ""  # others are films
