"""A backbone that onnxruntime runs: an export of `--format onnx`, without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.downstream.embedders.embedder import Embedded
from pretrain.program_files import INPUT, OUTPUTS, PROGRAM_CONFIG

_CLS, _, _PATCHES = OUTPUTS
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class OnnxEmbedder:
    """See `load_embedder` and `Embedder`.

    Raises:
        ValueError: no onnxruntime, no file, a damaged one, no description beside it, or no such device.
    """

    def __init__(self, file: Path, device: str, gpu: int | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"{file} needs onnxruntime ({error}); install seedbed[onnx].") from None
        if not file.is_file():
            raise ValueError(f"{file} does not exist.")
        self.source = str(file)
        try:
            self._describe(file.parent / PROGRAM_CONFIG)
            providers = _providers(onnxruntime.get_available_providers(), device, gpu)
            self._session = onnxruntime.InferenceSession(file, providers=providers)
        except (ValueError, OSError):
            raise
        except Exception as error:  # onnxruntime has a class for each of its status codes
            raise ValueError(f"{file} cannot be run: {' '.join(str(error).split())[:200]}") from None
        names = {node.name for node in (*self._session.get_inputs(), *self._session.get_outputs())}
        if missing := {INPUT, _CLS, _PATCHES} - names:
            raise ValueError(f"{file} is of another kind than `--format onnx` writes: it has no {sorted(missing)[0]}.")
        self.runs_on = f"onnxruntime {onnxruntime.__version__}, {'cuda' if providers[0] != _CPU else 'cpu'}"

    def _describe(self, path: Path) -> None:
        """Take what the graph does not say from the file that the export wrote beside it."""
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            image, model = known["image"], known["model"]
            self.architecture, self.px = str(known["architecture"]), int(image["px"])
            self.patch_size, self.embed_dim = int(model["patch_size"]), int(model["embed_dim"])
            self._mean, self._std = (np.array(image[name], np.float32).reshape(1, 1, 1, 3) for name in ("mean", "std"))
        except FileNotFoundError:
            raise ValueError(
                f"{self.source} has no {path.name} beside it, which says how its images are normalised: keep the "
                "folder of the export together, or export it anew with --format onnx."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not what `--format onnx` writes beside its model: it needs architecture, model "
                f"(patch_size, embed_dim) and image (mean, std, px), and {error!r} was met."
            ) from None

    def __call__(self, images: np.ndarray, with_patches: bool) -> Embedded:
        pixels = (images.astype(np.float32) / 255 - self._mean) / self._std
        below, right = (-side % self.patch_size for side in images.shape[1:3])
        pixels = np.pad(pixels, ((0, 0), (0, below), (0, right), (0, 0)))  # normalised: the mean colour is 0
        height, width = pixels.shape[1:3]
        asked = [_CLS, _PATCHES] if with_patches else [_CLS]
        found = self._session.run(asked, {INPUT: np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))})
        grid = (height // self.patch_size, width // self.patch_size)
        cls, *patches = (tokens.astype(np.float32, copy=False) for tokens in found)  # a float16 export gives its own
        return Embedded(cls, patches[0] if with_patches else None, grid)


def _providers(available: list[str], device: str, gpu: int | None) -> list[Any]:
    """onnxruntime's words for a device: auto, cpu, cuda or cuda:N."""
    kind, colon, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not number.isdecimal())):
        raise ValueError(f"--device={device!r} is unknown; choose one of auto, cpu, cuda, cuda:N.")
    has_gpu = _CUDA in available
    if kind == "cuda" and not has_gpu:
        raise ValueError(
            f"--device={device}, but this onnxruntime has no {_CUDA}; install onnxruntime-gpu, or use --device=cpu."
        )
    if kind == "cpu" or not has_gpu:
        return [_CPU]
    return [(_CUDA, {"device_id": number or gpu or 0}), _CPU]
