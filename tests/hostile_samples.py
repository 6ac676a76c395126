"""A pool whose samples differ in everything that a reader of shards could stumble over, and the run that keeps them."""

import functools
import json
from pathlib import Path

from curation.stages.balance import BalanceConfig
from curation.stages.shard import ShardConfig
from curation.state import Run
from tests.conftest import encoded, picture
from tests.tiny_run import curate, write_tar

# Of the same colours, an encoder would see copies: each kind gets a picture of its own.
IMAGES = {
    "jpg": lambda i: encoded(picture(i), quality=90),
    "png": lambda i: encoded(picture(i), "PNG"),
    "webp": lambda i: encoded(picture(i), "WEBP"),
    "gif": lambda i: encoded(picture(i).quantize(64), "GIF"),
    "bmp": lambda i: encoded(picture(i), "BMP"),
    "tif": lambda i: encoded(picture(i), "TIFF"),
    "grey.jpg": lambda i: encoded(picture(i).convert("L")),
    "alpha.png": lambda i: encoded(picture(i).convert("RGBA"), "PNG"),
    "grey-alpha.png": lambda i: encoded(picture(i).convert("LA"), "PNG"),
    "palette.png": lambda i: encoded(picture(i).quantize(16), "PNG"),
}
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
BESIDE: list[dict[str, bytes]] = [
    {"txt": b"a caption", "json": b'{"url": "https://example.org/1", "score": 1, "tags": null}'},
    {},
    {"txt": "café".encode("latin-1"), "json": b'{"score": 0.5, "nested": {"a": [1, null, "x"]}}'},
    {"json": b"[1, 2]", "cls": b"7", "seg.png": b"not a picture"},
    {"json": b"not json", "cls": b"a cat", "npy": b"not an array"},
    {"TXT": "猫".encode(), "txt": b"the first wins by its place in the tar", "pickle": b"never loaded"},
    {"json": b"{}", "pth": b"never loaded either", "mp": b"\xc1", "cls": b"9" * 40},
    {"txt": b"", "tar": b"neither", "tar.gz": b"nor", "JSON": b'{"k": 1}'},
    {"json": b'{"a": 1}', "Json": b'{"b": 2}', "cls": b" -3\n", "cls2": b"x"},
    {"text": b"\xff", "id": b"x", "mp4": b"no film", "wav": b"no sound", "__meta__": b"1"},
]


def pool() -> dict[str, dict[str, bytes]]:
    """key -> suffix -> content; the image first."""
    samples = {}
    for i, ((kind, make), beside) in enumerate(zip(IMAGES.items(), BESIDE, strict=True)):
        key = ("folder/__hidden" if i == 3 else f"folder/__k.{i}") if i in (3, 4) else f"k{i}"
        key = key.replace(".", "_")
        samples[key] = {kind.rpartition(".")[2]: make(i), **beside}
    for i in range(10, 16):  # plain ones, so that the first five of a shard do not show all kinds
        samples[f"k{i}"] = {"jpg": encoded(picture(i))}
    return samples


@functools.cache
def hostile_run(folder: Path, format_: str) -> Run:
    """Every image kept, in shards of five; in the pool's tar, samples lie in the order of `pool`."""
    url = write_tar(folder / "hostile-pool.tar", pool())
    run = curate(
        folder / f"hostile-{format_}",
        url,
        balance=BalanceConfig(num_images=16),
        filters=[],
        shard=ShardConfig(format=format_, max_images=5),
    )
    assert run.manifests["report"].counts["kept"] == 16, run.manifests["report"].counts
    return run


def original(about: dict) -> dict | None:
    return json.loads(about["original"]) if about["original"] else None
