"""The server: its answers, batches, limits and end; hostile images and clients. A real process, asked over HTTP."""

import asyncio
import http.client
import io
import os
import pickle
import signal
import socket
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.checkpoint import write_teacher
from pretrain.downstream.backbone import load_backbone
from pretrain.downstream.embedders.embedder import Embedded, Embedder
from pretrain.downstream.embedders.load import load_embedder
from pretrain.downstream.export.__main__ import main as export
from pretrain.downstream.pixels import eval_crop
from pretrain.downstream.serve.__main__ import main
from pretrain.downstream.serve.batching import Batcher, Full
from pretrain.models.architectures import build
from tests.conftest import encoded, picture
from tests.pretrain.served import FORM, Served, form, rest_of, serving

PX, WIDTH = 24, 48
IMAGES = [encoded(picture(n, (60 + n, 90))) for n in range(8)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    small = {"embed_dim": WIDTH, "depth": 2, "num_heads": 4, "position_grid": 3}
    model, generator = build("dinov2_tiny", **small).requires_grad_(False), torch.Generator().manual_seed(0)
    state = {f"backbone.{n}": torch.randn(t.shape, generator=generator) / 4 for n, t in model.state_dict().items()}
    image = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "px": PX}
    write_teacher(folder, state, {"architecture": "dinov2_tiny", "model": small, "image": image, "step": 1})
    return folder


