"""A server in a process of its own, and a client of it, for the tests."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.conftest import REPOSITORY

_WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from pretrain.downstream.serve.__main__ import main; "
_WITHOUT_TORCH += "sys.exit(main(sys.argv[1:]))"
_BOUNDARY = "a-line-that-no-image-has"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def told(self) -> dict[str, Any]:
        return json.loads(self.content)

    @property
    def cls(self) -> np.ndarray:
        """[N, D]"""
        assert self.status == 200, self.content
        return np.array([image["cls"] for image in self.told["images"]], np.float32)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(self.content)) as found:
            return dict(found)


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen[str]
    host: str
    port: int

    def ask(self, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"http://{self.host}:{self.port}{path}", body, named)  # type: ignore[arg-type]
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read())

    def embed(self, *images: bytes, query: str = "", **headers: str) -> Answer:
        """One image as the body, several as a form."""
        if len(images) == 1:
            return self.ask(f"/embed{query}", images[0], Content_Type="image/jpeg", **headers)
        return self.ask(f"/embed{query}", form(images), Content_Type=FORM, **headers)

    def health(self) -> dict[str, Any]:
        return self.ask("/health").told

    def wait_for_queue(self, images: int) -> None:
        end = time.monotonic() + 20
        while self.health()["queue"] != images:
            assert time.monotonic() < end, self.health()
            time.sleep(0.02)

    @contextmanager
    def half_sent(self, content: bytes) -> Iterator[socket.socket]:
        """A connection on which half of an image has been sent."""
        with socket.create_connection((self.host, self.port), timeout=60) as connection:
            head = f"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode() + content[: len(content) // 2])
            yield connection


FORM = f"multipart/form-data; boundary={_BOUNDARY}"


def form(images: Sequence[bytes]) -> bytes:
    head = '--{}\r\nContent-Disposition: form-data; name="image"; filename="{}.jpg"\r\n\r\n'
    parts = [head.format(_BOUNDARY, n).encode() + content + b"\r\n" for n, content in enumerate(images)]
    return b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode()


def rest_of(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of what is still to come on a connection."""
    content = b""
    while received := connection.recv(1 << 16):
        content += received
    head, _, body = content.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@contextmanager
def serving(path: object, *arguments: str, without_torch: bool = False) -> Iterator[Served]:
    """A server of a backbone; it ends when the block does, and well."""
    start = ["-c", _WITHOUT_TORCH] if without_torch else ["-m", "pretrain.downstream.serve"]
    command = [sys.executable, *start, str(path), "--port", "0", "--device", "cpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        host, _, port = line.partition(" at http://")[2].split()[0].rpartition(":")
        yield Served(process, host, int(port))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stdout is not None
        process.stdout.close()
