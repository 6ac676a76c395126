"""Embeddings over HTTP: python -m pretrain.downstream.serve BACKBONE

BACKBONE is whatever `load_backbone` takes, or an ONNX export (its folder or its model.onnx), which needs no torch.

    curl --data-binary @a.jpg localhost:8000/embed                                  one image
    curl -F image=@a.jpg -F image=@b.png 'localhost:8000/embed?with=mean,patches'   several, with more than CLS

The answer is JSON, {"model", "grid", "images": [{"cls": [...]}, ...]}; with `Accept: application/x-npz` an .npz of
float32 arrays cls [N, D], mean [N, D], patches [N, h * w, D], and grid. Images are cropped as in evaluation. A request
that cannot be answered gets {"error": a sentence}: 400 for another form, 415 for what is no image, 422 for a damaged
one, each with the decoder's reason, 413 for too much, 408 and 503 for what took too long or found the queue full. GET
/health says whether the model works and how long the queue is, GET / what is served.

Ctrl-C or SIGTERM ends the server when it has answered what it has. It has no accounts and no TLS: beyond this machine
(--host 0.0.0.0) put a proxy before it. For a set of images there is `pretrain.downstream.features`, without a server.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        from pretrain.downstream.serve.command import run
    except ModuleNotFoundError as error:
        print(f"error: a server needs more ({error}); install seedbed[use], or seedbed[onnx].", file=sys.stderr)
        return 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
