"""Decoding in processes that may die: a picture that hangs or floods the memory costs itself alone."""

import io
import multiprocessing
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.encoders.encoder import View
from curation.reading.listing import find_parts
from curation.reading.pictures.images import ImageLimits
from curation.reading.samples import Part
from curation.stages import decode
from curation.stages.decode import DecodeJob, decode_part
from tests.conftest import encoded, picture, picture_tar

JOB = DecodeJob((View(height=8, width=8),), ImageLimits(), (), 4)


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return find_parts([str(picture_tar(tmp_path / "a.tar", range(6)))])[0]


def rows(part: Part, isolated: bool) -> list[dict[str, Any]]:
    return [row for batch in decode_part(part, JOB, isolated) for row in (batch or [[]])[0]]


def trouble_at_third(monkeypatch: pytest.MonkeyPatch, trouble: Callable[[], Any]) -> None:
    """Hashing the third picture meets trouble, in forked processes too."""
    whole = decode.perceptual_hash
    third = np.asarray(Image.open(io.BytesIO(encoded(picture(2), quality=90))).convert("RGB"))

    def perceptual_hash(image: Image.Image) -> Any:
        if np.array_equal(image, third):
            trouble()
        return whole(image)

    monkeypatch.setattr(decode, "perceptual_hash", perceptual_hash)


def spin() -> None:
    while True:
        pass


def flood() -> None:
    held = []
    while True:
        held.append(b"x" * (64 << 20))


@pytest.mark.parametrize(("trouble", "reason"), [(spin, "decoder_timeout"), (flood, "decoder_failed")])
def test_an_isolated_image_costs_itself(
    part: Part, monkeypatch: pytest.MonkeyPatch, trouble: Callable[[], None], reason: str
) -> None:
    monkeypatch.setattr(decode, "_IMAGE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(decode, "_CHILD_BYTES_PER_PIXEL", 4)
    trouble_at_third(monkeypatch, trouble)
    assert [row["reason"] for row in rows(part, isolated=True)] == [None, None, reason, None, None, None]


def test_an_image_that_hangs_ends_its_process(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel ends it, as no exception reaches a loop of native code."""
    monkeypatch.setattr(decode, "_IMAGE_TIMEOUT_S", 0.5)
    trouble_at_third(monkeypatch, spin)
    process = multiprocessing.get_context("fork").Process(target=rows, args=(part, False))
    start = time.monotonic()
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGALRM
    assert time.monotonic() - start < 20
    monkeypatch.undo()
    assert [row["reason"] for row in rows(part, isolated=False)] == [None] * 6
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