@pytest.fixture(scope="module")
def onnx(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "export"
    assert export([str(teacher), str(folder), "--format", "onnx"]) == 0
    return folder


@pytest.fixture(scope="module", params=["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def served(request: pytest.FixtureRequest, teacher: Path) -> Iterator[Served]:
    """A server with small limits; of the ONNX file where there is no torch."""
    limits = ["--max-images", "4", "--max-mb", "1", "--max-megapixels", "1"]
    if request.param == "torch":
        path = teacher
    else:
        path = request.getfixturevalue("onnx") / "model.onnx"
    with serving(path, *limits, without_torch=request.param == "onnx") as server:
        yield server


def expected(teacher: Path, *images: bytes):  # type: ignore[no-untyped-def]
    backbone = load_backbone(teacher)
    crops = np.stack([eval_crop(image, PX, 27) for image in images])
    return backbone.features(backbone.image.normalise(torch.from_numpy(crops).permute(0, 3, 1, 2)))


def test_answers_are_the_features(served: Served, teacher: Path) -> None:
    right = expected(teacher, *IMAGES[:3])
    assert np.allclose(served.embed(IMAGES[0]).cls, right.cls[:1], atol=1e-5)
    told = served.embed(*IMAGES[:3], query="?with=mean,patches").told
    assert told["grid"] == list(right.grid)
    for n, image in enumerate(told["images"]):
        assert np.allclose(image["cls"], right.cls[n], atol=1e-5)
        assert np.allclose(image["mean"], right.patches[n].mean(dim=0), atol=1e-5)
        assert np.allclose(image["patches"], right.patches[n], atol=1e-5)
    arrays = served.embed(*IMAGES[:3], query="?with=patches", Accept="application/x-npz").arrays
    assert set(arrays) == {"cls", "patches", "grid"}
    assert arrays["cls"].dtype == np.float32
    assert np.allclose(arrays["patches"], right.patches, atol=1e-5)


def test_what_it_says_of_itself(served: Served) -> None:
    told = served.ask("/").told
    assert told["model"] in ("teacher0", "model.onnx")
    assert (told["architecture"], told["embed_dim"], told["px"], told["patch_size"]) == ("dinov2_tiny", WIDTH, PX, 8)
    assert told["limits"] == {"images": 4, "body_bytes": 1_000_000, "image_pixels": 1_000_000}
    health = served.health()
    assert health["ready"] is True
    assert (health["queue"], health["queue_limit"]) == (0, 256)


def test_concurrent_requests_are_embedded_together_and_not_mixed_up(served: Served, teacher: Path) -> None:
    right, before = expected(teacher, *IMAGES).cls.numpy(), served.health()
    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda n: served.embed(IMAGES[n % 8]).cls[0], range(96)))
    assert all(np.allclose(cls, right[n % 8], atol=1e-5) for n, cls in enumerate(found))
    after = served.health()
    images, batches = (after[name] - before[name] for name in ("images", "batches"))
    assert images == 96
    assert batches <= 64, "hardly any request was embedded with another"


def test_small_answers_are_sent_at_once(served: Served) -> None:
    """Not after the 40 ms for which TCP waits for the client to acknowledge the head."""
    connection, took_s = http.client.HTTPConnection(served.host, served.port), []
    for _ in range(30):
        start = time.perf_counter()
        connection.request("POST", "/embed", IMAGES[0])
        assert connection.getresponse().read()
        took_s.append(time.perf_counter() - start)
    connection.close()
    assert min(took_s) < 0.035


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 px in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class Opened:
    """A pickle that would show that somebody opened it."""

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os._exit, (66,)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", IMAGES[0])
    return buffer.getvalue()


HOSTILE = {
    "bomb": (bomb(), 413, "too_many_pixels"),
    "cut": (IMAGES[0][: len(IMAGES[0]) // 2], 422, "damaged"),
    "header alone": (IMAGES[0][:20], 415, "not_an_image"),
    "empty": (b"", 422, "empty"),
    "text": (b"not an image, but words", 415, "not_an_image"),
    "json": (b'{"image": "aGVsbG8="}', 415, "not_an_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', 415, None),
    "pickle": (pickle.dumps(Opened()), 415, "not_an_image"),
    "zip": (zipped(), 415, None),
    "program": (b"\x7fELF" + bytes(500), 415, None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused_and_the_server_goes_on(served: Served, name: str) -> None:
    content, status, reason = HOSTILE[name]
    answer = served.ask("/embed", content, Content_Type="image/png")
    assert answer.status == status, answer.content
    assert answer.told["damaged"][0]["image"] == 0
    assert reason in (None, answer.told["damaged"][0]["reason"])
    assert answer.told["error"].startswith("image 0 (from 0) cannot be read: ")
    assert served.embed(IMAGES[1]).status == 200
    assert served.health()["queue"] == 0


def test_a_line_of_a_million_pixels_is_a_picture_like_others(served: Served) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (1000, 1, 3), dtype=np.uint8)
    line = Image.fromarray(np.repeat(colours, 1000, axis=0)[:999_999])
    middle = line.crop((0, 499_995, 1, 500_003))
    found, same = (served.embed(encoded(image, "PNG")).cls for image in (line, middle))
    assert np.allclose(found, same, atol=1e-5)


def test_one_damaged_image_of_several_is_named(served: Served) -> None:
    answer = served.embed(IMAGES[0], HOSTILE["cut"][0], IMAGES[1], HOSTILE["text"][0])
    assert answer.status == 422
    assert answer.told["error"] == "image 1 (from 0) cannot be read: damaged, and 1 more."
    assert answer.told["damaged"] == [{"image": 1, "reason": "damaged"}, {"image": 3, "reason": "not_an_image"}]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "message"),
    [
        ("/embed", form(IMAGES[:5]), {"Content_Type": FORM}, 413, "a request takes 4 images at most"),
        ("/embed", bytes(1_000_001), {}, 413, "a request takes 1,000,000 bytes at most"),
        ("/embed", form([])[:-4], {"Content_Type": FORM}, 400, "holds no image"),
        ("/embed", b"abc", {"Content_Type": "multipart/form-data"}, 400, "body cannot be read: Missing boundary"),
        ("/embed", b"abc", {"Content_Type": FORM}, 400, "body cannot be read"),
        ("/embed", form([b"x"]).replace(b'; filename="0.jpg"', b""), {"Content_Type": FORM}, 400, "is a text, not a f"),
        ("/embed?px=8", IMAGES[0], {}, 400, "'px' is no parameter; there is with=mean,patches."),
        ("/embed?with=median", IMAGES[0], {}, 400, "with='median' is unknown; choose from mean, patches."),
        ("/embed", None, {}, 405, "there are POST /embed"),
        ("/nowhere", None, {}, 404, "there are POST /embed"),
    ],
)
def test_wrong_requests(served: Served, path, body, headers, status, message) -> None:
    answer = served.ask(path, body, **headers)
    assert (answer.status, message in answer.told["error"]) == (status, True), answer.content
    assert served.health()["queue"] == 0


def test_a_body_whose_length_is_not_told_is_limited_too(served: Served) -> None:
    answer = served.ask("/embed", (bytes(100_000) for _ in range(20)), Transfer_Encoding="chunked")
    assert answer.status == 413


def test_who_asks_before_sending_is_refused_without_it(served: Served) -> None:
    with socket.create_connection((served.host, served.port), timeout=60) as connection:
        head = (
            "POST /embed HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n"
        )
        connection.sendall(head.format(2_000_000).encode())
        assert rest_of(connection)[0] == 413


def test_a_full_queue_says_when_to_come_again_and_recovers(teacher: Path) -> None:
    content = IMAGES[0]
    with serving(teacher, "--queue", "2") as served:
        with served.half_sent(content) as first, served.half_sent(content) as second:
            served.wait_for_queue(2)
            refused = served.embed(content)
            assert refused.status == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.told["error"].startswith("the queue is full")
            assert served.health()["ready"] is True
            for connection in (first, second):
                connection.sendall(content[len(content) // 2 :])
                assert rest_of(connection)[0] == 200
        assert served.embed(content).status == 200
        assert served.embed(*IMAGES[:3]).status == 503, "three images in a queue of two"


def test_clients_that_stall_or_leave(teacher: Path) -> None:
    with serving(teacher, "--timeout-s", "1") as served:
        with served.half_sent(IMAGES[0]) as connection:
            status, told = rest_of(connection)
            assert (status, told["error"]) == (408, "the request's body did not come within 1 s; send it again.")
        with served.half_sent(IMAGES[0]):
            served.wait_for_queue(1)
        served.wait_for_queue(0)
        assert served.embed(IMAGES[0]).status == 200


def test_a_stop_finishes_what_has_begun(teacher: Path) -> None:
    content = IMAGES[0]
    with serving(teacher) as served, served.half_sent(content) as connection:
        served.wait_for_queue(1)
        served.process.send_signal(signal.SIGTERM)
        while True:  # until it takes no more
            try:
                socket.create_connection((served.host, served.port), timeout=5).close()
            except ConnectionError:
                break
        assert served.process.poll() is None
        connection.sendall(content[len(content) // 2 :])
        status, told = rest_of(connection)
        assert status == 200
        assert np.allclose(told["images"][0]["cls"], expected(teacher, content).cls[0], atol=1e-5)
        assert served.process.wait(30) == 0


@pytest.mark.slow
def test_what_cannot_be_served(teacher: Path, onnx: Path, tmp_path: Path, capsys) -> None:
    def said(*arguments: object) -> str:
        assert main([*map(str, arguments), "--device", "cpu"]) == 2
        return capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot be listened at" in said(teacher, "--port", taken.getsockname()[1])
    assert "--px 25 does not split into patches of 8 px; use 24 or 32." in said(teacher, "--port", 0, "--px", 25)
    assert "max_batch=0 must be 1 or more" in said(teacher, "--port", 0, "--max-batch", 0)
    assert "none does not exist" in said(tmp_path / "none", "--port", 0)
    assert "none.onnx does not exist" in said(tmp_path / "none.onnx", "--port", 0)
    assert "runs as it was exported" in said(onnx, "--port", 0, "--bfloat16")
    (tmp_path / "model.onnx").write_bytes((onnx / "model.onnx").read_bytes())
    assert "has no config.json beside it" in said(tmp_path, "--port", 0)
    (tmp_path / "config.json").write_text('{"architecture": "a", "model": {}, "image": {"px": 8}}')
    assert "it needs architecture, model (patch_size, embed_dim)" in said(tmp_path, "--port", 0)
    (tmp_path / "config.json").write_bytes((onnx / "config.json").read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"no model")
    assert "cannot be run" in said(tmp_path, "--port", 0)


class Watched:
    """A backbone of which a test sees the batches, and which fails where the first pixel of an image is 255."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder, self.sizes = embedder, []

    def __call__(self, images: np.ndarray, with_patches: bool) -> Embedded:
        self.sizes.append(len(images))
        if (images[:, 0, 0, 0] == 255).any():
            raise RuntimeError("no memory left")
        return self.embedder(images, with_patches)


def batched(teacher: Path, test, **settings):  # type: ignore[no-untyped-def]
    """Run a test's coroutine of a batcher and its watched backbone."""

    async def whole() -> None:
        watched = Watched(load_embedder(teacher, device="cpu"))
        defaults = {"max_batch": 4, "max_wait_s": 0.3, "max_images": 10, "max_bytes": 1000}
        batcher = Batcher(watched, **defaults | settings)  # type: ignore[arg-type]
        running = asyncio.create_task(batcher.run())
        try:
            await test(batcher, watched)
        finally:
            running.cancel()

    asyncio.run(whole())


async def embed(batcher: Batcher, *values: int, after: float = 0.0, with_patches: bool = False) -> list[Embedded]:
    with batcher.place() as place:
        place.take(images=len(values) - 1)
        await asyncio.sleep(after)
        return await place.embed([np.full((PX, PX, 3), value, np.uint8) for value in values], with_patches)


def test_a_batch_waits_for_what_is_on_its_way_only(teacher: Path) -> None:
    async def test(batcher: Batcher, watched: Watched) -> None:
        start = asyncio.get_running_loop().time()
        await embed(batcher, 1)
        assert asyncio.get_running_loop().time() - start < 0.2, "it waited though it was alone"
        await asyncio.gather(embed(batcher, 1), embed(batcher, 2, after=0.05))
        assert watched.sizes == [1, 2]
        late = asyncio.create_task(embed(batcher, 3, after=0.8))
        await embed(batcher, 4)  # which does not wait so long
        assert watched.sizes == [1, 2, 1]
        await late
        found = await embed(batcher, *range(6))
        assert watched.sizes[4:] == [4, 2]
        alone = [await embed(batcher, value, with_patches=True) for value in range(6)]
        assert all(np.allclose(a.cls, b[0].cls, atol=1e-5) for a, b in zip(found, alone, strict=True))
        assert found[0].patches is None
        assert alone[0][0].patches is not None

    batched(teacher, test)


def test_a_model_that_fails_is_said_and_gets_another_try(teacher: Path) -> None:
    async def test(batcher: Batcher, _: Watched) -> None:
        with pytest.raises(RuntimeError, match="no memory left"):
            await embed(batcher, 255)
        assert batcher.error == "RuntimeError: no memory left"
        await embed(batcher, 1)
        assert (batcher.error, batcher.images) == ("", 0)

    batched(teacher, test)


def test_what_is_given_up_is_not_embedded_and_leaves_room(teacher: Path) -> None:
    async def test(batcher: Batcher, watched: Watched) -> None:
        with batcher.place() as coming:  # so that the others wait
            given_up = asyncio.create_task(embed(batcher, 1))
            await asyncio.sleep(0.02)
            with pytest.raises(Full):
                coming.take(images=9)
            with pytest.raises(Full):
                coming.take(num_bytes=1001)
            given_up.cancel()
            await asyncio.gather(embed(batcher, 2), asyncio.sleep(0.05))
        assert watched.sizes == [1]
        assert batcher.images == 0

    batched(teacher, test)
