"""The command line of the server, and its life from the socket to the last answer."""

import argparse
import math
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import uvicorn

from configs.messages import sentence
from pretrain.downstream.embedders.embedder import Embedder
from pretrain.downstream.embedders.load import crop_side, load_embedder
from pretrain.downstream.serve.app import ServeSettings, build_app

_OPTIONS = {
    "max_batch": "images embedded together",
    "max_wait_ms": "longest wait of an image for others that are on their way",
    "queue": "images of all requests in work; one beyond gets 503",
    "max_images": "of a request",
    "max_mb": "of a request, millions of bytes",
    "max_megapixels": "of an image",
    "timeout_s": "for a request to come, and again for its answer",
}
_TO_FINISH_S = 5
"""beyond what the timeouts of a request allow it"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; 0, 130 after Ctrl-C, 2 for what cannot be served."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.downstream.serve", description="Embeddings of images over HTTP."
    )
    parser.add_argument("backbone", help="run, checkpoint, export, ONNX, released file, hf:OWNER/NAME or timm:NAME")
    parser.add_argument("--architecture", default="", help="of a released file, which does not say")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--bfloat16", action="store_true", help="run the backbone in bfloat16")
    parser.add_argument("--px", type=int, help="side of the crop (default: that of the backbone)")
    defaults = {field.name: field.default for field in fields(ServeSettings)}
    for name, what in _OPTIONS.items():
        default = defaults[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{what} (default: {default})"
        )
    asked = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until uvicorn has it, and again when uvicorn is done
    try:
        with _bound(asked.host, asked.port) as place:
            embedder = load_embedder(asked.backbone, asked.architecture, asked.device, asked.bfloat16)
            px = crop_side(asked.px, embedder)
            settings = ServeSettings(px=px, **{name: getattr(asked, name) for name in _OPTIONS})
            _serve(embedder, Path(asked.backbone).resolve().name, settings, place)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet: a taken port is known before the model is loaded."""
    # asyncio sends small answers at once only where the protocol is named; else each waits 40 ms for the client's word.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except (OSError, OverflowError) as error:
        place.close()
        raise ValueError(f"--host {host} --port {port} cannot be listened at: {error}; name another.") from None
    return place


def _serve(embedder: Embedder, name: str, settings: ServeSettings, place: socket.socket) -> None:
    """Serve until a signal, and until what was there by then is answered."""
    start = time.perf_counter()
    embedder(np.zeros((settings.max_batch, settings.px, settings.px, 3), np.uint8), True)  # the memory is there
    took_s = time.perf_counter() - start
    place.listen()  # who reads the line below may come at once; uvicorn takes over
    host, port = place.getsockname()[:2]
    print(
        f"serving {embedder.source} at http://{f'[{host}]' if ':' in host else host}:{port} ({embedder.runs_on}; the "
        f"first batch of {settings.max_batch} took {took_s:.2f} s)",
        flush=True,
    )
    config = uvicorn.Config(
        build_app(embedder, name, settings),
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=math.ceil(2 * settings.timeout_s) + _TO_FINISH_S,
    )
    uvicorn.Server(config).run(sockets=[place])
