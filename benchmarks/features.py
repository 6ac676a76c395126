"""Features of an image batch on the processor: ours against transformers', and ONNX against torch, in one run.

    python -m benchmarks.features                                       S/14 and S/16, 224 and 512 or 518 px (minutes)
    python -m benchmarks.features --architectures dinov2_vitb14 --px 224 --rounds 9

Each model is exported (random weights, so that nothing is downloaded) and loaded by its own library: `seedbed` is
`load_backbone(...).features`, `transformers` is AutoModel with its default attention, `onnx` is onnxruntime on the
export of that format. bfloat16 is autocast for ours, as `features --bfloat16` runs it, and a model cast as a whole for
transformers, whose fastest that is. Contenders take turns; a ratio is of medians of processor seconds over all threads,
which a busy machine moves least, with one thread unless --threads says otherwise.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from pretrain.downstream.backbone import Backbone, ImageSettings, complete_settings, load_backbone
from pretrain.downstream.export.folder import write_checked
from pretrain.models.architectures import build

SIZES = {"dinov2": (224, 518), "dinov3": (224, 512)}
WARM_UPS = 2
Run = Callable[[Tensor], object]


def exported(architecture: str, folder: Path) -> None:
    """The architecture as Hugging Face and ONNX folders."""
    model = build(architecture, layerscale=1.0).eval().requires_grad_(False)
    settings = complete_settings(architecture, {})
    backbone = Backbone(model, ImageSettings(px=4 * settings["patch_size"]), architecture, settings, "random", {})
    for format_ in ("huggingface", "onnx"):
        write_checked(backbone, {}, folder / format_, format_)


def contenders(folder: Path, dtype: str) -> dict[str, Run]:
    """What runs a batch of normalised images, float32 [B, 3, H, W], by name."""
    ours = load_backbone(folder / "huggingface", position_offset=0)
    theirs: Any = AutoModel.from_pretrained(folder / "huggingface", dtype=getattr(torch, dtype)).eval()

    def seedbed(images: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return ours.features(images)

    @torch.inference_mode()
    def transformers(images: Tensor) -> object:
        return theirs(images.to(theirs.dtype)).last_hidden_state

    found: dict[str, Run] = {"seedbed": seedbed, "transformers": transformers}
    if dtype == "float32":
        found["onnx"] = load_backbone(folder / "onnx").features
    return found


def take_turns(runs: dict[str, Run], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each contender, `rounds` times after the warm-ups; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(WARM_UPS + rounds):
        names = list(runs)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start = time.process_time()
            runs[name](images)
            seconds[name].append(time.process_time() - start)
    return {name: values[WARM_UPS:] for name, values in seconds.items()}


def compare(architecture: str, px: tuple[int, ...], folder: Path, asked: argparse.Namespace) -> None:
    exported(architecture, folder)
    for dtype in asked.dtypes:
        runs = contenders(folder, dtype)
        for side in px:
            images = torch.randn(max(round(asked.pixels / side**2), 1), 3, side, side)
            seconds = take_turns(runs, images, asked.rounds)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            for name, median in medians.items():
                print(
                    f"| {architecture} | {side} | {len(images)} | {dtype} | {name} | {median:.3f} | "
                    f"{min(seconds[name]):.3f} | {len(images) / median:.2f} | {median / medians['seedbed']:.2f} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16"])
    parser.add_argument("--px", type=int, nargs="+", default=[])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7, help="medians are over them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pixels", type=int, default=4 * 224**2, help="of a batch: 4 images of 224 px")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime")))
    print("\n| model | px | images | precision | who | processor s, median | least | images/s | time over ours |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for architecture in asked.architectures:
            px = tuple(asked.px) or SIZES[architecture.partition("_")[0]]
            compare(architecture, px, Path(folder) / architecture, asked)


if __name__ == "__main__":
    main()
