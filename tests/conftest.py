"""What several test files share: small pictures, small tars, the real-data folder, the demo pool, one Ray."""

import io
import json
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def signals_arrive() -> Iterator[None]:
    """Signals that tests send reach their children, also under `nohup make test &`, where those would ignore them."""
    former = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) == signal.SIG_IGN:
            handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            former[number] = signal.signal(number, handler)
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images that SEEDBED_DATA names; tests that need it are skipped without it."""
    folder = os.environ.get("SEEDBED_DATA")
    if not folder:
        pytest.skip("SEEDBED_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def demo_pool(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A demo pool of 240 images with known truth, its seed and evaluation images."""
    from curation.demo.pool import make_demo

    return make_demo(tmp_path_factory.mktemp("demo"), num_images=240)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One embedded Ray of two CPUs for the tests that run stages in this process."""
    import ray

    from curation.engine.workers import ExecutionConfig, start_ray

    start_ray(ExecutionConfig(workers=2))
    yield
    ray.shutdown()


def picture(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A smooth random colour picture: different seeds give unlike pictures, and re-encoding changes little."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format_: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def picture_tar(path: Path, seeds: range, prefix: str = "p") -> Path:
    """A WebDataset tar of one picture a seed: key.jpg, key.json, key.txt."""
    members = []
    for seed in seeds:
        key = f"{prefix}{seed:04d}"
        members += [
            (f"{key}.jpg", encoded(picture(seed), quality=90)),
            (f"{key}.json", json.dumps({"url": f"https://example.org/{key}", "score": seed / 100}).encode()),
            (f"{key}.txt", f"caption of {key}".encode()),
        ]
    return write_tar(path, members)
